"""Fill the tables of docs/policies.md from what was found: what each policy family can do, and what PTR adds to it.

    python -m pytest tests/policies -m "full or not full" --capabilities results/policies.json
    python recipes/benchmarks/scaling/side_pathway.py
    python recipes/benchmarks/policies_page.py

Nothing is written by hand between the page's `begin` and `end` marks. --check compares without writing.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the package `benchmarks` lies
from benchmarks.tables import filled, markdown

COLUMNS = (
    "belief",
    "tower reuse",
    "stored features",
    "action_is_pad",
    "action_dim_is_pad",
    "PEFT",
    "bf16 autocast",
    "bf16 weights",
    "gradient checkpointing",
    "torch.compile",
)
TRAINING = "training"

type Found = Mapping[str, Mapping[str, Any]]


@dataclass
class ReportArguments:
    """The tables of docs/policies.md."""

    capabilities: Path = field(default=Path("results/policies.json"), metadata={"help": "What the tests found."})
    side_pathway: Path = field(
        default=Path("results/side_pathway.json"), metadata={"help": "What the recipe measured."}
    )
    page: Path = field(default=Path("docs/policies.md"), metadata={"help": "The page whose tables are filled."})
    check: bool = field(default=False, metadata={"help": "Write nothing; fail if the page is not up to date."})


def by_type(found: Mapping[str, Found]) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """Outcomes per policy type and capability; a type's configurations are named `type-...`."""
    grouped: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for name, capabilities in found.items():
        policy_type = grouped.setdefault(name.partition("-")[0], {})
        for capability, outcome in capabilities.items():
            policy_type.setdefault(capability, []).append(outcome)
    return grouped


def mark(outcomes: Sequence[Mapping[str, Any]]) -> str:
    """One cell: yes, no (LeRobot's policy has none), in part (some configurations), failed, or not tested."""
    if not outcomes:
        return "not tested"
    if any(outcome["failed"] for outcome in outcomes):
        return "**failed**"
    works = [outcome.get("works", True) for outcome in outcomes]
    return "yes" if all(works) else "in part" if any(works) else "no"


def capability_table(found: Mapping[str, Found]) -> str:
    """Family × what works."""
    rows = [["policy", *COLUMNS]]
    rows += [
        [f"`{name}`", *(mark(outcomes.get(column, [])) for column in COLUMNS)]
        for name, outcomes in sorted(by_type(found).items())
    ]
    return markdown(rows)


def training_table(found: Mapping[str, Found]) -> str:
    """Thirty steps of PTR per family."""
    rows = [["policy", "identification accuracy", "chance", "its own loss before", "after"]]
    for name, outcomes in sorted(by_type(found).items()):
        for outcome in outcomes.get(TRAINING, []):
            figures = ("accuracy", "chance", "loss_before", "loss_after")
            rows.append([f"`{name}`", *(f"{outcome[figure]:.3f}" for figure in figures)])
    return markdown(rows)


def memory_table(measured: Mapping[str, Any]) -> str:
    """Extra parameters and bytes at real sizes."""
    header = ["policy", "its parameters", "extra", "of these scorer and belief", "moving average", "queue"]
    rows = [[*header, "stored", "in training", "share of the policy's bytes"]]
    for name, row in measured["policies"].items():
        parts, extra = row["parts"], row["extra"]
        own = parts["scorer"]["parameters"] + parts["belief"]["parameters"]
        average = parts["moving average of the tower"]["parameters"]
        rows.append(
            [
                name,
                f"{row['base']['parameters'] / 1e6:.0f} M",
                f"{extra['parameters'] / 1e6:.1f} M",
                f"{own / 1e6:.1f} M",
                f"{average / 1e6:.1f} M" if average else "shared",
                f"{parts['queue']['bytes'] / 1e6:.1f} MB",
                f"{extra['checkpoint_bytes'] / 1e6:.0f} MB",
                f"{extra['training_bytes'] / 1e6:.0f} MB",
                f"{extra['checkpoint_share']:.1%}",
            ]
        )
    return markdown(rows)


def main() -> None:
    (arguments,) = HfArgumentParser(ReportArguments, description=__doc__).parse_args_into_dataclasses()
    found = json.loads(arguments.capabilities.read_text())
    tables = {
        "capabilities": capability_table(found),
        "training": training_table(found),
        "memory": memory_table(json.loads(arguments.side_pathway.read_text())),
    }
    page = arguments.page.read_text()
    new = filled(page, tables)
    if arguments.check and new != page:
        sys.exit(f"{arguments.page} is not up to date: run python recipes/benchmarks/policies_page.py.")
    arguments.page.write_text(new)
    print(f"{arguments.page}: {len(by_type(found))} policies.")


if __name__ == "__main__":
    main()
