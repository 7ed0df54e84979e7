"""The folder or repo of a plain LeRobot policy, checked before LeRobot reads it."""

from collections.abc import Collection
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ptr_hf.files.foreign_code import check_policy_repos
from ptr_hf.files.numbers import check_numbers
from ptr_hf.files.reading import read_header, read_json
from ptr_hf.files.regular import regular_file


def check_base(source: str | Path, revision: str | None = None, trusted: Collection[object] = ()) -> None:
    """Check the configuration of a base policy, and in a folder the header of its weights.

    What is missing is left to LeRobot, which says so.

    Args:
        source: folder or Hub id of a LeRobot policy.
        revision: on the Hub.
        trusted: what the user gives in place of the configuration's own, repos whose code may run among it.

    Raises:
        ValueError: a file is no regular file, damaged, asks for more than a policy needs, or names code that would run.
    """
    folder = Path(source)
    if folder.is_dir():
        if regular_file(folder, SAFETENSORS_SINGLE_FILE) is not None:
            read_header(folder / SAFETENSORS_SINGLE_FILE)
    else:
        try:
            folder = Path(hf_hub_download(str(source), CONFIG_NAME, revision=revision)).parent
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
            return
    path = regular_file(folder, CONFIG_NAME)
    if path is None:
        return
    content = read_json(path)
    check_numbers(content, str(path))
    names = {name: value for name, value in content.items() if value not in trusted}
    check_policy_repos(str(content.get("type")), names, str(path))
