"""Fill the tables of docs/speed.md from what was measured.

    python recipes/benchmarks/speed/benchmark.py
    python recipes/benchmarks/speed/benchmark.py --tiny false --reading false --real_size true --real_size_pairs 3 \\
        --output results/speed_real_size.json
    python recipes/benchmarks/speed/start.py
    python recipes/benchmarks/speed/page.py            # --check compares without writing

Nothing is written by hand between the page's `begin` and `end` marks.
"""

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the package `benchmarks` lies
from benchmarks.tables import filled, markdown

SIZES = {
    "smolvla_500m": "SmolVLA at its released size, frozen tower",
    "smolvla_frozen": "tiny SmolVLA, only its expert trains",
    "smolvla": "tiny SmolVLA, its tower trains (EMA copy)",
    "act": "tiny ACT, its ResNet-18 trains",
}
SAMPLES = ("LeRobot, T = 1", "SFT, T = 1", "SFT, T = 4", "PTR, T = 1", "PTR, T = 4", "PTR, T = 4, by LeRobot's decoder")
Rows = Sequence[Mapping[str, Any]]


def tables(tiny: Mapping[str, Any], real: Mapping[str, Any], starts: Mapping[str, Any]) -> dict[str, str]:
    """The page's tables by name.

    Args:
        tiny, real: results of `benchmark.py` on tiny policies and at the released size.
        starts: result of `start.py`.
    """
    steps, runs = [*real["step_time"], *tiny["step_time"]], [*real["training_runs"], *tiny["training_runs"]]
    return {
        "summary": _summary(tiny, real, starts),
        "steps": _steps(steps),
        "parts": _parts(steps),
        "runs": _runs(runs),
        "pyav": _reading(tiny["reading"], "pyav", codec=True),
        "torchcodec": _reading(tiny["reading"], "torchcodec", codec=False),
        "start": _starts(starts),
    }


def _summary(tiny: Mapping[str, Any], real: Mapping[str, Any], starts: Mapping[str, Any]) -> str:
    without, carried = real["step_time"]
    run, codec = real["training_runs"][0], {(row["sample"], row["key_frames_every"]): row for row in tiny["reading"]}
    read = {
        sample: " / ".join(f"{codec[sample, every]['codec_per_chunk']:.1f}" for every in (2, 8))
        for sample in ("PTR, T = 4", "LeRobot, T = 1")
    }
    offline = [row["offline_ratio_cpu"]["median"] for row in tiny["step_time"] if "offline_ratio_cpu" in row]
    first, second = (
        [row["ratio_cpu"]["median"] for row in tiny["step_time"] if row["belief_tokens"] == tokens] for tokens in (0, 4)
    )
    start = [start["first step"] for start in starts["starts"]["ptr-train"]]
    released = SIZES["smolvla_500m"]
    figures = [
        (f"**from stored features** (`--cache_features`), {released}: a step", without["cached_ratio_cpu"], "0.5"),
        ("the same, a whole run with data loading, to `lerobot-train`'s", run["cached_to_lerobot_cpu"], "0.5"),
        ("**weights known before training** (`ptr_offline`, the default): a step", without["offline_ratio_cpu"], ""),
        ("the same, tiny policies", _range(offline), ""),
        ("**online PTR** (`ptr`) without belief (M = 0): a step", without["ratio_cpu"], "1.10"),
        ("with belief (M = 4)", carried["ratio_cpu"], "1.15"),
        ("the same two, tiny policies", f"{_range(first)}; {_range(second)}", "1.10; 1.15"),
        ("its peak memory in a whole run", run["ptr_to_sft_peak_memory"], "1.03"),
        (
            "the codec's frames per chunk with PyAV, key frame every 2 / 8 frames",
            read["PTR, T = 4"],
            f"{read['LeRobot, T = 1']}, LeRobot's loader",
        ),
        ("`ptr-train --help`", f"{max(starts['help']):.1f} s", "2 s"),
        ("from `ptr-train` to the first step, inspection included", f"{_range(start, 1)} s", "15 s"),
    ]
    rows = [
        [name, f"{value['median']:.2f}" if isinstance(value, Mapping) else value, limit]
        for name, value, limit in figures
    ]
    return markdown([["what, to plain fine-tuning's where nothing else is said", "measured", "limit"], *rows])


