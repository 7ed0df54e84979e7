"""The plain policy of a PTR checkpoint, for LeRobot:  ptr-export --source me/policy --output_dir plain.

A policy that was trained on several robots is exported for one of them:  ptr-export --robot so101 ...
"""

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from ptr_hf.hub import PROCESSOR_FILES, resolve_folder
from ptr_hf.modeling_ptr import PTRPolicy
from ptr_hf.processor_embodiment import for_robot
from ptr_hf.processor_ptr import saved_processors


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
    robot: str | None = field(
        default=None,
        metadata={"help": "Of a policy trained on a mixture: the source, or its embodiment, that it will run on."},
    )


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
        robot: that a policy of several will run on; its processors then need no other word. They are steps of ptr_hf, so
            LeRobot still needs it installed.

    Returns:
        The folder.

    Raises:
        ValueError, FileNotFoundError: the checkpoint is none, damaged, needs its belief, or knows no such robot.
    """
    folder, output = resolve_folder(source, revision=revision), Path(output_dir)
    policy = PTRPolicy.from_pretrained(folder, merge_adapter=True)
    pipelines = saved_processors(policy.config, folder) if robot is not None else ()
    chosen = [for_robot(pipeline, str(robot)) for pipeline in pipelines]
    policy.export_base(output, without_belief)
    for name, pipeline in zip(PROCESSOR_FILES, chosen, strict=False):
        pipeline.save_pretrained(output, config_filename=name)
    if chosen:
        return output
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
        folder = export(**vars(arguments))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    print(f"{folder} holds the plain policy: lerobot-eval --policy.path={folder} ...")


if __name__ == "__main__":
    main()
