"""Post-train a LeRobot policy with Posterior-Transition Reweighting.

Without arguments: the bundled Meta-World demonstrations, more than half of which are corrupted, are inspected; a small pretrained
SmolVLA is fine-tuned on them, SFT beside PTR; and both act in simulation, from starts that no demonstration begins at.

    accelerate launch recipes/train_ptr.py          # or, without a clone: accelerate launch -m ptr_hf.cli.train, or ptr-train

The real thing:

    accelerate launch recipes/train_ptr.py --policy_path lerobot/smolvla_base --dataset me/my_demos --output_dir out

A policy from scratch, here ACT: `--policy_type act` in the place of --policy_path.

Several datasets, also of different robots (docs/mixtures.md; without --policy_path a tiny SmolVLA, to try a mixture out):

    accelerate launch recipes/train_ptr.py --policy_path lerobot/smolvla_base --mixture mixture.yaml --output_dir out

A run that was killed goes on with `--resume_from_checkpoint last` and otherwise the same options; where both SFT and PTR are
trained, the one that had ended is not trained again. Checkpoints are written with `--save_strategy steps --save_steps N`.

The data are inspected first, and bad demonstrations weigh less (preset `ptr_offline`, docs/weights.md); `--preset sft` is plain
fine-tuning, `--preset ptr` the paper's method.
`--config file.yaml` reads any of the options from a file. Of several files (`--config base.yaml variant.yaml`) the later ones
override the earlier ones, and options on the command line override them all. `recipes/experiments/` has ready ones.
"""

from dataclasses import dataclass, field, fields
from typing import Literal

from ptr_hf import PTRTrainingArguments
from ptr_hf.cli.first_look import first_look
from ptr_hf.cli.parser import OptionParser
from ptr_hf.cli.refusals import refusals
from ptr_hf.cli.train import PROGRAM
from ptr_hf.data.mixture.config import MixtureConfig


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
        metadata={"help": "Hub id or folder of a LeRobot policy or a PTR checkpoint. None: the small demo policy."},
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
        default=None, metadata={"help": "Hub id or folder of the LeRobotDataset. None: the bundled demonstrations."}
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
            "help": "Held-out demonstrations for the action loss; for a mixture, a YAML file of the same robots. None: the "
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
    parser = OptionParser(
        (RecipeArguments, PTRTrainingArguments), prog=PROGRAM, description=__doc__
    )  # the text at the top of this file
    recipe, args = parser.parse(argv, files)
    return recipe, args


def read_mixture(recipe: RecipeArguments) -> MixtureConfig | None:
    """The mixture that the arguments name, or the one source of it that they ask for."""
    if recipe.mixture is None:
        return None
    with refusals(PROGRAM, OPTIONS):
        mixture = MixtureConfig.from_yaml(recipe.mixture)
        return mixture if recipe.only is None else mixture.only(recipe.only)
