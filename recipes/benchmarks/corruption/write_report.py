"""The page about the corruption benchmark: what helps, by how much, what is solid and what is not.

    python recipes/benchmarks/corruption/write_report.py    # results/corruption.html, results/figures/*.png, docs/corruption.md

Reads what `benchmark.py` beside this file has written so far; a grid that is not complete gives a page that says what is
missing. Dynamics stand beside the paper's with --dynamics outputs/corruption/state/runs/ptr_combined_*/ptr_dynamics.parquet
"""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the package `benchmarks` lies
from benchmarks.corruption.conditions import CONDITIONS, Condition
from benchmarks.corruption.report import read_runs, write_corruption_report
from ptr_hf.report.console import PlainConsole
from ptr_hf.report.dynamics import Dynamics, read_dynamics


@dataclass
class ReportArguments:
    """The corruption benchmark's page."""

    results: list[Path] = field(
        default_factory=lambda: [Path("results/corruption_state.csv"), Path("results/corruption_pixels.csv")],
        metadata={"help": "CSV files of the tracks; those that are not there are left out."},
    )
    dynamics: list[Path] = field(
        default_factory=list, metadata={"help": "ptr_dynamics.parquet of PTR runs, each in a folder of its own."}
    )
    notes: list[str] = field(
        default_factory=list, metadata={"help": "Sentences for the head of the page: what was tuned on what, say."}
    )
    output_dir: Path = field(default=Path("results"), metadata={"help": "Folder for corruption.html and figures/."})
    markdown: Path = field(default=Path("docs/corruption.md"), metadata={"help": "The same page in Markdown."})


def severity(condition: Condition) -> str:
    """The condition's description with the shares where it mixes several corruptions, and their parameters."""
    shares = [f"{kind.replace('_', ' ')} {100 * share:.0f} %" for kind, share in condition.shares.items()]
    settings = [
        f"{kind.replace('_', ' ')}: "
        + ", ".join(f"{name.replace('_', ' ')} {_plain(value)}" for name, value in values.items())
        for kind, values in condition.parameters.items()
        if values
    ]
    return "; ".join([condition.description, *([", ".join(shares)] if len(shares) > 1 else []), *settings])


def _plain(value: object) -> str:
    return " to ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def joined_dynamics(paths: list[Path]) -> Dynamics | None:
    """The files together, each run called after the folder it lies in; None without files."""
    tables = []
    for path in paths:
        table = read_dynamics(path).table
        names = pa.array([path.resolve().parent.name] * len(table), pa.string())
        tables.append(table.set_column(table.column_names.index("run"), "run", names))
    return Dynamics.join(*map(Dynamics, tables)) if tables else None


def main(argv: list[str]) -> None:
    """Read, write, say where."""
    (arguments,) = HfArgumentParser(ReportArguments, description=__doc__).parse_args_into_dataclasses(argv)
    there = [path for path in arguments.results if path.is_file()]
    if not there:
        names = ", ".join(map(str, arguments.results))
        raise SystemExit(
            f"write_report.py: none of {names} is there; run recipes/benchmarks/corruption/benchmark.py first."
        )
    try:
        tracks = [read_runs(path) for path in there]
        commands = [f"python recipes/benchmarks/corruption/benchmark.py --track {runs.track}" for runs in tracks]
        page = write_corruption_report(
            tracks,
            arguments.output_dir,
            arguments.markdown,
            conditions={name: severity(condition) for name, condition in CONDITIONS.items()},
            dynamics=joined_dynamics(arguments.dynamics),
            notes=arguments.notes,
            rare_tasks={
                (track, name): tasks for name, condition in CONDITIONS.items() for track, tasks in condition.few.items()
            },
            commands=[*commands, shlex.join(["python", "recipes/benchmarks/corruption/write_report.py", *argv])],
        )
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"write_report.py: {error}") from error
    count = sum(len(runs.items) for runs in tracks)
    PlainConsole().print(f"{page} and {arguments.markdown} are written ({count} runs).", soft_wrap=True)


if __name__ == "__main__":
    main(sys.argv[1:])
