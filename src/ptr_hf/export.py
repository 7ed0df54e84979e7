"""The plain policy of a PTR checkpoint, for LeRobot without ptr_hf:  ptr-export --source me/policy --output_dir plain."""

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from ptr_hf.hub import PROCESSOR_FILES, resolve_folder
from ptr_hf.modeling_ptr import PTRPolicy


@dataclass
class ExportArguments:
    """Write the base policy of a PTR checkpoint as LeRobot saves it: weights, configuration and processors."""

    source: str = field(metadata={"help": "PTR checkpoint: a folder or a Hub id."})
    output_dir: str = field(metadata={"help": "Folder for the plain policy; created if missing."})
    revision: str | None = field(default=None, metadata={"help": "Revision on the Hub."})
    without_belief: bool = field(
        default=False,
        metadata={"help": "Export a policy that was trained with belief tokens too; it will act without them."},
    )


def export(
    source: str | Path, output_dir: str | Path, revision: str | None = None, without_belief: bool = False
) -> Path:
    """Write the base policy of a checkpoint, a PEFT adapter merged, with its processors.

    Args:
        source: folder or Hub id.
        output_dir: created if missing.
        revision: on the Hub.
        without_belief: export a policy trained with belief tokens too, which then acts without them.

    Returns:
        The folder.

    Raises:
        ValueError, FileNotFoundError: the checkpoint is none, damaged, or needs its belief.
    """
    folder, output = resolve_folder(source, revision=revision), Path(output_dir)
    PTRPolicy.from_pretrained(folder, merge_adapter=True).export_base(output, without_belief)
    names = tuple(Path(name).stem for name in PROCESSOR_FILES)
    for path in folder.iterdir():
        if path.name.startswith(names):
            shutil.copyfile(path, output / path.name)
    return output


def main() -> None:
    """The command `ptr-export`."""
    (arguments,) = HfArgumentParser(
        ExportArguments, prog="ptr-export", description=__doc__
    ).parse_args_into_dataclasses()
    try:
        folder = export(arguments.source, arguments.output_dir, arguments.revision, arguments.without_belief)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    print(f"{folder} holds the plain policy: lerobot-eval --policy.path={folder} ...")


if __name__ == "__main__":
    main()
