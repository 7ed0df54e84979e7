"""Compare what a LeRobotDataset's metadata say with what its data files hold, before anything is read by it.

LeRobot finds an episode's frames by `dataset_from_index` and `dataset_to_index` of the row at the episode's place in
meta/episodes, a frame's place by its `index`, and an instruction by its row in tasks.parquet. Where one of them is off, it
reads frames of other episodes or marks recorded ones as padding, without a word. Here the data files decide: what follows
from them is set right in memory and said in a sentence each; what does not is refused, with the episode and the file named.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.io_utils import load_episodes, load_tasks
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from ptr_hf.data.frame_columns import FrameColumns, data_files, read_frame_columns

FROM, TO, LENGTH, TASKS = "dataset_from_index", "dataset_to_index", "length", "tasks"
_LEAVE_OUT = "Copy or convert the dataset anew, or open it with episodes=[...] without this one."


def mend_dataset(dataset: LeRobotDataset, known: LeRobotDatasetMetadata | None = None) -> list[str]:
    """Check an open dataset's bookkeeping against its data files, and set right in memory what they settle.

    Args:
        dataset: its metadata and its column `index` change where they were wrong; no file does.
        known: the same dataset's metadata after `mend_metadata`, which then need not be compared again.

    Returns:
        a sentence for everything that was set right; none for a dataset in order.

    Raises:
        ValueError: something is wrong that the data do not settle; the sentence names episode and file.
    """
    if known is None:
        said = mend_metadata(dataset.meta, dataset.episodes, complete=True)
    else:
        said = []
        dataset.meta.episodes, dataset.meta.tasks, dataset.meta.info = known.episodes, known.tasks, known.info
    table = dataset.hf_dataset.data
    episode, frame, index = (table.column(name).to_numpy() for name in ("episode_index", "frame_index", "index"))
    _check_rows(dataset, episode, frame)
    numbers = np.asarray(dataset.meta.episodes[FROM])[episode] + frame
    wrong = np.flatnonzero(numbers != index)
    if len(wrong):
        said.append(
            f"The column 'index' of {dataset.repo_id} does not count its frames (first in episode {episode[wrong[0]]}): "
            "they are numbered anew in memory."
        )
        _renumber(dataset, numbers)
    return said


def mend_metadata(
    meta: LeRobotDatasetMetadata,
    episodes: Sequence[int] | None = None,
    *,
    complete: bool = False,
    fixed_index: bool = False,
) -> list[str]:
    """The same for a dataset's metadata, with the data files that are on this machine.

    Args:
        meta: changed in place where it was wrong.
        episodes: those that are read; None for all.
        complete: whether the files of all these episodes should be here.
        fixed_index: whether the column `index` is used as it is, so that a wrong one is refused.
    """
    said = [*_mend_tasks(meta), *_mend_rows(meta)]
    files = data_files(Path(meta.root))
    if not files:
        if complete:
            raise ValueError(f"The dataset {meta.repo_id} cannot be read: files are missing in {meta.root}/data.")
        return said + _number_by_length(meta)
    frames = read_frame_columns(files)
    known = range(len(meta.episodes))
    chosen = list(known) if episodes is None else sorted(set(episodes) & set(known))
    runs = _runs(meta, frames, chosen, strangers=episodes is None)
    here = [episode for episode in chosen if episode in runs]
    if complete and len(here) < len(chosen):
        lacking = [episode for episode in chosen if episode not in runs]
        where = meta.get_data_file_path(lacking[0])
        raise ValueError(
            f"{_listed(lacking)} of {meta.repo_id} in meta/episodes, but no data file has frames of "
            f"{'it' if len(lacking) == 1 else 'them'} ({where} should). {_LEAVE_OUT}"
        )
    for episode in here:
        _check_frames(meta, frames, episode, runs[episode])
    said += _mend_lengths(meta, runs, here)
    if len(here) == len(meta.episodes):
        said += _number_by_place(meta, runs, len(frames))
    elif not _numbers_fit(meta, frames, runs, here):
        said += _number_by_length(meta)
    said += _mend_places(meta, frames, runs, here)
    said += _mend_instructions(meta, frames, runs, here)
    if fixed_index:
        _check_index(meta, frames, runs, here)
    return said


@dataclass(frozen=True)
class _Run:
    """Where an episode's frames lie among all."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def _check_rows(dataset: LeRobotDataset, episode: np.ndarray, frame: np.ndarray) -> None:
    """What LeRobot has loaded is what the files hold; a user may have changed it in memory."""
    length = np.asarray(dataset.meta.episodes[LENGTH])
    chosen = np.arange(len(length)) if dataset.episodes is None else np.unique(dataset.episodes)
    broken = episode[(np.diff(frame, prepend=-1) != 1) & (frame != 0)]
    short = chosen[np.bincount(episode, minlength=len(length))[chosen] != length[chosen]]
    for found in [*broken[:1], *short[:1]]:
        raise ValueError(
            f"The frames of episode {found} of {dataset.repo_id} are incomplete or out of order in the open dataset, and not in "
            "its files: it was filtered or changed in memory. Open it anew, with episodes=[...] for some of them."
        )


