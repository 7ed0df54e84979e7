"""What many ranks and many episodes cost: collectives counted, candidates simulated, and a large run put on paper.

    python recipes/benchmarks/scaling/benchmark.py            # results/scaling.json, the page's picture and tables, an hour
    python recipes/benchmarks/scaling/benchmark.py --only large slots    # these alone are measured anew
    python recipes/benchmarks/scaling/benchmark.py --check    # fails if docs/scaling.md is not what results/scaling.json says

Runs on a CPU in one process: ranks are threads that meet in the method's own collectives (`ranks.py`), and times are
ratios within this run (`costs.py`).
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the package `benchmarks` lies
from benchmarks.scaling.costs import (
    CHUNKS,
    STATE,
    candidate_bytes,
    measure_candidates,
    measure_dataset,
    measure_large,
    measure_slots,
)
from benchmarks.scaling.ranks import (
    Call,
    Setup,
    candidate_equality,
    counted,
    gradient_difference,
    predicted,
    ring_bytes,
)
from benchmarks.scaling.side_pathway import policies, ptr_policy, write_real_vlm
from benchmarks.tables import filled, markdown
from ptr_hf.report.style import BLUE, GREEN, GREY, ORANGE, PINK, TEXT_SIZE, board, legend, log_ticks, name_axes
from ptr_hf.report.style import save_figure as save

COMMAND = "python recipes/benchmarks/scaling/benchmark.py"
RANKS = (1, 2, 8, 64, 512)
SEGMENTS = (8, 32)
HEAD_DIM = 128
EPISODES, FRAMES = 10_000_000, 250
"""The large run: so many episodes, of so many frames each (an assumption), on the last of RANKS."""
SETUPS = (
    Setup(2, 4, 2),
    Setup(3, 2, 3, micro_batches=2, target=96, state=7, action=40),
    Setup(8, 4, 8, target=768, state=14, action=720),
    Setup(4, 2, 3, detach=True),
    Setup(4, 2, 3, across=False),
    Setup(2, 4, 2, scorer=False),
    Setup(8, 1, 4, micro_batches=2, scorer=False),
)
SHOWN = {"smolvla_base": "SmolVLA", "pi0": "π0", "act": "ACT"}


def policy_sizes() -> dict[str, dict[str, int]]:
    """d_y, d_e and bytes of the policies at their published sizes, on PyTorch's meta device."""
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        configs = policies(write_real_vlm(Path(folder) / "vlm", ["a task"]))
        for name in SHOWN:
            policy = ptr_policy(configs[name])
            trained = sum(value.nbytes for value in policy.parameters() if value.requires_grad)
            sizes[name] = {
                "target": policy.adapter.target_dim(policy.target_layer),
                "action": policy.adapter.action_dim,
                "gradient_bytes": trained,
                "stored_bytes": sum(value.nbytes for value in policy.state_dict().values()),
            }
    return sizes


def traffic(size: Mapping[str, int], ranks: int, segments: int, scorer: bool = True) -> tuple[float, float]:
    """Bytes that a rank sends in a step of one micro-batch, by formula: for the method, and for the gradients."""
    setup = Setup(ranks, CHUNKS, segments, target=size["target"], state=STATE, action=size["action"], scorer=scorer)
    ours = sum(ring_bytes(call, ranks) for call in predicted(setup, HEAD_DIM))
    return ours, ring_bytes(Call("all-reduce", size["gradient_bytes"]), ranks)


LARGE = ((100_000, 20),)
"""Datasets that are opened and inspected: episodes, and frames of each."""


def _traffic() -> list[dict[str, Any]]:
    return [
        {**asdict(setup), "counted": counted(setup), "formula": predicted(setup)} for setup in tqdm(SETUPS, "counts")
    ]


def _equality() -> list[dict[str, Any]]:
    equality = []
    for ranks in tqdm(RANKS, "equality"):
        row = candidate_equality(Setup(ranks, CHUNKS, 1, target=16))
        if 1 < ranks <= 64:
            both = (Setup(ranks, 2, 2, micro_batches=2, scorer=scorer) for scorer in (True, False))
            row["gradient_difference"] = max(gradient_difference(setup) for setup in both)
        equality.append(row)
    return equality


def _candidates() -> list[dict[str, Any]]:
    return [row for segments in tqdm(SEGMENTS, "candidates") for row in measure_candidates(RANKS, segments, 7)]


def _slots() -> list[dict[str, Any]]:
    return measure_slots((10**5, 10**6, EPISODES), visited=RANKS[-1] * CHUNKS * SEGMENTS[0])


def _dataset() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return measure_dataset(Path(folder), (500, 2000), FRAMES)


PARTS: dict[str, Callable[[], Any]] = {
    "traffic": _traffic,
    "equality": _equality,
    "candidates": _candidates,
    "slots": _slots,
    "dataset": _dataset,
    "large": lambda: measure_large(LARGE),
    "policies": policy_sizes,
}
"""What the page says in figures."""


