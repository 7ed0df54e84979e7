"""Public tools that look for bad demonstrations, beside `ptr-score`, on three sets whose bad episodes are known.

    python recipes/benchmarks/rivals.py --workspace rivals --results results/rivals.json

makes the sets and an environment for each tool in `--workspace`, runs each tool there by its own command (or, where it says so
below, its own Python functions) and adds rows to the file: one for each tool, score, set, seed and kind of fault. What the file
or the workspace has is not measured again. Every tool is installed with pip; this process imports none of them.

The sets are `bundled` (60 episodes with camera, 20 of them bad), and the good episodes of the bundled Meta-World states, of which
30 % are spoiled by recipes/corrupt_dataset.py: `signal` (delay, scaled, zeroed) and `demonstration` (noise of 0.4, truncation,
wrong instruction), ten per cent each. `--dataset` takes the good episodes of another LeRobotDataset instead.

Every score that a tool has for an episode gets rows of its own, so that no tool is judged by its weaker one. Time is that of
the whole command, start-up included, divided by the time of `ptr-score` on the same set in the same run.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from ptr_hf.data.demonstrations import Truth, bundled_demonstrations, load_truth, truth_path

COMMAND = "python recipes/benchmarks/rivals.py --workspace rivals --results results/rivals.json"
CORRUPT = Path(__file__).parents[1] / "corrupt_dataset.py"
OURS = "ptr-score"
SETS = {
    "signal": "--delay 0.1 --scaled 0.1 --zeroed 0.1",
    "demonstration": "--noise 0.1 --truncation 0.1 --wrong_instruction 0.1 --noise_std 0.4 --noise_bounds -1 1",
}
"""What recipes/corrupt_dataset.py is asked for."""
Scores = dict[str, dict[int, float]]
"""Name of a score -> episode -> badness: the higher, the worse."""

RESIDUALS = """
import json, sys
import numpy as np
from adduct.calibrate.dynamics_model import fit_forward_dynamics, fit_inverse_dynamics
from adduct.config import ScanConfig
from adduct.engine import prepare_scan
episodes = prepare_scan(ScanConfig(path=sys.argv[1], full=True, no_vision=True)).ctx.episodes
found = {}
for name, fit in (("inverse", fit_inverse_dynamics(episodes)), ("forward", fit_forward_dynamics(episodes))):
    if fit is not None:
        found[name] = {episodes[i].episode_id: float(fit.residuals[fit.owner == i].mean()) for i in np.unique(fit.owner)}