def _check_index(
    meta: LeRobotDatasetMetadata, frames: FrameColumns, runs: dict[int, _Run], here: Sequence[int]
) -> None:
    first = np.asarray(meta.episodes[FROM])
    for episode in here:
        run = runs[episode]
        if not np.array_equal(frames.index[run.start : run.stop], first[episode] + np.arange(run.length)):
            raise ValueError(
                f"The column 'index' of {frames.file_of(run.start)} does not count the frames of episode {episode}: convert the "
                "dataset anew, or train with PTRTrainer (ptr-train), which numbers them itself."
            )


def _mend_tasks(meta: LeRobotDatasetMetadata) -> list[str]:
    """Instructions in the order of their numbers, which is how LeRobot looks them up."""
    path = Path(meta.root) / "meta" / "tasks.parquet"
    if meta.tasks is None:
        if not path.is_file():
            raise ValueError(f"The dataset {meta.repo_id} has no instructions: {path} is missing.")
        meta.tasks = load_tasks(Path(meta.root))
    tasks = meta.tasks
    if not all(isinstance(name, str) for name in tasks.index) and "task" in tasks.columns:
        tasks = tasks.set_index("task")
    if not all(isinstance(name, str) for name in tasks.index) or "task_index" not in tasks.columns:
        raise ValueError(f"{path} is no table of instructions: it needs the texts as its index, and their task_index.")
    said: list[str] = []
    numbers = tasks["task_index"].to_numpy()
    if not np.array_equal(np.sort(numbers), np.arange(len(numbers))):
        raise ValueError(
            f"{path} numbers its {len(numbers)} instructions {', '.join(map(str, numbers[:8].tolist()))}: give each of 0 to "
            f"{len(numbers) - 1} to one of them, in the data files too."
        )
    if not np.array_equal(numbers, np.arange(len(numbers))):
        tasks = tasks.sort_values("task_index")
        said.append(
            f"The rows of {path} are not in the order of their task_index: every frame is given the instruction of its number."
        )
    meta.tasks, meta.info.total_tasks = tasks, len(tasks)
    return said


