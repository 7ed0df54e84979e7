"""What does each source of a mixture do for the others? Train with all of them, then once without each, and compare.

    python recipes/leave_one_source_out.py --mixture mixture.yaml --policy_path lerobot/smolvla_base \\
        --output_dir out --max_steps 20000 --seeds 0 1 2

N sources and S seeds are (N + 1) · S runs, one after another; runs that are finished are skipped, and one that was killed goes
on from its last checkpoint (`--save_strategy steps --save_steps N`). A tenth of every source's episodes is kept out of all
runs, and their action loss says what was learned; with `--eval_env` the success in simulation does too. The output folder then
holds `runs.csv`, `effects.csv` and `effects.png`; docs/sources.md says how to read them.
"""

import csv
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from rich.table import Table
from transformers import set_seed

from ptr_hf import PTRTrainer, PTRTrainingArguments
from ptr_hf.cli.parser import OptionParser
from ptr_hf.cli.refusals import refusals
from ptr_hf.data.mixture.config import MixtureConfig
from ptr_hf.data.mixture.dataset import Mixture
from ptr_hf.data.mixture.metadata import MixtureMetadata
from ptr_hf.report.console import PlainConsole
from ptr_hf.report.files import replacing
from ptr_hf.report.style import BLUE, INK, TEXT_SIZE, TICK_SIZE, VERMILION, board, name_axes, save_figure
from ptr_hf.report.text import drawable, visible
from ptr_hf.scoring import action_loss_by_source
from ptr_hf.training.checkpoint_files import last_complete
from ptr_hf.training.evaluation import EVALUATION_FILE

ALL = "(none)"
"""What is left out of the run with all sources."""
LOSS, SUCCESS = "action loss", "success"
REPEATS = 4
"""Passes over the held-out chunks, each with fresh noise, the same in every run."""
OPTIMISATION = (
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay"),
)
RESULT_FILE, SETTINGS_FILE = "result.json", "settings.json"


@dataclass
class LeaveOneOutArguments:
    """Which mixture, which policy, which seeds."""

    mixture: str = field(metadata={"help": "YAML file of the mixture (docs/mixtures.md)."})
    policy_path: str = field(metadata={"help": "Hub id or folder of the LeRobot policy that every run starts from."})
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Every run is trained with each of them; errors need several."}
    )
    heldout: float = field(
        default=0.1, metadata={"help": "Share of every source's episodes that no run is trained on, at least one."}
    )
    heldout_mixture: str | None = field(
        default=None,
        metadata={"help": "Mixture of the held-out episodes in place of a share: the same sources in the same order."},
    )
    match: str = field(
        default="steps",
        metadata={
            "help": "steps: every run trains as long, so that what is left sees more of each source. exposure: a run without a "
            "source is shorter by its share, so that each source that is left is seen as often as in the full run.",
            "choices": ["steps", "exposure"],
        },
    )
    only: list[str] | None = field(
        default=None, metadata={"help": "Leave out only these sources, one at a time. None: each."}
    )


class Measured(NamedTuple):
    """One number of one run: the figure on a held-out source (`LOSS`) or a simulated task (`SUCCESS`)."""

    left_out: str
    seed: int
    figure: str
    on: str
    value: float


class Effect(NamedTuple):
    """What leaving a source out did: the mean over seeds of `without` minus `complete`, each pair of the same seed.

    `standard_error` is NaN for a single seed.
    """

    left_out: str
    figure: str
    on: str
    complete: float
    without: float
    difference: float
    standard_error: float
    seeds: int


def effects(measured: Sequence[Measured]) -> list[Effect]:
    """Paired differences to the run with all sources; what only one of a pair has measured is left out."""
    values = {(row.left_out, row.figure, row.on, row.seed): row.value for row in measured}
    found = []
    for left_out, figure, on in dict.fromkeys((row.left_out, row.figure, row.on) for row in measured):
        seeds = sorted({row.seed for row in measured})
        pairs = [
            (values[ALL, figure, on, seed], values[left_out, figure, on, seed])
            for seed in seeds
            if (ALL, figure, on, seed) in values and (left_out, figure, on, seed) in values
        ]
        if left_out == ALL or not pairs:
            continue
        complete, without = np.array(pairs).T
        gaps = without - complete
        error = float(gaps.std(ddof=1) / math.sqrt(len(gaps))) if len(gaps) > 1 else math.nan
        found.append(
            Effect(
                left_out,
                figure,
                on,
                float(complete.mean()),
                float(without.mean()),
                float(gaps.mean()),
                error,
                len(gaps),
            )
        )
    return found


