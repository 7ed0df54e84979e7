"""The plain policy of a PTR checkpoint, for LeRobot:  ptr-export --source me/policy --output_dir plain.

A policy that was trained on several robots is exported for one of them:  ptr-export --robot so101 ...
"""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ptr_hf.cli import interrupts
from ptr_hf.cli.light_parser import LightParser
from ptr_hf.cli.refusals import refusals

if TYPE_CHECKING:
    from ptr_hf.modeling_ptr import PTRPolicy

PROGRAM = "ptr-export"
DESCRIPTION = """
Write the base policy of a PTR checkpoint as LeRobot saves it: weights, configuration and processors.

  ptr-export --source me/policy --output_dir plain
"""


def parser() -> LightParser:
    """The parser of the command."""
    made = LightParser(
        prog=PROGRAM, usage="%(prog)s --source CHECKPOINT --output_dir FOLDER [options]", description=DESCRIPTION
    )
    what = made.add_argument_group("what is exported")
    what.add_argument("--source", required=True, metavar="CHECKPOINT", help="PTR checkpoint: a folder or a Hub id.")
    what.add_argument("--revision", help="Revision on the Hub. Default: main.")
    what.add_argument(
        "--robot", help="Of a policy trained on a mixture: the source, or its embodiment, that it will run on."
    )
    what.add_argument(
        "--without_belief",
        "--without-belief",
        action="store_true",
        help="Export a policy that was trained with belief tokens too; it will act without them.",
    )
    out = made.add_argument_group("what is written")
    out.add_argument(
        "--output_dir",
        "--output-dir",
        required=True,
        metavar="FOLDER",
        help="Folder for the plain policy; created if missing.",
    )
    return made


def export(
    source: str | Path,
    output_dir: str | Path,
    revision: str | None = None,
    without_belief: bool = False,
    robot: str | None = None,
) -> Path:
    """Write the base policy of a checkpoint, a PEFT adapter merged, with its processors.

    Args:
        source: folder or Hub id.
        output_dir: created if missing.
        revision: on the Hub.
        without_belief: export a policy trained with belief tokens too, which then acts without them.
        robot: that a policy of several will run on. Such a policy is written as it is, with processors that need no other
            word: its slots are ptr_hf's, so LeRobot needs ptr_hf installed.

    Returns:
        The folder.

    Raises:
        ValueError, FileNotFoundError: the checkpoint is none, damaged, needs its belief, or knows no such robot.
    """
    from ptr_hf.artifacts.checkpoint import resolve_folder
    from ptr_hf.artifacts.processor_checks import MAX_STATE_BYTES, PROCESSOR_FILES
    from ptr_hf.files.regular import regular_file
    from ptr_hf.modeling_ptr import PTRPolicy

    processors = tuple(Path(name).stem for name in PROCESSOR_FILES)
    folder, output = resolve_folder(source, revision=revision), Path(output_dir)
    policy = PTRPolicy.from_pretrained(folder, merge_adapter=True)
    if policy.config.robots or robot is not None:
        return _export_for_robot(policy, folder, output, robot)
    policy.export_base(output, without_belief)
    for path in sorted(folder.iterdir()):
        if path.name.startswith(processors) and path.suffix in (".json", ".safetensors"):
            # the ones that were checked, and no pipe or device beside them
            regular_file(folder, path.name, limit=MAX_STATE_BYTES)
            shutil.copyfile(path, output / path.name)
    return output


def _export_for_robot(policy: "PTRPolicy", folder: Path, output: Path, robot: str | None) -> Path:
    """The whole policy, its processors told which robot it runs on."""
    from ptr_hf.artifacts.processor_checks import PROCESSOR_FILES
    from ptr_hf.data.mixture.processor import for_robot, robots_of
    from ptr_hf.processor_ptr import saved_processors

    pipelines = saved_processors(policy.config, folder)
    if robot is None:
        raise ValueError(
            f"{folder} was trained on several robots: say which one it will run on, robot=... (--robot), one of "
            f"{', '.join(robots_of(pipelines[0]))}."
        )
    chosen = [for_robot(pipeline, robot) for pipeline in pipelines]
    output.mkdir(parents=True, exist_ok=True)
    policy.save_pretrained(output)
    for name, pipeline in zip(PROCESSOR_FILES, chosen, strict=True):
        pipeline.save_pretrained(output, config_filename=name)
    return output


def main() -> None:
    """The command `ptr-export`."""
    interrupts.end_quietly(PROGRAM)
    with refusals(PROGRAM):
        arguments = parser().parse(sys.argv[1:])
    with refusals(PROGRAM, vars(arguments)):
        folder = export(**vars(arguments))
    kind = f"policy for {arguments.robot}" if arguments.robot else "plain policy"
    print(f"{folder} holds the {kind}: lerobot-eval --policy.path={folder} ...")


if __name__ == "__main__":
    main()