def _mend_rows(meta: LeRobotDatasetMetadata) -> list[str]:
    """A row of meta/episodes for every episode, in their order."""
    where = f"meta/episodes of {meta.repo_id}"
    if meta.episodes is None:
        try:
            meta.episodes = load_episodes(Path(meta.root))
        except FileNotFoundError as error:
            raise ValueError(
                f"The dataset {meta.repo_id} has no episodes: {meta.root}/meta/episodes is missing."
            ) from error
    lacking = [name for name in ("episode_index", LENGTH) if name not in meta.episodes.column_names]
    if lacking:
        raise ValueError(f"{where} lacks the column {lacking[0]!r}, which LeRobot writes: convert the dataset anew.")
    numbers = np.asarray(meta.episodes["episode_index"])
    known, times = np.unique(numbers, return_counts=True)
    counted = max(meta.info.total_episodes, int(known.max(initial=-1)) + 1)
    missing = np.setdiff1d(np.arange(counted), known)
    if len(missing):
        raise ValueError(
            f"{where} has no row for {_listed(missing.tolist(), verb=False)} (meta/info.json counts {meta.info.total_episodes}): "
            "its recording or copy was cut short. Copy or convert the dataset anew."
        )
    if times.max(initial=1) > 1:
        raise ValueError(f"{where} has {times.max()} rows for episode {known[times.argmax()]}: leave one of them.")
    said: list[str] = []
    if not np.array_equal(numbers, np.arange(len(numbers))):
        _replace(meta, {}, order=numbers.argsort())
        said.append(f"The rows of {where} are not in the order of the episodes: they are sorted in memory.")
    if meta.info.total_episodes != len(numbers):
        said.append(
            f"meta/info.json of {meta.repo_id} counts {meta.info.total_episodes} episodes and meta/episodes has {len(numbers)}: "
            "all of them are read."
        )
        meta.info.total_episodes = len(numbers)
    return said


def _number_by_length(meta: LeRobotDatasetMetadata) -> list[str]:
    """Episodes one after the other, in whichever order meta/episodes has them, if it has them so."""
    length = np.asarray(meta.episodes[LENGTH])
    first, last = _bounds(meta)
    order = first.argsort(kind="stable")
    ends = np.cumsum(length[order])
    if np.array_equal(first[order], ends - length[order]) and np.array_equal(last[order], ends):
        return []
    first = np.cumsum(length) - length
    _replace(meta, {FROM: first, TO: first + length})
    return [_derived(meta, 0)]


def _runs(
    meta: LeRobotDatasetMetadata, frames: FrameColumns, chosen: Sequence[int], strangers: bool
) -> dict[int, _Run]:
    """Where every episode's frames lie; each has to lie together."""
    edges = np.flatnonzero(np.diff(frames.episode)) + 1
    starts = np.concatenate([[0], edges]) if len(frames) else edges
    stops = np.concatenate([edges, [len(frames)]]) if len(frames) else edges
    wanted, count = set(chosen), len(meta.episodes)
    runs: dict[int, _Run] = {}
    for episode, start, stop in zip(frames.episode[starts].tolist(), starts.tolist(), stops.tolist(), strict=True):
        if not 0 <= episode < count:
            if strangers:
                raise ValueError(
                    f"{frames.file_of(start)} has frames of episode {episode}, and meta/episodes of {meta.repo_id} knows 0 to "
                    f"{count - 1}: its recording or copy was cut short. Copy or convert the dataset anew."
                )
        elif episode not in runs:
            runs[episode] = _Run(start, stop)
        elif episode in wanted:
            raise ValueError(
                f"The frames of episode {episode} of {meta.repo_id} do not lie together: {frames.file_of(start)} has some of "
                f"them after those of other episodes. {_LEAVE_OUT}"
            )
    return runs


def _check_frames(meta: LeRobotDatasetMetadata, frames: FrameColumns, episode: int, run: _Run) -> None:
    """Every frame of the episode is there, once and in order."""
    found, number = frames.frame[run.start : run.stop], np.arange(run.length)
    wrong = np.flatnonzero(found != number)
    if not len(wrong):
        return
    if np.array_equal(np.sort(found), number):
        what = "are out of order"
    elif len(np.unique(found)) < run.length:
        values, times = np.unique(found, return_counts=True)
        what = f"are incomplete or doubled: frame {values[times > 1][0]} is there {times.max()} times"
    else:
        what = f"are incomplete: frame {wrong[0]} is missing"
    raise ValueError(
        f"The frames of episode {episode} of {meta.repo_id} {what} in {frames.file_of(run.start + int(wrong[0]))}. {_LEAVE_OUT}"
    )