json.dump(found, open(sys.argv[2], "w"))
"""


def read_ours(file: Path) -> Scores:
    """The z of each episode."""
    table = pd.read_csv(file / "ptr_episodes.csv")
    return {"z": dict(zip(table["episode_index"], -table["z"], strict=True))}


def read_calibra(file: Path) -> Scores:
    """The three numbers of its review queue; rare motion lowers the priority."""
    rows = json.loads(file.read_text())["assessments"]
    names = ("review_priority", "quality_risk", "anomaly_score")
    return {name: {int(row["episode_id"]): row[name] for row in rows} for name in names}


def read_democlean(file: Path) -> Scores:
    """Mutual information, as it is and by length (`--normalize-length` ranks by that, but does not write it)."""
    rows = json.loads(file.read_text())["scores"]
    return {
        "mi": {row["episode_index"]: -row["mi_score"] for row in rows},
        "mi by length": {row["episode_index"]: -row["mi_score"] / math.log(row["length"] + 1) for row in rows},
    }


def read_findings(file: Path) -> Scores:
    """Adduct has no score of an episode: the findings that name it, by the severity and confidence they state."""
    ranks = {"INFO": 1, "LOW": 2, "MEDIUM": 3, "HIGH": 4}
    total: dict[int, float] = {}
    for cluster in json.loads(file.read_text())["clusters"]:
        for finding in cluster["findings"]:
            for name in finding["locus"]["episodes"]:
                episode = int(name.rsplit("_", 1)[-1])
                total[episode] = total.get(episode, 0.0) + ranks[finding["severity"]] * finding["confidence"]
    return {"findings": total}


def read_residuals(file: Path) -> Scores:
    """The mean residual of the dynamics that its detectors fit, which its report gives for no episode."""
    return {
        f"{name} residual": {int(episode.rsplit("_", 1)[-1]): value for episode, value in means.items()}
        for name, means in json.loads(file.read_text()).items()
    }


@dataclass(frozen=True)
class Run:
    """One command of a tool.

    Args:
        label: put behind the names of its scores.
        command: {bin}, {dataset} and {out} are filled in.
        read: the badness of the episodes, of what the command left in {out}.
        absent: badness of episodes that are left out; None is the median of the others.
    """

    label: str
    command: tuple[str, ...]
    read: Callable[[Path], Scores]
    absent: float | None = None


@dataclass(frozen=True)
class Tool:
    """A public tool, what pip installs for it (in steps), and the commands that are measured."""

    version: str
    installs: tuple[tuple[str, ...], ...]
    runs: tuple[Run, ...]


SCORE = (sys.executable, "-c", "from ptr_hf.cli.score import main; main()", "--no-page")
REVIEW = ("{bin}/calibra", "review", "{dataset}", "--top", "1000000", "--output", "{out}")
SCAN = ("{bin}/adduct", "scan", "{dataset}", "--full", "--json", "{out}")
TOOLS = {
    OURS: Tool(
        "this repository",
        (),
        (Run("", (*SCORE, "--dataset", "{dataset}", "--output_dir", "{out}"), read_ours),),
    ),
    "calibra-robotics": Tool(
        "0.13.1",
        (("calibra-robotics[lerobot,video]==0.13.1", "datasets==5.2.0", "duckdb==2.0.1", "numpy==2.5.5"),),
        (
            Run("", REVIEW, read_calibra),
            Run(" within the task", (*REVIEW, "--group-by", "task"), read_calibra),
        ),
    ),
    "democlean": Tool(
        "0.1.5",
        # It asks for lerobot, of 5 GB, without importing it, and imports datasets without asking for it.
        (
            ("--no-deps", "democlean==0.1.5"),
            ("datasets==5.2.0", "numpy==2.5.5", "scipy==1.18.1", "scikit-learn==1.9.1", "rich==15.0.0", "tqdm==4.70.1"),
        ),
        # Of a LeRobotDataset v3 it can read the folder data alone: given the whole, it takes meta/*.parquet for frames.
        (
            Run("", ("{bin}/democlean", "analyze", "{dataset}/data", "-r", "{out}"), read_democlean),
            Run(
                " of 4 components",
                ("{bin}/democlean", "analyze", "{dataset}/data", "--max-dim", "4", "-r", "{out}"),
                read_democlean,
            ),
        ),
    ),
    "adduct": Tool(
        "0.2.2",
        (("adduct[video]==0.2.2", "numpy==2.5.5", "polars==2.1.0", "scikit-learn==1.9.1", "scipy==1.18.1"),),
        (
            Run("", SCAN, read_findings, 0.0),
            Run(" of all detectors", (*SCAN, "--all"), read_findings, 0.0),
            Run(" (internal)", ("{bin}/python", "-c", RESIDUALS, "{dataset}", "{out}"), read_residuals),
        ),
    ),
}


def auc_by_kind(truth: Truth, badness: np.ndarray) -> dict[str, float]:
    """How well the badness (episodes,) tells the episodes of each kind, and all bad ones, from the good ones."""
    good = ~truth.corrupted
    chosen = {"all": truth.corrupted}
    for kind in sorted({record.kind for record in truth.records if truth.corrupted[record.episode_index]}):
        chosen[kind] = np.zeros_like(good)
        chosen[kind][[record.episode_index for record in truth.of_kind(kind)]] = True
    return {
        kind: float(roc_auc_score(bad[bad | good], badness[bad | good])) for kind, bad in chosen.items() if bad.any()
    }


def filled(scores: dict[int, float], episodes: int, absent: float | None) -> np.ndarray:
    """The badness (episodes,), with the median (or `absent`) for episodes that the tool left out or could not judge."""
    badness = np.array([scores.get(episode, np.nan) for episode in range(episodes)], float)
    return np.where(np.isfinite(badness), badness, np.nanmedian(badness) if absent is None else absent)


def good_episodes(source: Path, folder: Path) -> Path:
    """A copy of the dataset without its bad episodes, if its truth is known; itself otherwise."""
    if not truth_path(source).is_file() or not load_truth(source).corrupted.any():
        return source
    if not folder.exists():
        from lerobot.datasets.dataset_tools import delete_episodes
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        bad = np.flatnonzero(load_truth(source).corrupted).tolist()
        delete_episodes(LeRobotDataset(source.name, root=source), bad, folder, folder.name)
    return folder


def make_set(name: str, seed: int, source: Path, workspace: Path) -> Path:
    """The folder of a set, made if it is not there."""
    if name == "bundled":
        return bundled_demonstrations("train")
    folder = workspace / "sets" / f"{name}-{seed}"
    if not truth_path(folder).is_file():
        clean = good_episodes(source, workspace / "sets" / f"{source.name}-good")
        options = [*SETS[name].split(), "--seed", str(seed), "--overwrite"]
        subprocess.run(
            [sys.executable, str(CORRUPT), "--dataset", str(clean), "--output_dir", str(folder), *options],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return folder


def install(name: str, workspace: Path) -> Path:
    """The folder of the programs of a tool, in an environment of its own that is made if it is not there."""
    home = workspace / "environments" / f"{name}-{TOOLS[name].version}"
    programs = home / ("Scripts" if os.name == "nt" else "bin")
    if TOOLS[name].installs and not (home / "complete").exists():
        venv.create(home, with_pip=True, clear=True)
        for packages in TOOLS[name].installs:
            subprocess.run([str(programs / "python"), "-m", "pip", "install", "--quiet", *packages], check=True)
        (home / "complete").touch()
    return programs


def timed(command: list[str], log: Path, environment: dict[str, str]) -> tuple[float, float]:
    """Run a command; its wall and processor seconds.

    Raises:
        RuntimeError: it failed; the last lines of what it said are in the message.
    """
    began = time.perf_counter()
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {' '.join(log.read_text().split()[-60:])}")
    return wall, usage.ru_utime + usage.ru_stime


def measure(name: str, folder: Path, workspace: Path) -> list[dict[str, object]]:
    """Rows of score, kind, AUC and seconds of one tool on one set, kept in the workspace; a run that fails has one row."""
    outputs = workspace / "outputs" / f"{name}-{folder.name}"
    finished = outputs / "rows.json"
    if finished.is_file():
        return list(json.loads(finished.read_text()))
    programs = install(name, workspace)
    outputs.mkdir(parents=True, exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if name == OURS or key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(outputs / "cache")}
    truth = load_truth(folder)
    rows: list[dict[str, object]] = []
    for number, run in enumerate(TOOLS[name].runs):
        out = outputs / str(number)
        values = {"bin": programs, "dataset": folder.resolve(), "out": out.resolve()}
        command = [part if part is RESIDUALS else part.format(**values) for part in run.command]
        try:
            wall, processor = timed(command, outputs / f"{number}.log", environment)
            scores = run.read(out)
        except (RuntimeError, OSError, KeyError, ValueError) as error:
            tqdm.write(f"{name}{run.label} on {folder.name}: {error}")
            rows.append({"score": run.label.strip() or "default", "kind": "all", "auc": None, "failed": True})
            continue
        for score, found in scores.items():
            for kind, auc in auc_by_kind(truth, filled(found, truth.num_episodes, run.absent)).items():
                rows.append({"score": score + run.label, "kind": kind, "auc": round(auc, 4)} | _times(wall, processor))
    if not any(row.get("failed") for row in rows):
        finished.write_text(json.dumps(rows))
    return rows


def _times(wall: float, processor: float) -> dict[str, float]:
    return {"wall_seconds": wall, "processor_seconds": processor}


def relative(rows: list[dict[str, object]], ours: list[dict[str, object]]) -> None:
    """Replace seconds by multiples of ours."""
    base = {key: ours[0][key] for key in ("wall_seconds", "processor_seconds") if key in ours[0]}
    for row in rows:
        for key, seconds in base.items():
            if key in row:
                row[key.replace("seconds", "ratio")] = round(float(row.pop(key)) / float(seconds), 3)  # type: ignore[arg-type]


def table(rows: list[dict[str, object]]) -> str:
    """Markdown: the mean over seeds, with its standard error, of every tool, score, set and kind."""
    frame = pd.DataFrame([row for row in rows if row["auc"] is not None])
    lines = ["| set | tool | score | kind | AUC | processor time |", "|---|---|---|---|---|---|"]
    for keys, group in frame.groupby(["dataset", "tool", "score", "kind"], sort=False):
        values = group["auc"].tolist()
        error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
        ratio = f"{group['processor_ratio'].mean():.2f}"
        lines.append(f"| {' | '.join(map(str, keys))} | {statistics.mean(values):.3f}{error} | {ratio} |")
    return "\n".join(lines)


def write(file: Path, rows: list[dict[str, object]]) -> None:
    """One row a line."""
    tools = {name: tool.version for name, tool in TOOLS.items()}
    body = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    head = f'{{\n "command": {json.dumps(COMMAND)},\n "versions": {json.dumps(tools)},\n'
    file.write_text(f'{head} "rows": [\n{body}\n ]\n}}\n')


def main() -> None:
    """Measure what the file does not have yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, required=True, help="folder of environments, sets and outputs")
    parser.add_argument("--results", type=Path, default=Path("results/rivals.json"), help="JSON file of all rows")
    parser.add_argument("--dataset", type=Path, help="folder whose good episodes are spoiled; default: bundled states")
    parser.add_argument("--sets", nargs="+", choices=["bundled", *SETS], default=["bundled", *SETS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the corruptions")
    parser.add_argument("--tools", nargs="+", choices=[name for name in TOOLS if name != OURS], default=None)
    options = parser.parse_args()
    source = options.dataset or bundled_demonstrations("states")
    rows = json.loads(options.results.read_text())["rows"] if options.results.exists() else []
    wanted = [name for name in TOOLS if name == OURS or options.tools is None or name in options.tools]
    done = {(row["dataset"], row["seed"], row["tool"]) for row in rows}
    cases = [(name, seed) for seed in options.seeds for name in options.sets if name != "bundled"]
    cases = [("bundled", 0)] * ("bundled" in options.sets) + cases
    bar = tqdm(total=len(cases) * len(wanted), unit="run")
    for label, seed in cases:
        name = label if label == "bundled" or options.dataset is None else f"{label} of {source.name}"
        missing = [tool for tool in wanted if (name, seed, tool) not in done]
        bar.update(len(wanted) - len(missing))
        if not missing:
            continue
        folder = make_set(label, seed, source, options.workspace)
        bar.set_description(f"{name} {seed}: {OURS}")
        ours = measure(OURS, folder, options.workspace)
        for tool in missing:
            bar.set_description(f"{name} {seed}: {tool}")
            found = [dict(row) for row in ours] if tool == OURS else measure(tool, folder, options.workspace)
            relative(found, ours)
            about = {"dataset": name, "seed": seed, "tool": tool, "version": TOOLS[tool].version}
            rows += [about | row for row in found]
            write(options.results, rows)
            bar.update()
    bar.close()
    print(table(rows))


if __name__ == "__main__":
    main()
