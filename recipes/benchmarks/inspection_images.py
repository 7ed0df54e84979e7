"""What the inspection finds of faults that only pictures show, and what looking costs in false alarms.

    python recipes/benchmarks/inspection_images.py --seeds 0 1 2

Twenty per cent of the episodes get one fault, in memory; the dataset is not changed. Of a dataset with a truth sidecar the clean
episodes alone are used. Without --dataset these are the bundled demonstrations. Rows are added to the file.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from lerobot.datasets import LeRobotDatasetMetadata
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `episodes` and `faults` lie
from episodes import Episode
from faults import IMAGE_KINDS, corrupt
from ptr_hf.data.datasets import episode_spans, open_dataset
from ptr_hf.data.demonstrations import bundled_demonstrations, load_truth, truth_path
from ptr_hf.data.normalization import ONE_FRAME
from ptr_hf.data.pictures import pictures
from ptr_hf.policies.tiny import tiny_smolvla, write_tiny_vlm
from ptr_hf.scoring.completeness import Completeness
from ptr_hf.scoring.crossfit import FitSettings
from ptr_hf.scoring.image_encoders import THUMBNAILS, ImageEncoder, Thumbnails, image_encoder
from ptr_hf.scoring.image_features import colour_cameras, looked_at
from ptr_hf.scoring.inspection import IMAGE_QUESTIONS, IMAGES_PER_EPISODE, QUESTIONS, ask_all
from ptr_hf.scoring.question import Answer, Question
from ptr_hf.scoring.recordings import Recordings, read_recordings
from ptr_hf.scoring.seen import ImageFeatures
from ptr_hf.scoring.verdicts import judge

SHARE = 0.2
RANDOM = "random tower"
COMMAND = "python recipes/benchmarks/inspection_images.py --seeds 0 1 2"
SETTINGS = FitSettings(progress=False)


class Filmed:
    """A dataset's clean episodes with all their pictures in memory."""

    def __init__(self, source: Path) -> None:
        chosen = np.flatnonzero(~load_truth(source).corrupted).tolist() if truth_path(source).is_file() else None
        self.recordings = read_recordings(str(source), episodes=chosen)
        self.cameras = colour_cameras(str(source))
        self.features = LeRobotDatasetMetadata(source.name, root=source).features
        dataset = open_dataset(str(source), ONE_FRAME, episodes=chosen)
        self.episodes: list[Episode] = []
        for episode, first, length in episode_spans(dataset):
            rows = range(first, first + length)
            shown = {key: pictures(dataset, key, episode, rows).transpose(0, 2, 3, 1) for key in self.cameras}
            kept = {"action": self.recordings.action[rows], "state": self.recordings.state[rows]}
            self.episodes.append(Episode(kept | shown, str(self.recordings.task[len(self.episodes)])))

    def spoiled(self, kind: str, seed: int) -> tuple[list[Episode], np.ndarray]:
        """The episodes with a fault in a share of them, and which (episodes,) have it."""
        draws = np.random.default_rng([seed, 7])
        bad = np.zeros(len(self.episodes), bool)
        if kind != "clean":
            bad[draws.permutation(len(bad))[: round(SHARE * len(bad))]] = True
        episodes = list(self.episodes)
        for place in np.flatnonzero(bad).tolist():
            beside = self.episodes[place - 1 if place else 1]
            episodes[place], _ = corrupt(self.episodes[place], kind, int(draws.integers(1 << 31)), beside=beside)
        return episodes, bad

    def recorded(self, episodes: Sequence[Episode]) -> Recordings:
        """These episodes as an inspection reads them, without pictures."""
        length = np.array([episode.length for episode in episodes])
        frame = np.concatenate([np.arange(size) for size in length])
        return replace(
            self.recordings,
            state=np.concatenate([episode.frames["state"] for episode in episodes]),
            action=np.concatenate([episode.actions for episode in episodes]),
            finite=np.ones(len(frame), bool),
            index=np.arange(len(frame)),
            frame=frame,
            episode=np.repeat(np.arange(len(length)), length),
            timestamp=frame / self.recordings.fps,
            length=length,
        )

    def seen(self, episodes: Sequence[Episode], recordings: Recordings, encoder: ImageEncoder) -> Recordings:
        """The recordings with what the encoder makes of the episodes' pictures."""
        rows = looked_at(recordings, IMAGES_PER_EPISODE)
        values, thumbnails = [], []
        for place, episode in enumerate(episodes):
            own = recordings.frame[rows[recordings.episode[rows] == place]]
            shown = [episode.frames[key][own].transpose(0, 3, 1, 2) for key in self.cameras]
            encoded = [
                encoder.encode(key, number, item)
                for number, (key, item) in enumerate(zip(self.cameras, shown, strict=True))
            ]
            values.append(np.stack(encoded, axis=1).astype(np.float16))
            small = [Thumbnails().encode("", 0, item).reshape(len(own), 3, -1) for item in shown]
            thumbnails.append(np.stack(small, axis=1).astype(np.float16))
        found = ImageFeatures(
            rows,
            np.concatenate(values).astype(np.float32),
            tuple(self.cameras),
            encoder.name,
            np.concatenate(thumbnails).astype(np.float32),
        )
        return replace(recordings, images=found)