def heldout_episodes(episodes: Sequence[int], share: float) -> list[int]:
    """A share of the episodes, spread evenly over them, at least one.

    Raises:
        ValueError: nothing would be left to train on.
    """
    count = max(1, round(share * len(episodes)))
    if count >= len(episodes):
        raise ValueError(
            f"{count} of {len(episodes)} episodes held out leave none to train on: give a lower --heldout, or held-out data of "
            "its own with --heldout_mixture."
        )
    places = (np.arange(count) + 0.5) * len(episodes) / count
    return [episodes[int(place)] for place in places]


def split(config: MixtureConfig, share: float) -> tuple[MixtureConfig, MixtureConfig]:
    """The mixture without a share of every source's episodes, and the mixture of those alone."""
    parts: tuple[list[Any], list[Any]] = ([], [])
    for source in MixtureMetadata.read(config).sources:
        kept_out = set(heldout_episodes(source.episodes, share))
        for part, own in zip(parts, (False, True), strict=True):
            episodes = [episode for episode in source.episodes if (episode in kept_out) == own]
            part.append(replace(source.config, episodes=episodes))
    train, heldout = (replace(config, sources=part) for part in parts)
    return train, heldout


def heldout_losses(trainer: PTRTrainer, heldout: MixtureConfig, seed: int = 0) -> dict[str, float]:
    """The policy's own action loss on every source's held-out chunks: the same chunks and the same noise in every run."""
    assert trainer.train_dataset is not None
    mixture = Mixture(MixtureMetadata.read(heldout, trainer.train_dataset.meta), trainer.policy.config.layout)
    return action_loss_by_source(trainer.policy, mixture, trainer.preprocessor, repeats=REPEATS, seed=seed)


def successes(folder: Path) -> dict[str, float]:
    """Success by task of the last evaluation in simulation; empty where there was none."""
    path = folder / EVALUATION_FILE
    rows = json.loads(path.read_text()) if path.is_file() else []
    last = max((row["step"] for row in rows), default=0)
    return {row["task"]: row["success"] for row in rows if row["step"] == last}


def train(
    given: LeaveOneOutArguments, args: PTRTrainingArguments, mixture: MixtureConfig, heldout: MixtureConfig, seed: int
) -> dict[str, dict[str, float]]:
    """One run: what was measured at its end, by figure and by what it was measured on."""
    output = Path(args.output_dir)
    set_seed(seed)
    trainer = PTRTrainer(given.policy_path, args, mixture)
    trainer.train(resume_from_checkpoint="last" if last_complete(output)[0] else None)
    trainer.save_model()
    return {LOSS: heldout_losses(trainer, heldout), SUCCESS: successes(output)}


