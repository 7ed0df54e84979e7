"""The benchmark's data: expert recordings made once, and from them a dataset for every condition and seed.

    recordings = record_benchmark("state", STATE_TASKS, per_task=50, first_seed=1000, operators=("expert", "sloppy"))
    recordings = save_recordings(folder / "recordings", recordings)
    write_condition(folder / "noise-0", "state", "noise", seed=0, recordings=recordings)

What was done to which episode lies beside each dataset, in ``<folder>.truth.json``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.corruption.recordings import (
    CHANNELS,
    EXPERT,
    SLOPPY,
    Recordings,
    SloppyOperator,
    episode_sources,
    load_recordings,
    operator_record,
    record_benchmark,
    save_recordings,
    simulator_versions,
)
from benchmarks.fast_writer import VideoSource, write_frames
from faults import PAPER_SHARES, CorruptionPlan, draw_episodes
from ptr_hf.data.demonstrations import CLEAN, Truth, save_truth
from ptr_hf.envs.metaworld import FPS
from ptr_hf.envs.metaworld_tasks import PUCK_TASKS, Track, task_instruction

__all__ = [
    "CONDITIONS",
    "EXPERT",
    "SLOPPY",
    "Condition",
    "Recordings",
    "SloppyOperator",
    "load_recordings",
    "record_benchmark",
    "save_recordings",
    "similar_tasks",
    "write_condition",
]

SCENES = (PUCK_TASKS, ("faucet-open-v3", "faucet-close-v3"), ("button-press-v3", "handle-press-v3"))


@dataclass(frozen=True)
class Condition:
    """What is wrong with the data of one condition.

    Args:
        name: of the condition.
        description: one line for a table.
        shares: kind of corruption -> share of the episodes.
        parameters: kind -> its severity, as keyword arguments of :func:`faults.corrupt`.
        overlapping: kinds are drawn independently, so that an episode may get several.
        sloppy: share of the episodes that come from the sloppy operator.
        few: track -> tasks with only ``few_demonstrations``, which stay clean; the shares are of all other episodes.
        few_demonstrations: of each of those tasks.
    """

    name: str
    description: str
    shares: Mapping[str, float] = field(default_factory=dict)
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    overlapping: bool = False
    sloppy: float = 0.0
    few: Mapping[Track, tuple[str, ...]] = field(default_factory=dict)
    few_demonstrations: int = 8

    def with_severity(self, **parameters: Mapping[str, Any]) -> "Condition":
        """The same condition at another severity, such as ``with_severity(noise={"std": 0.4})``."""
        merged = {kind: {**self.parameters.get(kind, {}), **values} for kind, values in parameters.items()}
        return replace(self, parameters={**self.parameters, **merged})


_NOISE: dict[str, dict[str, Any]] = {"noise": {"std": 0.4, "bounds": (-1.0, 1.0)}}
CONDITIONS: dict[str, Condition] = {
    condition.name: condition
    for condition in (
        Condition(CLEAN, "nothing is wrong"),
        Condition("noise", "30 %: noise on every action", {"noise": PAPER_SHARES["noise"]}, _NOISE),
        Condition("truncation", "25 %: cut to 40-70 %", {"truncation": PAPER_SHARES["truncation"]}),
        Condition(
            "instruction",
            "20 %: another instruction of the same scene",
            {"wrong_instruction": PAPER_SHARES["wrong_instruction"]},
        ),
        Condition(
            "combined", "noise, truncation and instruction, independently", PAPER_SHARES, _NOISE, overlapping=True
        ),
        Condition("convention", "25 %: x and y axes flipped", {"wrong_convention": 0.25}),
        Condition("delay", "30 %: actions written down 8 steps late", {"delay": 0.30}, {"delay": {"steps": 8}}),
        Condition("zeroed", "30 %: actions lost", {"zeroed": 0.30}),
        Condition("scaled", "25 %: actions at 0.3 of their size", {"scaled": 0.25}, {"scaled": {"factor": 0.3}}),
        Condition(
            "minority",
            "two tasks with 8 demonstrations; of the others 25 % with flipped axes",
            {"wrong_convention": 0.25},
            few={"state": ("push-left", "push-right"), "pixels": ("faucet-open-v3", "faucet-close-v3")},
        ),
        Condition("sloppy", "30 %: by an operator who wavers and pauses", sloppy=0.30),
    )
}


def write_condition(
    folder: Path,
    track: Track,
    condition: str | Condition,
    seed: int,
    recordings: Recordings,
    per_task: int | None = None,
    overwrite: bool = False,
) -> Truth:
    """Writes the dataset of a condition in ``folder``, and the truth beside it.

    Args:
        folder: of the dataset.
        track: of the recordings.
        condition: a name in :data:`CONDITIONS`, or one of another severity.
        seed: decides which episodes are corrupted, and every draw inside a corruption.
        recordings: as stored by :func:`save_recordings`.
        per_task: demonstrations of every task; all that were recorded if None.
        overwrite: replaces an existing dataset.

    Raises:
        ValueError: for an unknown condition, recordings of the other track, too few of them, or images still in memory.
        FileExistsError: if the folder exists and ``overwrite`` is False.
    """
    condition = _condition(condition)
    if recordings.track != track:
        raise ValueError(f"These are recordings of the track '{recordings.track}'; '{track}' was asked for.")
    if track == "pixels" and recordings.folder is None:
        raise ValueError("Store recordings with images first; save_recordings returns them ready for this.")
    few = condition.few.get(track, ())
    if missing := sorted(set(few) - set(recordings.tasks)):
        raise ValueError(f"The condition '{condition.name}' needs recordings of {', '.join(missing)}.")
    chosen = recordings.of(EXPERT, per_task, dict.fromkeys(few, condition.few_demonstrations))
    instructions = [recordings.items[index].episode.task for index in chosen]
    if condition.sloppy:
        counterpart = {recordings.start(index): index for index in recordings.of(SLOPPY)}
        for place in draw_episodes(instructions, condition.sloppy, seed):
            chosen[place] = counterpart[recordings.start(chosen[place])]
    items = [recordings.items[index] for index in chosen]
    plan = CorruptionPlan(
        shares=condition.shares,
        seed=seed,
        parameters=condition.parameters,
        alternatives=similar_tasks(recordings.tasks),
        overlapping=condition.overlapping,
    )
    exposed = [place for place, item in enumerate(items) if item.environment not in few]
    episodes = [item.episode for item in items]
    records = {
        place: [operator_record(place, item, recordings.operators[index])]
        for place, (item, index) in enumerate(zip(items, chosen, strict=True))
    }
    applied = plan.apply([episodes[place] for place in exposed], [instructions[place] for place in exposed])
    for place, (episode, truths) in zip(exposed, applied, strict=True):
        episodes[place] = episode
        done = [replace(truth, episode_index=place) for truth in truths if truth.kind != CLEAN]
        if done:
            records[place] = [record for record in records[place] if record.kind != CLEAN] + done
    write_frames(
        folder,
        episodes,
        FPS,
        names=CHANNELS,
        robot_type="sawyer",
        videos=VideoSource(recordings.folder, chosen) if track == "pixels" and recordings.folder is not None else None,
        overwrite=overwrite,
    )
    truth = Truth(
        tuple(record for each in records.values() for record in each),
        episode_sources(items),
        _described(condition, plan),
    )
    save_truth(folder, truth)
    return truth


def similar_tasks(tasks: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """instruction -> the instructions that would fit the same scene; all others for a task alone in its scene."""
    known = {task: task_instruction(task) for task in tasks}
    alternatives: dict[str, tuple[str, ...]] = {}
    for task, words in known.items():
        scene = next((scene for scene in SCENES if task in scene), ())
        others = [known[other] for other in known if other in scene and other != task]
        alternatives[words] = tuple(others or (other for other in known.values() if other != words))
    return alternatives


def _condition(condition: str | Condition) -> Condition:
    if isinstance(condition, Condition):
        return condition
    if condition not in CONDITIONS:
        raise ValueError(f"There is no condition '{condition}'; the known ones are {', '.join(CONDITIONS)}.")
    return CONDITIONS[condition]


def _described(condition: Condition, plan: CorruptionPlan) -> dict[str, Any]:
    return {
        "condition": condition.name,
        "description": condition.description,
        "seed": plan.seed,
        "shares": dict(condition.shares),
        "parameters": {kind: dict(values) for kind, values in condition.parameters.items()},
        "overlapping": condition.overlapping,
        "sloppy": condition.sloppy,
        "versions": simulator_versions(),
    }
