"""The options of `ptr-train`; `python -m ptr_hf.cli.train_options` prints their help."""

from dataclasses import dataclass, field, fields
from typing import Literal

from ptr_hf import PTRTrainingArguments
from ptr_hf.cli.first_look import first_look
from ptr_hf.cli.help_groups import GROUPS, WORDS
from ptr_hf.cli.parser import OptionParser
from ptr_hf.cli.refusals import refusals
from ptr_hf.cli.train import PROGRAM
from ptr_hf.data.mixture.config import MixtureConfig

USAGE = "%(prog)s --policy_path POLICY --dataset DATASET --output_dir FOLDER [options]"
DESCRIPTION = """
Fine-tune a LeRobot policy on demonstrations that are inspected first: bad ones weigh less.

  ptr-train --policy_path lerobot/smolvla_base --dataset me/my_demos --output_dir out
  ptr-train --policy_type act --dataset me/my_demos --output_dir out                    # a new policy, from scratch
  ptr-train --policy_path lerobot/smolvla_base --mixture mixture.yaml --output_dir out  # several datasets or robots
  ptr-train --config base.yaml variant.yaml --seed 1      # options of files; later ones win, the command line wins
  ptr-train ... --resume_from_checkpoint last             # go on after a kill; the other options as before
  ptr-train                                               # the demo: bundled demonstrations, SFT beside PTR

Many GPUs: `accelerate launch -m ptr_hf.cli.train` (or recipes/train_ptr.py) in the place of `ptr-train`.
--preset sft is plain fine-tuning, --preset ptr the paper's method.
"""


@dataclass
class RecipeArguments:
    """What to train on what."""

    config: list[str] | None = field(
        default=None,
        metadata={
            "help": "YAML files with any of these options; later files override earlier ones.",
            "action": "extend",
        },
    )
    policy_path: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of a LeRobot policy or a PTR checkpoint. Default: the small demo policy."},
    )
    policy_type: str | None = field(
        default=None,
        metadata={"help": "Train a new policy of this LeRobot type, e.g. act or diffusion, from scratch."},
    )
    policy_overrides: list[str] | None = field(
        default=None,
        metadata={
            "help": "Settings of the base policy to change before it is loaded or made, as name=value: "
            "freeze_vision_encoder=false."
        },
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the LeRobotDataset. Default: the bundled demonstrations."}
    )
    mixture: str | None = field(
        default=None,
        metadata={
            "help": "YAML file of several datasets, also of different robots, in the place of --dataset (docs/mixtures.md)."
        },
    )
    only: str | None = field(
        default=None,
        metadata={"help": "Train on this source of the mixture alone: a specialist in the same action space."},
    )
    bundled: Literal["states", "images"] = field(
        default="states",
        metadata={"help": "Which bundled demonstrations, where no dataset is named: without or with a camera."},
    )
    evaluation_starts: int = field(
        default=15,
        metadata={
            "help": "After training on the bundled states: held-out starts of each of the eight tasks in simulation; 0 for none."
        },
    )
    eval_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Held-out demonstrations for the action loss; for a mixture, a YAML file of the same robots. Default: the "
            "bundled ones in the demo."
        },
    )
    compare_sft: bool = field(
        default=False,
        metadata={"help": "Also train plain SFT on the same seed, data and number of chunks, and compare."},
    )
    score_after: bool = field(
        default=False, metadata={"help": "After training, score every chunk of the dataset (one more pass over it)."}
    )


OPTIONS = tuple(item.name for kind in (RecipeArguments, PTRTrainingArguments) for item in fields(kind))


def parse_arguments(argv: list[str]) -> tuple[RecipeArguments, PTRTrainingArguments]:
    """Command line over YAML files, the last file first, over defaults; without policy, dataset and YAML, the demo."""
    with refusals(PROGRAM):
        files = first_look(argv)
    recipe, args = train_parser().parse(argv, files)
    return recipe, args


def train_parser() -> OptionParser:
    """The parser of the command."""
    kinds = (RecipeArguments, PTRTrainingArguments)
    return OptionParser(kinds, GROUPS, WORDS, prog=PROGRAM, usage=USAGE, description=DESCRIPTION)


def read_mixture(recipe: RecipeArguments) -> MixtureConfig | None:
    """The mixture that the arguments name, or the one source of it that they ask for."""
    if recipe.mixture is None:
        return None
    with refusals(PROGRAM, OPTIONS):
        mixture = MixtureConfig.from_yaml(recipe.mixture)
        return mixture if recipe.only is None else mixture.only(recipe.only)


if __name__ == "__main__":
    print(train_parser().format_help(), end="")
