"""What `ptr-train` refuses before it imports torch and LeRobot: options' files, and which policy and data they name."""

from argparse import SUPPRESS
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ptr_hf.cli.light_parser import LightParser
from ptr_hf.cli.option_names import ELSEWHERE, GONE, unknown_options
from ptr_hf.cli.refusals import UsageError

SOURCES = ("policy_path", "policy_type", "dataset", "mixture", "only", "output_dir", "resume_from_checkpoint")
DEMO = Path(__file__).parent / "demo.yaml"
"""Options of the job that runs without arguments."""
FOREIGN = frozenset(other for others in ELSEWHERE.values() for other in others)


def first_look(argv: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Check what the command line and its YAML files train on what.

    Args:
        argv: the command line; where it names neither policy, data nor a file, `DEMO` stands in.

    Returns:
        the options in the YAML files, by file, in their order; later ones override earlier ones, None leaves out.

    Raises:
        UsageError: a file cannot be read, an option has another name, or the sources contradict each other.
    """
    if {"-h", "--help", "--help_all", "--help-all"} & set(argv):
        return {}
    finder = LightParser(add_help=False, argument_default=SUPPRESS)
    finder.add_argument("--config", nargs="+", action="extend", default=[])
    finder.add_argument("--policy_overrides", "--policy-overrides", nargs="+")
    finder.add_argument("--compare_sft", "--compare-sft", nargs="?", const="true")
    for name in SOURCES:
        finder.add_argument(*{f"--{name}", f"--{name.replace('_', '-')}"})
    known, rest = finder.parse_known_args(argv)
    command = vars(known)
    foreign = [word for word in rest if word.startswith("--") and _name(word) in FOREIGN | GONE.keys()]
    if foreign:
        raise UsageError(unknown_options(foreign, ELSEWHERE))
    named = command.pop("config")
    alone = not named and not {"policy_path", "policy_type", "dataset", "mixture"} & command.keys()
    files = read_files([DEMO] if alone else named)
    given = {name: value for options in files.values() for name, value in options.items()} | command
    _check({name: value for name, value in given.items() if value is not None})
    return files


def read_files(files: Sequence[str | Path]) -> dict[str, dict[str, Any]]:
    """The options in YAML files, by file.

    Raises:
        UsageError: a file is missing or holds something else than lines ``name: value``; the sentence names it.
    """
    found: dict[str, dict[str, Any]] = {}
    for file in map(Path, files):
        if not file.is_file():
            raise UsageError(f"--config {file}: there is no such file.")
        try:
            options = yaml.safe_load(file.read_text()) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"--config {file}: this is no YAML: {' '.join(str(error).split())}.") from error
        if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
            raise UsageError(f"--config {file}: a YAML file of options has lines `name: value`; this one does not.")
        found[str(file)] = options
    return found


def _name(word: str) -> str:
    return word.partition("=")[0].lstrip("-").replace("-", "_")


def _check(given: dict[str, Any]) -> None:
    path, kind, dataset, mixture = (given.get(name) for name in ("policy_path", "policy_type", "dataset", "mixture"))
    named, policy = "--policy_path" if kind is None else "--policy_type", path or kind
    if path is not None and kind is not None:
        raise UsageError("--policy_path is a policy to fine-tune and --policy_type a new one: give one of the two.")
    if dataset is not None and mixture is not None:
        raise UsageError("--dataset is one dataset and --mixture several: give one of the two.")
    if policy is not None and dataset is None and mixture is None:
        raise UsageError(f"{named} needs a --dataset or a --mixture; leave all out for the demo.")
    if policy is None and dataset is not None:
        raise UsageError(
            "--dataset needs a --policy_path, the policy to fine-tune (a Hub id such as lerobot/smolvla_base, or a folder), or a "
            "--policy_type, such as act, to train from scratch. Leave all out for the demo."
        )
    if given.get("only") is not None and mixture is None:
        raise UsageError("--only names a source of the --mixture, which is missing.")
    if given.get("policy_overrides") and policy is None:
        raise UsageError("--policy_overrides change the policy of --policy_path or --policy_type, which is missing.")
    compares = str(given.get("compare_sft", "false")).lower() in ("true", "yes", "1", "t", "y")
    if compares and Path(str(given.get("resume_from_checkpoint"))).is_dir():
        raise UsageError(
            "--compare_sft trains twice, each in its own folder: --resume_from_checkpoint last finds both."
        )
    if given.get("output_dir") is None:
        raise UsageError("--output_dir is needed: the folder for the checkpoint, the logs and the report.")
