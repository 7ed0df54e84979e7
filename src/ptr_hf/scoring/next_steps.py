"""What to do with what an inspection found: a recommendation, commands to copy, lists of episodes, and a summary for programs."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ptr_hf.report.files import replacing
from ptr_hf.scoring.dataset_scores import CHUNKS_FILE, EPISODES_FILE, SETTINGS_FILE, DatasetScores

KEEP_FILE, EXCLUDE_FILE, PAGE_FILE = "keep.txt", "exclude.txt", "ptr_scores.html"
MAJORITY = 0.4
"""Where a larger share is flagged, nobody can tell which side is the right one."""


@dataclass(frozen=True)
class Recommendation:
    """What a user is told first.

    Attributes:
        kind: "train", "nothing", "chance", "majority" or "unjudged".
        headline: a few words.
        sentence: what to do, and why.
    """

    kind: str
    headline: str
    sentence: str


@dataclass(frozen=True)
class Command:
    """A command line to copy, and what it does."""

    does: str
    line: str


def recommendation(scores: DatasetScores) -> Recommendation:
    """What to do with a dataset that was inspected."""
    flagged, episodes = len(scores.flagged), len(scores.episodes)
    if any("Too few episodes to judge" in note for note in scores.notes) and not flagged:
        return Recommendation("unjudged", "Too few episodes to judge", "Every weight is 1: train plainly.")
    if not flagged:
        return Recommendation(
            "nothing",
            "Nothing to gain here",
            f"None of {episodes} episodes stands out in any question: train plainly. Every weight is 1.",
        )
    found = f"{flagged} of {episodes} episodes look bad"
    if flagged > MAJORITY * episodes:
        return Recommendation(
            "majority",
            found,
            "A large part of the data differs from the rest, and nothing in the data says which side is right. Look at the "
            "episodes below before you weigh or exclude any.",
        )
    expected = scores.settings["false_alarms"] * episodes
    if flagged <= max(1.0, 2 * expected) and scores.flagged["z"].min() > -4.0:
        return Recommendation(
            "chance",
            found,
            f"About {expected:.1f} good episodes are expected among the flagged ones, so this may be chance. Look at them; "
            "training plainly is fine.",
        )
    return Recommendation(
        "train",
        found,
        f"Train with the weights, which move {scores.moved:.1%} of the weight away from flagged frames, or exclude "
        f"{len(scores.excluded)} episodes and train as usual. Look at the worst ones first.",
    )


def excluded_episodes(scores: DatasetScores, source: int | None = None) -> list[int]:
    """Numbers of the episodes to exclude, ascending: those that are bad from end to end."""
    return _numbers(scores.excluded, source)


def kept_episodes(scores: DatasetScores, source: int | None = None) -> list[int]:
    """Numbers of the others, ascending."""
    out = set(excluded_episodes(scores, source))
    return [number for number in _numbers(scores.episodes, source) if number not in out]


def commands(scores: DatasetScores, sources: Sequence[str], folder: Path, mixture: str | None = None) -> list[Command]:
    """The command lines that come next.

    Args:
        scores: of these datasets.
        sources: as the user named them.
        folder: where the scores lie.
        mixture: the YAML file that named them.
    """
    found: list[Command] = []
    if scores.flagged.empty:
        return found
    weights = shlex.quote(str(folder / CHUNKS_FILE))
    if mixture is not None or len(sources) == 1:
        own = f"--dataset {shlex.quote(sources[0])}" if mixture is None else f"--mixture {shlex.quote(mixture)}"
        found.append(
            Command(
                "Train with the weights",
                f"ptr-train --policy_path lerobot/smolvla_base {own} --weights {weights} --output_dir out",
            )
        )
    if mixture is None and len(sources) == 1:
        found.append(
            Command(
                "The same in LeRobot's own loop",
                "lerobot-train --policy.type=ptr --policy.base_path=lerobot/smolvla_base --policy.push_to_hub=false "
                f"{_lerobot_names(sources[0], 'dataset.', '=')} --policy.weights={weights}",
            )
        )
    for number, source in enumerate(sources):
        of = None if len(sources) == 1 else number
        out, kept = excluded_episodes(scores, of), kept_episodes(scores, of)
        if not out or not kept:
            continue
        name = scores.settings["datasets"][number]["repo_id"]
        found.append(
            Command(
                f"Write a copy of {name} without {len(out)} episodes",
                f"lerobot-edit-dataset {_lerobot_names(source, '', ' ')} {_copy_names(source, name)} "
                f"--operation.type delete_episodes --operation.episode_indices {json.dumps(json.dumps(out))}",
            )
        )
        found.append(
            Command(
                f"Train any LeRobot policy on the other {len(kept)} episodes of {name}",
                f"lerobot-train --policy.type=act --policy.push_to_hub=false {_lerobot_names(source, 'dataset.', '=')} "
                f"--dataset.episodes={json.dumps(json.dumps(kept, separators=(',', ':')))}",
            )
        )
    return found


def write_lists(scores: DatasetScores, folder: Path) -> None:
    """Write keep.txt and exclude.txt: an episode a line; "dataset:episode", both numbers, where there are several datasets."""
    several = "source" in scores.episodes
    for name, numbers in ((KEEP_FILE, kept_episodes), (EXCLUDE_FILE, excluded_episodes)):
        if several:
            sources = sorted(scores.episodes["source"].unique().tolist())
            lines = [f"{source}:{number}" for source in sources for number in numbers(scores, source)]
        else:
            lines = [str(number) for number in numbers(scores)]
        with replacing(folder / name) as path:
            path.write_text("".join(f"{line}\n" for line in lines))


def summary(scores: DatasetScores, folder: Path, page: bool) -> dict[str, Any]:
    """What was found, for programs: JSON values alone."""
    said = recommendation(scores)
    columns = [
        name for name in ("source", "episode_index", "z", "weight", "reason", "task") if name in scores.flagged.columns
    ]
    files = [CHUNKS_FILE, EPISODES_FILE, SETTINGS_FILE, KEEP_FILE, EXCLUDE_FILE, *([PAGE_FILE] if page else ())]
    return {
        "datasets": list(scores.settings["datasets"]),
        "episodes": len(scores.episodes),
        "frames": len(scores.chunks),
        "flagged": scores.flagged[columns].to_dict(orient="records"),
        "exclude": scores.excluded[columns[: columns.index("z")]].to_dict(orient="records"),
        "weight_moved": scores.moved,
        "recommendation": {"kind": said.kind, "headline": said.headline, "sentence": said.sentence},
        "notes": list(scores.notes),
        "files": [str(folder / name) for name in files],
    }


def _numbers(episodes: pd.DataFrame, source: int | None) -> list[int]:
    rows = episodes if source is None else episodes[episodes["source"] == source]
    return sorted(rows["episode_index"].tolist())


def _is_folder(source: str) -> bool:
    return Path(source).is_dir()


def _lerobot_names(source: str, prefix: str, between: str) -> str:
    if not _is_folder(source):
        return f"--{prefix}repo_id{between}{shlex.quote(source)}"
    path = Path(source).resolve()
    return f"--{prefix}repo_id{between}{shlex.quote(path.name)} --{prefix}root{between}{shlex.quote(str(source))}"


def _copy_names(source: str, name: str) -> str:
    copy = f"{name}_kept"
    root = f" --new_root {shlex.quote(str(Path(source).parent / copy))}" if _is_folder(source) else ""
    return f"--new_repo_id {shlex.quote(copy)}{root}"