# ---- the page ------------------------------------------------------------------------------------------------------


def tables(found: Mapping[str, Any]) -> dict[str, str]:
    """The page's tables by name."""
    return {
        "traffic": _traffic_table(found["traffic"]),
        "equality": _equality_table(found["equality"]),
        "candidates": _candidate_table(found["candidates"]),
        "share": _share_table(found["policies"]),
        "slots": _slot_table(found["slots"]),
        "dataset": _dataset_table(found["dataset"]),
        "episodes": _episodes_table(found["large"]),
        "large": _large_table(found),
    }


def _traffic_table(rows: Sequence[Mapping[str, Any]]) -> str:
    table = [
        ["collectives of", "R", "T", "B", "A", "d_y, d_s, d_e", "calls", "bytes a rank brings", "as the formulas say"]
    ]
    for row in rows:
        extra = [
            name for name, on in (("inputs detached", row["detach"]), ("own rank's rows", not row["across"])) if on
        ]
        name = ", ".join(["`ptr`" if row["scorer"] else "`ptr_consequence`", *extra])
        brought = sum(call[1] for call in row["counted"])
        numbers = [str(row[key]) for key in ("ranks", "chunks", "segments", "micro_batches")]
        dims = f"{row['target']}, {row['state']}, {row['action']}"
        agree = [list(call) for call in row["counted"]] == [list(call) for call in row["formula"]]
        table.append([name, *numbers, dims, str(len(row["counted"])), f"{brought:,}", "all" if agree else "**no**"])
    return markdown(table)


def _equality_table(rows: Sequence[Mapping[str, Any]]) -> str:
    table = [
        [
            "R",
            "rows of all",
            "index, mask and pool",
            "largest difference of a logit",
            "relative difference of the gradient",
        ]
    ]
    for row in rows:
        gradient = row.get("gradient_difference")
        total = row["ranks"] * row["chunks"] * row["segments"]
        equal = "bit-equal" if all(row["bit_equal"].values()) else "**differ**"
        shown = "not run" if gradient is None else f"{gradient:.0e}"
        table.append([str(row["ranks"]), str(total), equal, f"{row['largest_logit_difference']:.2g}", shown])
    return markdown(table)


def _candidate_table(rows: Sequence[Mapping[str, Any]]) -> str:
    table = [["N", "R", "time to R = 1", "peak", "index, mask, logits", "pool"]]
    for row in rows:
        held = [_size(row[name]) for name in ("peak_bytes", "index, mask and logits", "pool")]
        table.append([str(CHUNKS * row["segments"]), str(row["ranks"]), f"{row['time_to_one_rank']:.1f}", *held])
    return markdown(table)


def _share_table(sizes: Mapping[str, Mapping[str, int]]) -> str:
    table = [["policy", "preset", "B", "gradients", *(f"R = {ranks}" for ranks in RANKS[1:])]]
    for name, label in SHOWN.items():
        for scorer, preset in ((True, "`ptr`"), (False, "`ptr_consequence`")):
            for segments in SEGMENTS:
                pairs = [traffic(sizes[name], ranks, segments, scorer) for ranks in RANKS[1:]]
                shares = [f"{_size(ours)}, {ours / (ours + gradients):.1%}" for ours, gradients in pairs]
                table.append([label, preset, str(segments), _size(sizes[name]["gradient_bytes"]), *shares])
    return markdown(table)


def _slot_table(rows: Sequence[Mapping[str, Any]]) -> str:
    table = [
        ["episodes", "buffers", "`remember`, time", "and bytes for a moment", "refresh, time", "and bytes for a moment"]
    ]
    for row in rows:
        cells = []
        for name in ("remember", "refresh"):
            held = row[f"{name}_peak_bytes"]
            cells += [f"{row[f'{name}_time']:.0f}", "not measured" if held is None else _size(held)]
        table.append([f"{row['episodes']:,}", _size(row["bytes"]), *cells])
    return markdown(table)


def _dataset_table(found: Mapping[str, Any]) -> str:
    table = [["what", "bytes per", "", f"at {EPISODES / 1e6:.0f} M episodes of {FRAMES} frames"]]
    for kind, count in (("episode", EPISODES), ("frame", EPISODES * FRAMES)):
        for name, value in found[f"per_{kind}"].items():
            table.append([name, kind, f"{value:.0f}", _size(value * count)])
    return markdown(table)


def _episodes_table(rows: Sequence[Mapping[str, float]]) -> str:
    sizes = [f"{row['episodes']:,.0f} episodes of {row['frames']:.0f} frames" for row in rows]
    table = [["what", *(cell for size in sizes for cell in (size, "processor"))]]
    for name in ("opening", "check_dataset", "order of an epoch", "inspection", "writing its scores"):
        cells = [cell for row in rows for cell in (_size(row[name]), f"{row[f'{name}, seconds']:.1f} s")]
        table.append([name, *cells])
    return markdown(table)


