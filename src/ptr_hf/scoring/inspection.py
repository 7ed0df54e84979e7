"""Inspect datasets before training: ask every question of all episodes, calibrate, and weigh (ours; docs/inspection.md)."""

import hashlib
import importlib.metadata
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from ptr_hf.scoring.action_from_consequence import ActionFromConsequence
from ptr_hf.scoring.calibration import LEAST_TO_JUDGE, judged_within, standard
from ptr_hf.scoring.companions import Frozen, Idleness, Jumps, Roughness, Timing
from ptr_hf.scoring.completeness import Completeness
from ptr_hf.scoring.consequence_from_action import ConsequenceFromAction
from ptr_hf.scoring.crossfit import CrossFit, FitSettings, Reweigh
from ptr_hf.scoring.dataset_scores import DatasetScores
from ptr_hf.scoring.image_constancy import ImageConstancy
from ptr_hf.scoring.image_motion import ImageMotion
from ptr_hf.scoring.instruction import InstructionFromEpisode
from ptr_hf.scoring.on_disk import on_disk
from ptr_hf.scoring.question import Answer, CannotAskError, Question
from ptr_hf.scoring.recordings import TASK_GROUP, Recordings, read_recordings, sources_of
from ptr_hf.scoring.state_from_image import StateFromImage
from ptr_hf.scoring.verdicts import Verdicts, judge

QUESTIONS: tuple[type[Question], ...] = (
    ActionFromConsequence,
    ConsequenceFromAction,
    InstructionFromEpisode,
    Completeness,
    Roughness,
    Idleness,
    Jumps,
    Frozen,
    Timing,
)
"""What is asked, in the order of the columns."""
IMAGE_QUESTIONS: tuple[type[Question], ...] = (StateFromImage, ImageMotion, ImageConstancy)
"""What is asked after them where pictures were looked at."""
IMAGES_PER_EPISODE = 32
FALSE_ALARMS, WEIGHT_MIN = 0.01, 0.02
WINDOW_SECONDS, WINDOW_FRAMES = 0.5, (8, 32)
WIDER = 3.0
"""Standard deviation of an action channel over all frames, by that over the frames that weigh 1, from which a note says so."""


