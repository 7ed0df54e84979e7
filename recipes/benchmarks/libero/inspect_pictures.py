"""What an inspection finds of LIBERO's failed attempts, without pictures, with them, and by the question that finds them.

    python recipes/benchmarks/libero/inspect_pictures.py --dataset data/object data/object_states

The datasets are those of record_libero.py with their truth beside them; `--looks 32` is enough. It also counts what is flagged
where the clean episodes are alone, and where one of three of a task's failed attempts is left. Runs without LIBERO. Rows are
added to the file.
"""

import argparse
import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from ptr_hf.data.datasets import dataset_metadata
from ptr_hf.data.demonstrations import load_truth
from ptr_hf.scoring.crossfit import FitSettings
from ptr_hf.scoring.image_constancy import ImageConstancy
from ptr_hf.scoring.image_encoders import Thumbnails
from ptr_hf.scoring.image_features import read_image_features
from ptr_hf.scoring.inspection import IMAGE_QUESTIONS, IMAGES_PER_EPISODE, QUESTIONS, ask_all
from ptr_hf.scoring.question import Answer, Question
from ptr_hf.scoring.recordings import Recordings, read_recordings
from ptr_hf.scoring.verdicts import judge

COMMAND = "python recipes/benchmarks/libero/inspect_pictures.py --dataset"
SETTINGS = FitSettings(progress=False)
DRAWS = 1000
"""Of the bootstrap: episodes with replacement, good and bad ones of every task apart."""


def kept(recordings: Recordings, frames: np.ndarray) -> Recordings:
    """Some frames (frames,) bool of the recordings alone; every episode that is left keeps its beginning."""
    episodes, episode, length = np.unique(recordings.episode[frames], return_inverse=True, return_counts=True)
    of_frame = ("state", "action", "finite", "index", "frame", "timestamp")
    seen = recordings.images
    if seen is not None:
        looked = frames[seen.rows]
        rows = (np.cumsum(frames) - 1)[seen.rows[looked]]
        small = None if seen.thumbnails is None else seen.thumbnails[looked]
        seen = replace(seen, rows=rows, values=seen.values[looked], thumbnails=small)
    return replace(
        recordings,
        **{name: getattr(recordings, name)[frames] for name in of_frame},
        episode=episode,
        episode_index=recordings.episode_index[episodes],
        length=length,
        task=recordings.task[episodes],
        images=seen,
    )


def measured(recordings: Recordings, answers: dict[Question, Answer], bad: np.ndarray) -> dict[str, object]:
    """AUC by episode, its standard error by bootstrap, the AUC of each task, and what is flagged at 1 %."""
    window, tasks = int(np.clip(round(recordings.fps * 0.5), 8, 32)), np.unique(recordings.task)
    found = judge(recordings, answers, recordings.task, false_alarms=0.01, weight_min=0.02, window=window)
    auc: dict[str, object] = {"auc": "", "se": "", "auc_by_task": ""}
    if bad.any():
        draws = np.random.default_rng(0)
        strata = [np.flatnonzero((recordings.task == task) & (bad == kind)) for task in tasks for kind in (False, True)]
        drawn = [np.concatenate([draws.choice(own, len(own)) for own in strata]) for _ in range(DRAWS)]
        by_task = [roc_auc_score(bad[recordings.task == task], -found.worst[recordings.task == task]) for task in tasks]
        auc = {
            "auc": round(float(roc_auc_score(bad, -found.worst)), 3),
            "se": round(float(np.std([roc_auc_score(bad[rows], -found.worst[rows]) for rows in drawn])), 3),
            "auc_by_task": " ".join(f"{value:.2f}" for value in by_task),
        }
    return auc | {
        "bad": int(bad.sum()),
        "flagged_bad": int(found.flagged[bad].sum()),
        "good": int((~bad).sum()),
        "flagged_good": int(found.flagged[~bad].sum()),
    }


def rows_of(recordings: Recordings, bad: np.ndarray) -> Iterator[dict[str, object]]:
    """Of one dataset: all questions without pictures, with them, and one alone."""
    plain = replace(recordings, images=None)
    answers, _ = ask_all(plain, [question() for question in QUESTIONS], SETTINGS, plain.task)
    yield {"questions": "all, no picture"} | measured(plain, answers, bad)
    if recordings.images is None:
        return
    asked = [question() for question in QUESTIONS + IMAGE_QUESTIONS]
    answers, _ = ask_all(recordings, asked, SETTINGS, recordings.task)
    yield {"questions": "all, thumbnails"} | measured(recordings, answers, bad)
    alone: dict[Question, Answer] = {
        question: answer for question, answer in answers.items() if isinstance(question, ImageConstancy)
    }
    yield {"questions": "image_constancy"} | measured(recordings, alone, bad)


def main() -> None:
    """Measure every dataset; what is in the file already is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="+", type=Path, required=True, help="folders with their truth beside them")
    parser.add_argument(
        "--results", type=Path, default=Path("results/libero_pictures.csv"), help="CSV file of all rows"
    )
    options = parser.parse_args()
    rows = list(csv.DictReader(options.results.open())) if options.results.exists() else []
    for source in options.dataset:
        truth = load_truth(source)
        recordings = read_recordings(str(source))
        if dataset_metadata(str(source)).camera_keys:
            seen = read_image_features(str(source), recordings, Thumbnails(), per_episode=IMAGES_PER_EPISODE)
            recordings = replace(recordings, images=seen)
        clean = ~truth.corrupted[recordings.episode]
        few = ~truth.corrupted | (np.cumsum(truth.corrupted) % 3 == 1)
        cases = {
            "all": np.ones(len(recordings), bool),
            "a third of the bad": few[recordings.episode],
            "clean alone": clean,
        }
        for case, frames in cases.items():
            if any(row["dataset"] == source.name and row["episodes"] == case for row in rows):
                continue
            part = kept(recordings, frames)
            for row in rows_of(part, truth.corrupted[part.episode_index]):
                rows.append({"dataset": source.name, "episodes": case} | row | {"command": f"{COMMAND} {source.name}"})
                print(*rows[-1].values(), flush=True)
            with options.results.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[-1]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
