"""What the inspection finds of faults injected into real recordings, and how many good episodes it flags.

    python recipes/benchmarks/inspection.py --dataset data/arm --seeds 1 --results results/inspection.json

Twenty per cent of the episodes get one fault, in memory; the dataset is not changed. A dataset with a truth sidecar beside its
folder, as recipes/corrupt_dataset.py and the corruption benchmark write it, is measured as it is. Rows are added to the file.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from ptr_hf.data.demonstrations import load_truth, truth_path
from ptr_hf.scoring.crossfit import FitSettings
from ptr_hf.scoring.inspection import QUESTIONS, ask_all
from ptr_hf.scoring.recordings import Recordings, read_recordings
from ptr_hf.scoring.verdicts import judge

SHARE = 0.2
AS_RECORDED = "as recorded"
COMMAND = "python recipes/benchmarks/inspection.py --dataset FOLDER ... --seeds 1"
Episode = tuple[np.ndarray, np.ndarray]


def noisy(std: float, part: float = 1.0) -> Callable[..., Episode]:
    """Noise of so many deviations on every command, over a part of the episode."""

    def fault(
        state: np.ndarray, action: np.ndarray, spread: np.ndarray, draws: np.random.Generator, _: Episode
    ) -> Episode:
        length = max(1, round(part * len(action)))
        start = draws.integers(0, len(action) - length + 1)
        action[start : start + length] += draws.normal(size=(length, action.shape[1])) * std * spread
        return state, action

    return fault


def delayed(state: np.ndarray, action: np.ndarray, *_: object) -> Episode:
    """Every command written down ten frames late."""
    return state, action[np.maximum(np.arange(len(action)) - 10, 0)]


def mirrored(state: np.ndarray, action: np.ndarray, spread: np.ndarray, *_: object) -> Episode:
    """The two commands that move most, mirrored at their mean."""
    axes = np.argsort(-spread)[:2]
    action[:, axes] = 2 * action[:, axes].mean(axis=0) - action[:, axes]
    return state, action


def others(state: np.ndarray, action: np.ndarray, _s: np.ndarray, _d: np.random.Generator, other: Episode) -> Episode:
    """Another episode's commands."""
    return state, other[1][np.minimum(np.arange(len(action)), len(other[1]) - 1)]


def scaled(state: np.ndarray, action: np.ndarray, *_: object) -> Episode:
    """Commands at 0.6 of their distance to the mean."""
    middle = action.mean(axis=0)
    return state, middle + 0.6 * (action - middle)


def frozen(state: np.ndarray, action: np.ndarray, *_: object) -> Episode:
    """The first command for ever."""
    return state, np.repeat(action[:1], len(action), axis=0)


def truncated(
    state: np.ndarray, action: np.ndarray, _s: np.ndarray, draws: np.random.Generator, _o: Episode
) -> Episode:
    """The first 40 to 70 %."""
    length = int(len(action) * draws.uniform(0.4, 0.7))
    return state[:length], action[:length]


def paused(state: np.ndarray, action: np.ndarray, _s: np.ndarray, draws: np.random.Generator, _o: Episode) -> Episode:
    """Standing still for a third of the length."""
    at = int(draws.integers(1, len(action) - 1))
    rows = np.insert(np.arange(len(action)), at, np.full(len(action) // 3, at))
    return state[rows], action[rows]


FAULTS: dict[str, Callable[..., Episode] | None] = {
    "clean": None,
    "noise 0.4 sd": noisy(0.4),
    "noise 0.1 sd": noisy(0.1),
    "delay": delayed,
    "mirrored": mirrored,
    "other episode": others,
    "scaled": scaled,
    "frozen": frozen,
    "noise in a quarter": noisy(0.4, 0.25),
    "pause": paused,
    "truncation": truncated,
}


def inject(recordings: Recordings, fault: Callable[..., Episode] | None, seed: int) -> tuple[Recordings, np.ndarray]:
    """The recordings with a fault in a share of the episodes, and which (episodes,) have it."""
    draws = np.random.default_rng([seed, 7])
    count = len(recordings.length)
    bad = np.zeros(count, bool)
    if fault is not None:
        bad[draws.permutation(count)[: round(SHARE * count)]] = True
    spans = [slice(start, stop + 1) for start, stop in zip(recordings.first, recordings.last, strict=True)]
    spread = recordings.action.std(axis=0)
    episodes: list[Episode] = []
    for number, span in enumerate(spans):
        episode = recordings.state[span].copy(), recordings.action[span].copy()
        if bad[number] and fault is not None:
            other = spans[(number + 1 + int(draws.integers(count - 1))) % count]
            episode = fault(*episode, spread, draws, (recordings.state[other], recordings.action[other]))
        episodes.append(episode)
    length = np.array([len(action) for _, action in episodes])
    frame = np.concatenate([np.arange(size) for size in length])
    return replace(
        recordings,
        state=np.concatenate([state for state, _ in episodes]),
        action=np.concatenate([action for _, action in episodes]).astype(np.float32),
        finite=np.ones(len(frame), bool),
        index=np.arange(len(frame)),
        frame=frame,
        episode=np.repeat(np.arange(count), length),
        timestamp=frame / recordings.fps,
        length=length,
    ), bad


def measure(spoiled: Recordings, bad: np.ndarray, name: str, seed: int) -> dict[str, object]:
    """AUC by episode, flagged episodes and processor seconds of one fault, for the episodes (episodes,) that have it."""
    began = time.process_time()
    answers, _ = ask_all(spoiled, [question() for question in QUESTIONS], FitSettings(progress=False), spoiled.task)
    window = int(np.clip(round(spoiled.fps * 0.5), 8, 32))
    found = judge(spoiled, answers, spoiled.task, false_alarms=0.01, weight_min=0.02, window=window)
    seconds = time.process_time() - began
    weight = spoiled.means(found.weight[:, None])[:, 0]
    return {
        "dataset": spoiled.name,
        "fault": name,
        "seed": seed,
        "auc": round(float(roc_auc_score(bad, -found.worst)), 4) if bad.any() else None,
        "bad": int(bad.sum()),
        "flagged_bad": int(found.flagged[bad].sum()),
        "good": int((~bad).sum()),
        "flagged_good": int(found.flagged[~bad].sum()),
        "flagged_in_part": int((found.flagged & (weight > 0.021)).sum()),
        "frames_per_cpu_second": round(len(spoiled) / seconds),
    }


def main() -> None:
    """Measure every fault on every dataset and seed; what is in the file already is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="+", required=True, help="folders or Hub ids of recordings taken to be good")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of the injected faults")
    parser.add_argument("--results", type=Path, default=Path("results/inspection.json"), help="JSON file of all rows")
    options = parser.parse_args()
    rows = json.loads(options.results.read_text())["runs"] if options.results.exists() else []
    done = {(row["dataset"], row["fault"], row["seed"]) for row in rows}
    for source in options.dataset:
        recordings = read_recordings(source)
        recorded = truth_path(Path(source)).is_file()
        cases = [(AS_RECORDED, 0)] if recorded else [(fault, seed) for seed in options.seeds for fault in FAULTS]
        for fault, seed in cases:
            if (recordings.name, fault, seed) in done:
                continue
            if recorded:
                spoiled, bad = recordings, load_truth(Path(source)).corrupted
            else:
                spoiled, bad = inject(recordings, FAULTS[fault], seed)
            rows.append(measure(spoiled, bad, fault, seed))
            print(json.dumps(rows[-1]), flush=True)
            options.results.write_text(json.dumps({"command": COMMAND, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