def inspect_dataset(
    dataset: Any,
    *,
    episodes: Sequence[int] | None = None,
    revision: str | None = None,
    false_alarms: float = FALSE_ALARMS,
    weight_min: float = WEIGHT_MIN,
    group: str = TASK_GROUP,
    questions: Sequence[str] | None = None,
    policy: Any = None,
    images_per_episode: int = IMAGES_PER_EPISODE,
    max_frames: int = 100_000,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
    several_processes: bool = False,
) -> DatasetScores:
    """Find the bad demonstrations of a dataset, from its states, actions and instructions; video is read if you ask for it alone.

    Args:
        dataset: Hub id, local folder, open LeRobotDataset or StreamingLeRobotDataset; a list of these, or a mixture
            (`MixtureConfig`, dict, or YAML file; streaming or not), of which each dataset is inspected by itself.
        episodes: a subset of a single dataset's.
        revision: of a Hub dataset.
        false_alarms: share of good episodes that may be flagged, in (0, 0.5].
        weight_min: weight of flagged frames, in [0, 1].
        group: within what episodes are compared: "task", "none", or an episode column (operator, source, ...).
        questions: names of those to ask; None asks all of `QUESTIONS`, and with a policy those of `IMAGE_QUESTIONS`.
        policy: look at pictures too, encoded by the frozen vision tower of this policy: a folder, a Hub id, or a loaded LeRobot
            or PTR policy; "thumbnails" needs none, and "transformers:" before a folder or Hub id names a vision model. Videos
            of a Hub dataset are fetched. What was encoded is kept in the Hugging Face cache, so that a second inspection
            decodes nothing. None looks at no picture.
        images_per_episode: frames of an episode that are looked at with a policy, evenly from its first to its last; at least 2.
        max_frames: the networks learn from at most so many frames; all are scored.
        seed: of folds and networks; the same seed gives the same scores on one machine.
        device: where the networks are fitted, e.g. "cuda"; None takes the GPU if there is one.
        progress: show progress bars.
        several_processes: deal the questions to the processes of `accelerate launch` or torchrun. All of them have to call this
            with the same arguments, and all get the same scores; one alone should save them.

    Returns:
        scores, weights and reasons of every frame and episode.

    Raises:
        ValueError: a value is out of range, a dataset cannot be read or has no actions, or pictures are asked for where there is
            no camera or the policy sees none; the sentence names it.

    Example:
        >>> scores = inspect_dataset("me/my_demos")
        >>> scores.flagged[["episode_index", "z", "reason"]]
    """
    if not 0 < false_alarms <= 0.5:
        raise ValueError(f"false_alarms={false_alarms} is out of range: it must be above 0 and at most 0.5.")
    if not 0 <= weight_min <= 1:
        raise ValueError(f"weight_min={weight_min} is out of range: it must be between 0 and 1.")
    if images_per_episode < 2:
        raise ValueError(f"images_per_episode={images_per_episode} is out of range: it must be 2 or more.")
    asked = _chosen(questions, policy is not None)
    sources, several = sources_of(dataset)
    if several and (episodes is not None or revision is not None):
        raise ValueError("episodes and revision are of a single dataset; give a mixture's sources their own.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    fit = FitSettings(max_frames=max_frames, seed=seed, device=device, progress=progress)
    encoder = None
    if policy is not None:
        from ptr_hf.scoring.image_encoders import image_encoder
        from ptr_hf.scoring.image_features import colour_cameras, read_image_features

        for source in sources:
            colour_cameras(source, revision)
        encoder = image_encoder(policy, device)
    parts = []
    for source in sources:
        with _main_process_first() if several_processes else nullcontext():
            recordings = read_recordings(source, episodes=episodes, revision=revision)
            if encoder is not None:
                seen = read_image_features(
                    source,
                    recordings,
                    encoder,
                    per_episode=images_per_episode,
                    episodes=episodes,
                    revision=revision,
                    progress=progress,
                )
                recordings = replace(recordings, images=seen)
        parts.append(_inspect(recordings, asked, fit, group, false_alarms, weight_min, several_processes))
    settings = {
        "false_alarms": false_alarms,
        "weight_min": weight_min,
        "group": group,
        "seed": seed,
        "max_frames": max_frames,
        "questions": {question.name: question.title for question in asked},
        "window_frames": [part.settings["window"] for part in parts],
        "datasets": [part.settings["dataset"] for part in parts],
        "versions": {name: importlib.metadata.version(name) for name in ("lerobot", "torch", "numpy")},
    }
    if encoder is not None:
        settings["images"] = {"encoder": encoder.name, "per_episode": images_per_episode}
    if not several:
        return DatasetScores(parts[0].chunks, parts[0].episodes, settings, parts[0].notes)
    for number, part in enumerate(parts):
        part.chunks["source"] = number
        part.episodes["source"] = number
    return DatasetScores(
        _together([part.chunks for part in parts]),
        pd.concat([part.episodes for part in parts], ignore_index=True),
        settings,
        tuple(f"{part.settings['dataset']['repo_id']}: {note}" for part in parts for note in part.notes),
    )


def ask_all(
    recordings: Recordings,
    questions: Sequence[Question],
    fit: FitSettings,
    group: np.ndarray,
    several_processes: bool = False,
) -> tuple[dict[Question, Answer], list[str]]:
    """Ask the questions of one dataset.

    Args:
        recordings: of the dataset.
        questions: to ask.
        fit: settings of the networks.
        group: (episodes,) within which trust is found.
        several_processes: as of `inspect_dataset`.

    Returns:
        the answers, and a sentence for every question that could not be asked.
    """
    reweigh = trust_within(judged_within(group))
    cross = CrossFit(recordings, fit)

    def ask(question: Question) -> Answer | str:
        try:
            return question.ask(cross, reweigh)
        except CannotAskError as error:
            return f"Not asked: {question.title} ({error})"

    if several_processes:
        from ptr_hf.scoring.ranks import asked_by_all

        told = asked_by_all(questions, ask, recordings)
    else:
        told = [ask(question) for question in questions]
    answers = {one: answer for one, answer in zip(questions, told, strict=True) if isinstance(answer, Answer)}
    return answers, [answer for answer in told if isinstance(answer, str)]


def _main_process_first() -> AbstractContextManager[None]:
    from accelerate import PartialState

    return PartialState().main_process_first()


def trust_within(group: np.ndarray) -> Reweigh:
    """How much to learn from an episode: σ(2 (z + 3)) of its worst part or, if that is lower, of all its parts together."""

    def trust(scores: np.ndarray) -> np.ndarray:
        spread = standard(scores, group, np.ones(len(scores), bool))
        z = np.nan_to_num(spread.z(scores))
        lowest = np.minimum(z.min(axis=1), z.mean(axis=1) * np.sqrt(z.shape[1]))
        return 1 / (1 + np.exp(-2 * (lowest.clip(-20, 20) + 3)))

    return trust


def _inspect(
    recordings: Recordings,
    questions: Sequence[Question],
    fit: FitSettings,
    group_name: str,
    false_alarms: float,
    weight_min: float,
    several_processes: bool,
) -> DatasetScores:
    group = recordings.group(group_name)
    episodes = len(recordings.length)
    answers: dict[Question, Answer] = {}
    notes: list[str] = []
    if recordings.finite.any():
        answers, notes = ask_all(recordings, questions, fit, group, several_processes)
    window = int(np.clip(round(recordings.fps * WINDOW_SECONDS), *WINDOW_FRAMES))
    verdicts = judge(recordings, answers, group, false_alarms=false_alarms, weight_min=weight_min, window=window)
    if episodes < LEAST_TO_JUDGE:
        notes.insert(
            0,
            f"Too few episodes to judge: {episodes}, and it takes {LEAST_TO_JUDGE} to know what is usual. All weights are 1.",
        )
    elif alone := int((judged_within(group) < 0).sum()):
        notes.append(f"{alone} episodes have too few others of their {group_name} to be judged by; they weigh 1.")
    if not answers:
        notes.append("No question could be asked: nothing is known of these episodes, and they weigh 1.")
    if not recordings.finite.all():
        broken = recordings.episode_index[~recordings.over(recordings.finite, np.logical_and.reduceat)]
        notes.append(
            f"{len(recordings) - int(recordings.finite.sum())} frames hold NaN or Inf, in {len(broken)} episodes (first: "
            f"{broken[0]}); they are not scored, and training leaves out the samples that read them."
        )
    notes += widened(recordings, verdicts.weight)
    chunks, rows = _tables(recordings, verdicts, list(answers), questions)
    return DatasetScores(chunks, rows, {"window": window, "dataset": _identity(recordings)}, tuple(notes))


def widened(recordings: Recordings, weight: np.ndarray) -> list[str]:
    """A sentence where bad frames decide what training normalises actions by: good actions then hardly differ from one another.

    Args:
        recordings: what was inspected.
        weight: (frames,) of the inspection.
    """
    if weight.min(initial=1) == 1:
        return []

    def of(good: bool) -> np.ndarray:
        def kept(span: slice) -> np.ndarray:
            known = recordings.finite[span] & ((weight[span] == 1) | (not good))
            return np.where(known[:, None], recordings.action[span], np.nan)

        return recordings.deviation(kept)

    of_all, of_good = of(good=False), of(good=True)
    wide = np.flatnonzero((of_good > 0) & (of_all > WIDER * of_good))
    if not len(wide):
        return []
    most = wide[np.argmax(of_all[wide] / of_good[wide])]
    names = ", ".join(recordings.action_names[channel] for channel in wide)
    return [
        f"The flagged frames widen the standard deviation of action {names}, up to {of_all[most] / of_good[most]:.0f} times "
        f"({of_all[most]:.3g} for {of_good[most]:.3g}), and training normalises by it: leave the flagged episodes out, or keep "
        "the statistics of the policy that you start from (--statistics policy)."
    ]


def _tables(
    recordings: Recordings, verdicts: Verdicts, answered: Sequence[Question], asked: Sequence[Question]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`chunks`, whose columns are `on_disk`, and `episodes` of `DatasetScores`; NaN where a question could not be asked."""
    known, names = [question.name for question in answered], [question.name for question in asked]
    nothing, worst = (on_disk((len(recordings),), np.float32) for _ in range(2))
    nothing[:] = np.nan
    curves = {name: verdicts.curves[:, known.index(name)] if name in known else nothing for name in names}
    episode = on_disk((len(recordings),), recordings.episode_index.dtype)
    for _, span in recordings.blocks:
        episode[span] = recordings.episode_index[recordings.episode[span]]
        worst[span] = np.fmin.reduce([nothing[span], *(curve[span] for curve in curves.values())])
    of_frame = {"index": recordings.index, "episode_index": episode, "frame_index": recordings.frame}
    of_episode = {
        "episode_index": recordings.episode_index,
        "weight": recordings.means(verdicts.weight[:, None])[:, 0],
        "z": verdicts.worst,
        "reason": verdicts.reasons,
    }
    z = pd.DataFrame(verdicts.z, columns=known).reindex(columns=names)
    task = [recordings.instructions[task] for task in recordings.task]
    return (
        pd.DataFrame(of_frame | curves | {"z": worst, "weight": verdicts.weight}, copy=False),
        pd.DataFrame(of_episode).join(z).assign(task=task, frames=recordings.length),
    )


def _together(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The rows of all tables, whose columns are `on_disk`."""
    ends = np.cumsum([len(part) for part in parts])
    columns = {name: on_disk((int(ends[-1]),), dtype) for name, dtype in parts[0].dtypes.items()}
    for part, end in zip(parts, ends, strict=True):
        for name, values in columns.items():
            values[end - len(part) : end] = part[name]
    return pd.DataFrame(columns, copy=False)


def _identity(recordings: Recordings) -> dict[str, Any]:
    """What dataset was inspected: counts, and a digest of what was read."""
    digest = hashlib.sha256()
    for values in (recordings.index, recordings.episode_index, recordings.length, recordings.state, recordings.action):
        digest.update(np.ascontiguousarray(values).data)
    digest.update("\n".join(recordings.instructions).encode())
    digest.update(recordings.task.tobytes())
    return {
        "repo_id": recordings.name,
        "revision": recordings.revision,
        "frames": len(recordings),
        "episodes": len(recordings.length),
        "fingerprint": digest.hexdigest(),
    }


def _chosen(names: Sequence[str] | None, looks: bool) -> list[Question]:
    """The questions of these names, or all: those about pictures only where somebody looks."""
    known = {question.name: question for question in QUESTIONS + (IMAGE_QUESTIONS if looks else ())}
    for name in names or ():
        if name not in known:
            if any(name == question.name for question in IMAGE_QUESTIONS):
                raise ValueError(
                    f"The question {name!r} is about pictures: give a policy to look at them with, or 'thumbnails'."
                )
            raise ValueError(f"There is no question {name!r}; there are {', '.join(known)}.")
    return [known[name]() for name in (known if names is None else names)]