def _large_table(found: Mapping[str, Any]) -> str:
    """Per rank, at the last of RANKS and EPISODES, one slot an episode, two scores."""
    ranks, segments, slots = RANKS[-1], SEGMENTS[0], found["slots"][-1]
    rows = CHUNKS * segments
    table = [["per rank", *SHOWN.values()]]
    cells: dict[str, list[str]] = {}
    for size in (found["policies"][name] for name in SHOWN):
        setup = Setup(ranks, CHUNKS, segments, target=size["target"], state=STATE, action=size["action"])
        held = candidate_bytes(ranks, segments, size["target"])
        gathered = ranks * rows * (4 * (size["target"] + STATE) + 40)
        for name, value in {
            "gathered targets and metadata, kept for the step": gathered,
            "candidates: index, mask, logits": held["index, mask and logits"],
            "candidates: pool": held["pool"],
            "gathered action summaries, and their gradient": 2 * 4 * ranks * rows * setup.action,
            "queue": held["queue"],
            "slot memory (also in every checkpoint)": slots["bytes"],
            "checkpoint: policy, side pathway, AdamW": size["stored_bytes"] + 2 * size["gradient_bytes"],
            "sent per micro-batch, `ptr`": traffic(size, ranks, segments)[0],
            "sent per micro-batch, `ptr_consequence`": traffic(size, ranks, segments, False)[0],
            "sent per step, gradients": traffic(size, ranks, segments)[1],
        }.items():
            cells.setdefault(name, []).append(_size(value))
    return markdown([*table, *([name, *values] for name, values in cells.items())])


def _size(value: float) -> str:
    """Bytes in a unit that people read."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} B"


def figure(found: Mapping[str, Any]) -> Figure:
    """Share of a step's traffic, and bytes of a rank's candidates, over the number of ranks."""
    drawn, (left, right) = board(1, 2, 10.0, 3.8)
    ranks = [2**power for power in range(1, 11)]
    for (name, label), colour in zip(SHOWN.items(), (BLUE, GREEN, ORANGE), strict=True):
        for segments, line in zip(SEGMENTS, ("-", "--"), strict=True):
            pairs = [traffic(found["policies"][name], count, segments) for count in ranks]
            shares = [100 * ours / (ours + gradients) for ours, gradients in pairs]
            left.plot(ranks, shares, line, color=colour, linewidth=1.8, label=f"{label}, B = {segments}")
    name_axes(left, "The method's share of what a rank sends", "%", "ranks R")
    for segments, colour in zip(SEGMENTS, (BLUE, PINK), strict=True):
        held = [sum(candidate_bytes(count, segments).values()) / 1e6 for count in ranks]
        label = f"N = {CHUNKS * segments}"
        right.plot(ranks, held, color=colour, linewidth=1.8, label=f"{label}: held, by formula")
        measured = [row for row in found["candidates"] if row["segments"] == segments and row["ranks"] > 1]
        peaks = [row["peak_bytes"] / 1e6 for row in measured]
        right.plot([row["ranks"] for row in measured], peaks, "o", color=colour, label=f"{label}: peak, measured")
    name_axes(right, "A rank's candidates in memory", "MB", "ranks R")
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xticks([2, 8, 64, 512], ["2", "8", "64", "512"])
        log_ticks(ax)
        legend(ax)
    left.axhline(50, color=GREY, linestyle=":", linewidth=1.0)
    left.text(2, 52, "as much as the gradients", fontsize=TEXT_SIZE - 1.0, color=GREY, va="bottom")
    return drawn


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/scaling.json"), help="Where the figures go.")
    parser.add_argument("--page", type=Path, default=Path("docs/scaling.md"), help="The page whose tables are filled.")
    parser.add_argument("--image", type=Path, default=Path("docs/images/scaling.png"), help="Where the picture goes.")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, help="Measure these parts alone; the others stay as they are."
    )
    parser.add_argument("--check", action="store_true", help="Measure and write nothing; fail if the page is outdated.")
    options = parser.parse_args(arguments)
    if not options.check:
        torch.set_num_threads(1)
        before = json.loads(options.output.read_text()) if options.only else {}
        measured = {name: part() for name, part in PARTS.items() if name in (options.only or PARTS)}
        options.output.write_text(json.dumps({"command": COMMAND} | before | measured, indent=1) + "\n")
    found = json.loads(options.output.read_text())
    page = options.page.read_text()
    new = filled(page, tables(found))
    if options.check:
        if new != page:
            sys.exit(f"{options.page} is not up to date: run {COMMAND}.")
        return
    options.page.write_text(new)
    save(figure(found), options.image)


if __name__ == "__main__":
    main()