def run_all(given: LeaveOneOutArguments, args: PTRTrainingArguments, console: PlainConsole) -> list[Measured]:
    """Every run that is not finished yet; then everything that was measured."""
    whole = MixtureConfig.from_yaml(given.mixture)
    if whole.statistics != "source":
        raise ValueError(
            f"The mixture normalises by statistics={whole.statistics!r}, which change with the sources, and losses could not be "
            "compared: set statistics: source."
        )
    if given.heldout_mixture is None:
        mixture, heldout = split(whole, given.heldout)
    else:
        mixture, heldout = whole, MixtureConfig.from_yaml(given.heldout_mixture)
    names = given.only or mixture.names
    unknown = sorted(set(names) - set(mixture.names))
    if unknown or len(mixture.names) < 2:
        raise ValueError(
            f"The sources are {', '.join(mixture.names)}: leaving one out takes two of them, and "
            f"{', '.join(unknown) or 'each'} has to be one."
        )
    shares = dict(zip(mixture.names, MixtureMetadata.read(mixture).shares, strict=True))
    output = Path(args.output_dir)
    check_settings(output, given, args, mixture, heldout)
    cells = [(left_out, seed) for seed in given.seeds for left_out in (ALL, *names)]
    measured: list[Measured] = []
    for number, (left_out, seed) in enumerate(cells, start=1):
        folder = output / _folder(left_out, mixture.names) / f"seed_{seed}"
        result = folder / RESULT_FILE
        if not result.is_file():
            console.rule(f"run {number} of {len(cells)}: left out {left_out}, seed {seed}")
            partly = given.match == "exposure" and left_out != ALL
            steps = round(args.max_steps * (1 - shares[left_out])) if partly else args.max_steps
            own = replace(args, output_dir=str(folder), seed=seed, max_steps=steps)
            seen, unseen = (part if left_out == ALL else part.without(left_out) for part in (mixture, heldout))
            values = train(given, own, seen, unseen, seed)
            if own.process_index == 0:
                with replacing(result) as temporary:
                    temporary.write_text(json.dumps({"left_out": left_out, "seed": seed, **values}, indent=2) + "\n")
            else:
                continue
        content = json.loads(result.read_text())
        measured += [
            Measured(left_out, seed, figure, on, value)
            for figure in (LOSS, SUCCESS)
            for on, value in content[figure].items()
        ]
    return measured


def check_settings(
    output: Path,
    given: LeaveOneOutArguments,
    args: PTRTrainingArguments,
    mixture: MixtureConfig,
    heldout: MixtureConfig,
) -> None:
    """Keep the settings that all runs of a folder share.

    Raises:
        ValueError: the folder holds runs of other settings.
    """
    settings = {
        "policy_path": given.policy_path,
        "match": given.match,
        "mixture": asdict(mixture),
        "heldout": asdict(heldout),
        "hyperparameters": args.hyperparameters(),
        "optimisation": {name: str(vars(args)[name]) for name in OPTIMISATION},
    }
    settings = json.loads(json.dumps(settings, default=str))
    path = output / SETTINGS_FILE
    if path.is_file():
        kept = json.loads(path.read_text())
        other = sorted(name for name in settings if kept.get(name) != settings[name])
        if other:
            raise ValueError(
                f"{output} holds runs with other settings ({', '.join(other)}), which cannot be compared: choose another "
                "--output_dir, or delete it."
            )
    elif args.process_index == 0:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n")


# ---- what is shown -------------------------------------------------------------------------------------------------


def percent(effect: Effect) -> tuple[float, float]:
    """Difference and its standard error: of a loss in percent of the full run's, of a success in percentage points."""
    scale = 100.0 if effect.figure == SUCCESS else 100.0 / effect.complete
    return scale * effect.difference, scale * effect.standard_error


def cell_text(effect: Effect | None) -> str:
    """`+3.1 ± 0.4`; without an error where one seed cannot tell, a dash where nothing was measured."""
    if effect is None:
        return "–"
    difference, error = percent(effect)
    return f"{difference:+.1f}" if math.isnan(error) else f"{difference:+.1f} ± {error:.1f}"


def effects_table(found: Sequence[Effect], figure: str) -> Table:
    """A row a source that was left out, a column a source or task that was measured."""
    unit = "percent of the full run's" if figure == LOSS else "percentage points"
    table = Table("left out", title=f"Change of the {figure} ({unit}, ± SE over seeds)", title_justify="left")
    columns, grid = _grid(found, figure)
    for on in columns:
        table.add_column(on, justify="right")
    for left_out, row in grid.items():
        table.add_row(left_out, *(cell_text(row.get(on)) for on in columns))
    return table