def _steps(rows: Rows) -> str:
    header = [
        "policy",
        "segments × T",
        "M",
        "online PTR",
        "weights known before",
        "from stored features",
        "chunk by chunk",
    ]
    sides = ("ratio_cpu", "offline_ratio_cpu", "cached_ratio_cpu", "by_chunk_ratio_cpu")
    return markdown([header, *([*_case(row), *(_span(row.get(side)) for side in sides)] for row in rows)])


def _parts(rows: Rows) -> str:
    names = list(rows[0]["parts"])
    header = ["policy", "segments × T", "M", *names, "together"]
    table = [header]
    for row in rows:
        shares = [f"{row['parts'][name]:.2f}" for name in names]
        table.append([*_case(row), *shares, f"{row['ratio_cpu']['median']:.2f}"])
    return markdown(table)


def _runs(rows: Rows) -> str:
    header = [
        "policy",
        "segments × T",
        "SFT",
        "from stored features",
        "`ptr_offline`",
        "online PTR, M = 0",
        "its peak memory to SFT's",
    ]
    sides = [f"{runner}_to_lerobot_cpu" for runner in ("sft", "cached", "offline", "ptr")]
    table = [header]
    for row in rows:
        ratios = [_span(row.get(side)) for side in sides]
        table.append([*_case(row)[:2], *ratios, _span(row["ptr_to_sft_peak_memory"])])
    return markdown(table)


def _reading(rows: Rows, decoder: str, codec: bool) -> str:
    found = {(row["sample"], row["key_frames_every"]): row for row in rows if row["backend"] == decoder}
    seen = ["the codec's frames, key frame every 2", "every 8"] if codec else []
    table = [["sample", "frames asked for", *seen, "CPU to LeRobot's loader, every 2", "every 8"]]
    for sample in SAMPLES:
        both = [found[sample, every] for every in (2, 8)]
        counts = [f"{row['codec_per_chunk']:.1f}" for row in both] if codec else []
        ratios = [_span(row["cpu_to_lerobot"]) if sample != SAMPLES[0] else "1" for row in both]
        table.append([sample, f"{both[0]['requested_per_chunk']:.2f}", *counts, *ratios])
    return markdown(table)


def _starts(starts: Mapping[str, Any]) -> str:
    table = [["seconds since the command", *starts["starts"]]]
    kinds = starts["starts"].values()
    for mark in next(iter(kinds))[0]:
        table.append([mark, *(_range([start[mark] for start in kind], 1) for kind in kinds)])
    return markdown(table)


def _case(row: Mapping[str, Any]) -> list[str]:
    return [SIZES[row["policy"]], f"{row['segments']} × {row['segment_length']}", str(row["belief_tokens"])]


def _span(values: Mapping[str, float] | None) -> str:
    return "–" if values is None else f"{values['median']:.2f} ({values['low']:.2f}–{values['high']:.2f})"


def _range(values: Iterable[float], digits: int = 2) -> str:
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page, or compare."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the three results")
    parser.add_argument("--page", type=Path, default=Path("docs/speed.md"), help="the page whose tables are filled")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is not up to date")
    options = parser.parse_args(arguments)
    found = [json.loads((options.results / f"speed{name}.json").read_text()) for name in ("", "_real_size", "_start")]
    page = options.page.read_text()
    new = filled(page, tables(*found))
    if options.check:
        if new != page:
            sys.exit(f"{options.page} is not up to date: run python recipes/benchmarks/speed/page.py.")
        return
    options.page.write_text(new)


if __name__ == "__main__":
    main()