def _mend_lengths(meta: LeRobotDatasetMetadata, runs: dict[int, _Run], here: Sequence[int]) -> list[str]:
    """An episode's length is the number of its frames, where its bounds agree with them."""
    length = np.array(meta.episodes[LENGTH])
    first, last = _bounds(meta)
    wrong = []
    for episode in here:
        count = runs[episode].length
        if count == length[episode]:
            continue
        if count != last[episode] - first[episode]:
            raise ValueError(
                f"Episode {episode} of {meta.repo_id} has {length[episode]} frames by meta/episodes and {count} in "
                f"{meta.get_data_file_path(episode)}: frames or metadata are missing. {_LEAVE_OUT}"
            )
        wrong.append(episode)
        length[episode] = count
    if not wrong:
        return []
    _replace(meta, {LENGTH: length})
    return [
        f"The length of episode {wrong[0]} in meta/episodes of {meta.repo_id} is not that of its frames: {len(wrong)} are "
        "counted anew in memory."
    ]


def _number_by_place(meta: LeRobotDatasetMetadata, runs: dict[int, _Run], total: int) -> list[str]:
    """Of a dataset that is read whole LeRobot takes a frame's number for its place."""
    said = []
    starts, length = np.array([runs[episode].start for episode in sorted(runs)]), np.asarray(meta.episodes[LENGTH])
    first, last = _bounds(meta)
    off = np.flatnonzero((first != starts) | (last != starts + length))
    if len(off):
        _replace(meta, {FROM: starts, TO: starts + length})
        said.append(_derived(meta, int(off[0])))
    if meta.info.total_frames != total:
        said.append(
            f"meta/info.json of {meta.repo_id} counts {meta.info.total_frames} frames; {total} are there and read."
        )
        meta.info.total_frames = total
    return said


def _numbers_fit(
    meta: LeRobotDatasetMetadata, frames: FrameColumns, runs: dict[int, _Run], here: Sequence[int]
) -> bool:
    """Whether the episodes that are read are numbered alike in metadata and data, whatever the others are."""
    first, last = _bounds(meta)
    return bool(here) and all(
        frames.index[runs[episode].start] == first[episode] and last[episode] - first[episode] == runs[episode].length
        for episode in here
    )


def _bounds(meta: LeRobotDatasetMetadata) -> tuple[np.ndarray, np.ndarray]:
    """As recorded; none is -1."""
    if not {FROM, TO} <= set(meta.episodes.column_names):
        return (np.full(len(meta.episodes), -1),) * 2
    return np.asarray(meta.episodes[FROM]), np.asarray(meta.episodes[TO])


def _mend_places(
    meta: LeRobotDatasetMetadata, frames: FrameColumns, runs: dict[int, _Run], here: Sequence[int]
) -> list[str]:
    """The data file of every episode, by which LeRobot fetches it and a stream keeps it."""
    names = ("data/chunk_index", "data/file_index")
    if not set(names) <= set(meta.episodes.column_names):
        raise ValueError(f"meta/episodes of {meta.repo_id} lacks {names[0]} or {names[1]}: convert the dataset anew.")
    root = Path(meta.root)
    given = [np.array(meta.episodes[name]) for name in names]
    numbers: dict[Path, tuple[int, int]] = {}
    for chunk, file in set(zip(*(values.tolist() for values in given), strict=True)):
        numbers[root / meta.data_path.format(chunk_index=chunk, file_index=file)] = (chunk, file)
    wrong = []
    for episode in here:
        path = frames.file_of(runs[episode].start)
        own = numbers.get(path)
        if own != (given[0][episode], given[1][episode]):
            wrong.append(episode)
            if own is not None:
                given[0][episode], given[1][episode] = own
    if not wrong:
        return []
    _replace(meta, dict(zip(names, given, strict=True)))
    return [
        f"meta/episodes of {meta.repo_id} names another data file for episode {wrong[0]} than the one its frames are in "
        f"({frames.file_of(runs[wrong[0]].start).relative_to(root)}): the frames are read where they are."
    ]