def effects_figure(found: Sequence[Effect]) -> Figure:
    """The same as a picture, one panel a figure: blue where the rest needs what was left out, red where it is better without."""
    figures = [figure for figure in (LOSS, SUCCESS) if any(effect.figure == figure for effect in found)]
    grids = {figure: _grid(found, figure) for figure in figures}
    wide, high = max(len(over) for over, _ in grids.values()), max(len(grid) for _, grid in grids.values())
    width = max(6.0, len(figures) * (2.2 + 1.25 * wide))
    picture, axes = board(1, len(figures), width, 1.7 + 0.5 * high)
    colours = LinearSegmentedColormap.from_list("effect", [VERMILION, "white", BLUE])
    for ax, figure in zip(axes, figures, strict=True):
        over, grid = grids[figure]
        values = np.full((len(grid), len(over)), np.nan)
        for place, row in enumerate(grid.values()):
            for on, effect in row.items():
                difference, _ = percent(effect)
                # a loss that rises and a success that falls both say that the source was needed
                values[place, over.index(on)] = difference if figure == LOSS else -difference
        most = max(1.0, float(np.nanmax(np.abs(values))))
        # strong colours would hide the numbers
        ax.imshow(values, cmap=colours, vmin=-1.6 * most, vmax=1.6 * most, aspect="auto")
        for place, row in enumerate(grid.values()):
            for number, on in enumerate(over):
                text = cell_text(row.get(on))
                ax.text(number, place, text, ha="center", va="center", fontsize=TICK_SIZE, color=INK)
        ax.set_xticks(range(len(over)), [_label(on) for on in over])
        ax.set_yticks(range(len(grid)), [f"without {_label(left_out)}" for left_out in grid])
        ax.grid(visible=False)
        ax.tick_params(length=0)
        ax.spines[["left", "bottom"]].set_visible(False)
        unit = "%" if figure == LOSS else "pp"
        name_axes(ax, f"Change of the {figure}", unit)
        measured_on = "held-out episodes of" if figure == LOSS else "task"
        ax.set_xlabel(measured_on, fontsize=TEXT_SIZE, color=INK)
    return picture


def _grid(found: Sequence[Effect], figure: str) -> tuple[list[str], dict[str, dict[str, Effect]]]:
    own = [effect for effect in found if effect.figure == figure]
    grid: dict[str, dict[str, Effect]] = {}
    for effect in own:
        grid.setdefault(effect.left_out, {})[effect.on] = effect
    names = list(dict.fromkeys(effect.on for effect in own))
    # columns in the order of the rows, so that what was left out runs down the diagonal
    return sorted(names, key=lambda on: list(grid).index(on) if on in grid else len(grid)), grid


def write_csv(path: Path, rows: Sequence[Any]) -> None:
    """Named tuples as a table with a header."""
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(type(rows[0])._fields)
        # names come from outside: no control or direction characters
        writer.writerows([visible(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)


def _folder(left_out: str, names: Sequence[str]) -> str:
    """Of a run; the number tells names apart that look alike in a path."""
    if left_out == ALL:
        return "all"
    return f"without_{names.index(left_out)}_" + re.sub(r"[^\w.-]+", "_", left_out)


def _label(name: str) -> str:
    return drawable(name, 22)


def main(argv: list[str]) -> None:
    """Train, compare, show."""
    program = "leave_one_source_out.py"
    parser = OptionParser((LeaveOneOutArguments, PTRTrainingArguments), prog=program, description=__doc__)
    parser.set_defaults(preset="ptr_calibrated", standardize_by="source")
    console = PlainConsole()
    given, args = parser.parse(argv)
    with refusals(program, vars(given) | vars(args)):
        if args.max_steps <= 0:
            raise ValueError("give --max_steps: runs are compared at a number of steps, not of epochs.")
        measured = run_all(given, args, console)
    if args.process_index != 0:
        return
    found = effects(measured)
    output = Path(args.output_dir)
    write_csv(output / "runs.csv", measured)
    write_csv(output / "effects.csv", found)
    save_figure(effects_figure(found), output / "effects.png")
    for figure in dict.fromkeys(effect.figure for effect in found):
        console.print(effects_table(found, figure))
    for name in ("runs.csv", "effects.csv", "effects.png"):
        console.print(f"{name:14}{output / name}", soft_wrap=True)


if __name__ == "__main__":
    main(sys.argv[1:])