def weighed(recordings: Recordings, answers: dict[Question, Answer], bad: np.ndarray) -> dict[str, object]:
    """AUC by episode and flagged episodes."""
    window = int(np.clip(round(recordings.fps * 0.5), 8, 32))
    found = judge(recordings, answers, recordings.task, false_alarms=0.01, weight_min=0.02, window=window)
    return {
        "auc": round(float(roc_auc_score(bad, -found.worst)), 4) if bad.any() else None,
        "flagged_bad": int(found.flagged[bad].sum()),
        "flagged_good": int(found.flagged[~bad].sum()),
    }


def rows_of(
    filmed: Filmed, encoder: ImageEncoder, usual: dict[Question, Answer], kind: str, seed: int
) -> Iterator[dict]:
    """The rows of one fault: with all questions; by single ones; and without pictures.

    Faults of pictures leave what the other questions read as it is, so that these are asked once. Truncation is measured in the
    question about completeness alone.
    """
    episodes, bad = filmed.spoiled(kind, seed)
    plain = filmed.recorded(episodes)
    seen = filmed.seen(episodes, plain, encoder)
    about = {"dataset": plain.name, "encoder": encoder.name, "fault": kind, "seed": seed}
    about |= {"bad": int(bad.sum()), "good": int((~bad).sum())}
    if kind == "truncation":
        for asked, recordings in (("completeness, no picture", plain), ("completeness", seen)):
            answers, _ = ask_all(recordings, [Completeness()], SETTINGS, recordings.task)
            yield about | {"questions": asked} | weighed(recordings, answers, bad)
        return
    answers, _ = ask_all(seen, [Completeness(), *(question() for question in IMAGE_QUESTIONS)], SETTINGS, seen.task)
    others = {question: answer for question, answer in usual.items() if not isinstance(question, Completeness)}
    yield about | {"questions": "all, no picture"} | weighed(seen, usual, bad)
    yield about | {"questions": "all"} | weighed(seen, others | answers, bad)
    for question, answer in answers.items():
        yield about | {"questions": question.name} | weighed(seen, {question: answer}, bad)


def encoder_named(name: str, filmed: Filmed, folder: Path) -> ImageEncoder:
    """Thumbnails, the tower of a policy, or that of a tiny SmolVLA with random weights."""
    if name != RANDOM:
        return image_encoder(name, "cpu")
    encoder = image_encoder(tiny_smolvla(filmed.features, write_tiny_vlm(folder)), "cpu")
    encoder.name = RANDOM
    return encoder


def main() -> None:
    """Measure every fault with every dataset, encoder and seed; what is in the file already is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset", nargs="+", type=Path, default=[bundled_demonstrations()], help="folders of datasets"
    )
    parser.add_argument(
        "--policy", nargs="+", default=[THUMBNAILS, RANDOM], help="thumbnails, 'random tower', or policies"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the injected faults")
    parser.add_argument(
        "--results", type=Path, default=Path("results/inspection_images.json"), help="JSON file of all rows"
    )
    parser.add_argument(
        "--vlm_folder", type=Path, default=Path("outputs/tiny_vlm"), help="for the files of the random tower"
    )
    options = parser.parse_args()
    rows = json.loads(options.results.read_text())["runs"] if options.results.exists() else []
    done = {(row["dataset"], row["encoder"], row["fault"], row["seed"]) for row in rows}
    for source in options.dataset:
        filmed = Filmed(source)
        usual, _ = ask_all(filmed.recordings, [question() for question in QUESTIONS], SETTINGS, filmed.recordings.task)
        for name in options.policy:
            encoder = encoder_named(name, filmed, options.vlm_folder)
            cases = [("clean", 0), *((kind, seed) for kind in (*IMAGE_KINDS, "truncation") for seed in options.seeds)]
            for kind, seed in cases:
                if (filmed.recordings.name, encoder.name, kind, seed) in done:
                    continue
                found = list(rows_of(filmed, encoder, usual, kind, seed))
                rows += found
                print(*map(json.dumps, found), sep="\n", flush=True)
                options.results.write_text(json.dumps({"command": COMMAND, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