def _mend_instructions(
    meta: LeRobotDatasetMetadata, frames: FrameColumns, runs: dict[int, _Run], here: Sequence[int]
) -> list[str]:
    """Every frame's instruction exists, and meta/episodes lists the episode's own."""
    names: list[str] = meta.tasks.index.tolist()
    recorded = list(meta.episodes[TASKS]) if TASKS in meta.episodes.column_names else None
    wrong = []
    for episode in here:
        run = runs[episode]
        numbers = np.unique(frames.task[run.start : run.stop]).tolist()
        unknown = [number for number in numbers if not 0 <= number < len(names)]
        if unknown:
            raise ValueError(
                f"Episode {episode} of {meta.repo_id} has task_index {unknown[0]} in {frames.file_of(run.start)}, and "
                f"meta/tasks.parquet has no such instruction (it has 0 to {len(names) - 1}): add it there."
            )
        own = [names[number] for number in numbers]
        if recorded is None or set(recorded[episode] or ()) == set(own):
            continue
        listed = list(recorded[episode] or ())
        if listed and set(listed) <= set(names) and not set(listed) & set(own):
            raise ValueError(
                f"Episode {episode} of {meta.repo_id} is {listed[0]!r} by meta/episodes and {own[0]!r} by task_index in "
                f"{frames.file_of(run.start)} and meta/tasks.parquet: one of the three is wrong. Mend it, or convert the dataset "
                "anew."
            )
        wrong.append(episode)
        recorded[episode] = own
    if not wrong or recorded is None:
        return []
    _replace(meta, {TASKS: recorded})
    return [
        f"meta/episodes of {meta.repo_id} lists other instructions for episode {wrong[0]} than its frames have: those of the "
        "frames are used."
    ]


def _replace(meta: LeRobotDatasetMetadata, columns: dict[str, Any], order: np.ndarray | None = None) -> None:
    """Give the table of episodes other columns, or its rows in another order."""
    table: pa.Table = meta.episodes.with_format("arrow")[:]
    if order is not None:
        table = table.take(order)
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        if place < 0:
            table = table.append_column(name, pa.array(values))
        else:
            table = table.set_column(place, name, pa.array(values, type=table.schema.field(place).type))
    meta.episodes = datasets.Dataset(datasets.table.InMemoryTable(table))


def _renumber(dataset: LeRobotDataset, numbers: np.ndarray) -> None:
    """Replace the column by which LeRobot finds a frame."""
    before = dataset.hf_dataset
    after = before.remove_columns("index").add_column("index", numbers, feature=before.features["index"])
    after.set_format(**before.format)
    reader = dataset.reader
    assert reader is not None
    reader.hf_dataset = after
    # LeRobot looks frames of some episodes up by a table of these numbers, made when it has loaded them
    reader._build_index_mapping()


def _derived(meta: LeRobotDatasetMetadata, episode: int) -> str:
    return (
        f"{FROM} and {TO} in meta/episodes of {meta.repo_id} are not where the frames are (first at episode {episode}): they are "
        "derived anew in memory; the files stay as they are."
    )


def _listed(episodes: Sequence[int], verb: bool = True) -> str:
    named = ", ".join(map(str, episodes[:5])) + (f" and {len(episodes) - 5} more" if len(episodes) > 5 else "")
    one = len(episodes) == 1
    return f"{'Episode' if one else 'Episodes'} {named}" + ((" is" if one else " are") if verb else "")
