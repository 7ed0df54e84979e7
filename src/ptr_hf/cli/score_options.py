"""The options of `ptr-score`, without torch or LeRobot, so that help and refusals take no time."""

from argparse import BooleanOptionalAction, Namespace
from collections.abc import Sequence
from pathlib import Path

from ptr_hf.cli.light_parser import LightParser
from ptr_hf.cli.refusals import UsageError

PROGRAM = "ptr-score"
MIXTURE_ENDINGS = (".yaml", ".yml")
DESCRIPTION = """Find the bad demonstrations of a LeRobot dataset, before training and without a policy.

States, actions and instructions are read, and no video without --policy; small networks then ask what a
demonstration should satisfy: do the actions explain what happened, does what happened follow from the
actions, does the instruction fit, is the task carried to its end. Written are a page to look at, weights to
train with, and lists of episodes to keep and to exclude."""
DEFAULTS = {
    "false_alarms": 0.01,
    "weight_min": 0.02,
    "group": "task",
    "images_per_episode": 32,
    "max_frames": 100_000,
    "seed": 0,
}
"""As `ptr_hf.scoring.inspection` has them; a test compares the two."""


def parser() -> LightParser:
    """The parser of the command, its options in groups."""
    made = LightParser(prog=PROGRAM, usage="%(prog)s --dataset DATASET [options]", description=DESCRIPTION)
    what = made.add_argument_group("what is inspected")
    what.add_argument(
        "--dataset",
        nargs="+",
        action="extend",
        metavar="DATASET",
        help="Hub ids, folders, or a mixture's YAML file; each is judged by itself.",
    )
    what.add_argument("--episodes", nargs="+", type=int, metavar="N", help="These alone (of a single dataset).")
    what.add_argument("--revision", help="Revision of a single dataset on the Hub.")
    how = made.add_argument_group("how it is judged")
    how.add_argument(
        "--false_alarms",
        type=float,
        default=DEFAULTS["false_alarms"],
        help="Share of good episodes that may be flagged.",
    )
    how.add_argument("--weight_min", type=float, default=DEFAULTS["weight_min"], help="Weight of flagged frames.")
    how.add_argument(
        "--group",
        default=DEFAULTS["group"],
        help="Episodes are compared within their task, an episode column such as operator, or none.",
    )
    how.add_argument("--questions", nargs="+", metavar="NAME", help="Ask these alone. Default: all.")
    how.add_argument(
        "--policy",
        metavar="POLICY",
        help="Look at pictures too, through the frozen vision tower of this policy (folder or Hub id), as thumbnails, which need "
        "none, or through transformers:ID, a pretrained vision model; the videos are decoded once and what was seen is kept in "
        "the Hugging Face cache.",
    )
    how.add_argument(
        "--images_per_episode",
        type=int,
        default=DEFAULTS["images_per_episode"],
        help="Pictures of each camera that --policy looks at, evenly over the episode.",
    )
    how.add_argument(
        "--max_frames", type=int, default=DEFAULTS["max_frames"], help="The networks learn from at most so many frames."
    )
    how.add_argument("--seed", type=int, default=DEFAULTS["seed"], help="Seed of folds and networks.")
    how.add_argument("--device", help="Such as cuda or cpu. Default: a GPU where there is one.")
    out = made.add_argument_group("what is written")
    out.add_argument("--output_dir", type=Path, help="Folder of all files. Default: ptr_scores/<dataset>.")
    out.add_argument(
        "--page", action=BooleanOptionalAction, default=True, help="Write ptr_scores.html; --no-page does not."
    )
    out.add_argument(
        "--write_dataset", type=Path, metavar="FOLDER", help="Write a copy without the episodes to exclude."
    )
    out.add_argument(
        "--export_lerobot",
        type=Path,
        metavar="FILE",
        help="Write the weights as a parquet file that lerobot-train's own sample weighting (rabc) reads.",
    )
    out.add_argument(
        "--scorer",
        metavar="CHECKPOINT",
        help="Score with the scorer of a trained checkpoint as well, into ptr_scores.parquet.",
    )
    out.add_argument("--push_to_hub", metavar="REPO", help="Publish the files and a card as this dataset repo.")
    out.add_argument("--json", action="store_true", help="Print one JSON object on stdout, all else on stderr.")
    out.add_argument(
        "--fail_over",
        type=float,
        metavar="SHARE",
        help="Exit with code 1 where more than this share of the weight moves, for instance 0.05.",
    )
    return made


def parse(argv: Sequence[str]) -> Namespace:
    """The options of a command line, by name, and `mixture`: the YAML file of one, where that is what is inspected.

    Args:
        argv: without the program's name.

    Raises:
        UsageError: an option is unknown, missing, or contradicts another.
        SystemExit: help was asked for and printed.
    """
    given = parser().parse(argv)
    if not given.dataset:
        raise UsageError("--dataset is needed: a dataset's Hub id or folder.")
    mixture = any(name.endswith(MIXTURE_ENDINGS) for name in given.dataset)
    if mixture and len(given.dataset) > 1:
        raise UsageError("--dataset takes either datasets or one mixture's YAML file.")
    for name in ("episodes", "revision", "write_dataset", "export_lerobot", "scorer"):
        if (mixture or len(given.dataset) > 1) and getattr(given, name) is not None:
            many = "a mixture is" if mixture else f"{len(given.dataset)} are"
            raise UsageError(f"--{name} is of a single dataset; {many} given.")
    if given.write_dataset is not None and given.episodes is not None:
        raise UsageError("--write_dataset copies a whole dataset: leave --episodes out.")
    if given.write_dataset is not None and given.write_dataset.exists():
        raise UsageError(f"--write_dataset {given.write_dataset} is there already: name a new folder.")
    if not 0 < given.false_alarms <= 0.5:
        raise UsageError("--false_alarms must be above 0 and at most 0.5.")
    if not 0 <= given.weight_min <= 1:
        raise UsageError("--weight_min must be between 0 and 1.")
    if given.fail_over is not None and not 0 <= given.fail_over <= 1:
        raise UsageError("--fail_over is a share of the weight, between 0 and 1.")
    if given.images_per_episode < 2:
        raise UsageError("--images_per_episode must be 2 or more.")
    if given.max_frames < 1:
        raise UsageError("--max_frames must be 1 or more.")
    names = [Path(name).stem if mixture else _last(name) for name in given.dataset]
    given.output_dir = output = given.output_dir or Path("ptr_scores") / "+".join(names)
    for path in (output, *output.parents):
        if path.exists() and not path.is_dir():
            raise UsageError(f"--output_dir {output}: {path} is a file; name a folder.")
    given.mixture = given.dataset[0] if mixture else None
    return given


def _last(source: str) -> str:
    return Path(source).expanduser().resolve().name if Path(source).exists() else source.rstrip("/").split("/")[-1]
