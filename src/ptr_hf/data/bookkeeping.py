"""Compare what a LeRobotDataset's metadata say with what its data files hold, before anything is read by it.

LeRobot finds an episode's frames by `dataset_from_index` and `dataset_to_index` of the row at the episode's place in
meta/episodes, a frame's place by its `index`, and an instruction by its row in tasks.parquet. Where one of them is off, it
reads frames of other episodes or marks recorded ones as padding, without a word. Here the data files decide: what follows
from them is set right in memory and said in a sentence each; what does not is refused, with the episode and the file named.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.io_utils import load_episodes, load_tasks
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from ptr_hf.data.frame_columns import FrameRuns, data_files, episode_column, read_frame_runs, table_blocks

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
    first = episode_column(dataset.meta, FROM).to_numpy()
    for episode, frame, index in table_blocks(dataset, "episode_index", "frame_index", "index"):
        wrong = np.flatnonzero(first[episode] + frame != index)
        if len(wrong):
            said.append(
                f"The column 'index' of {dataset.repo_id} does not count its frames (first in episode {episode[wrong[0]]}): "
                "they are numbered anew in memory."
            )
            blocks = table_blocks(dataset, "episode_index", "frame_index")
            _renumber(dataset, np.concatenate([first[episode] + frame for episode, frame in blocks]))
            break
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
    if files:
        return said + _Comparison(meta, read_frame_runs(files), episodes).mend(complete, fixed_index)
    if complete:
        raise ValueError(f"The dataset {meta.repo_id} cannot be read: files are missing in {meta.root}/data.")
    return said + _number_by_length(meta)


class _Comparison:
    """A dataset's metadata beside the frames of its data files.

    Args:
        meta: its rows are in the order of the episodes.
        frames: of the data files.
        episodes: those that are read; None for all.

    Attributes:
        here: episodes that are read and have frames, rising.
        run: (here,) of each one's frames.
        start, count: (here,) position of each one's first frame, and how many it has.
    """

    def __init__(self, meta: LeRobotDatasetMetadata, frames: FrameRuns, episodes: Sequence[int] | None) -> None:
        self.meta, self.frames = meta, frames
        known = len(meta.episodes)
        self.chosen = np.arange(known) if episodes is None else np.intersect1d(episodes, np.arange(known))
        starts, found = frames.start, frames.episode
        strange = np.flatnonzero((found < 0) | (found >= known))
        if episodes is None and len(strange):
            raise ValueError(
                f"{frames.file_of(starts[strange[0]])} has frames of episode {found[strange[0]]}, and meta/episodes of "
                f"{meta.repo_id} knows 0 to {known - 1}: its recording or copy was cut short. Copy or convert the dataset anew."
            )
        own = np.isin(found, self.chosen)
        self.here, first = np.unique(found[own], return_index=True)
        again = np.setdiff1d(np.arange(own.sum()), first)
        if len(again):
            raise ValueError(
                f"The frames of episode {found[own][again[0]]} of {meta.repo_id} do not lie together: "
                f"{frames.file_of(starts[own][again[0]])} has some of them after those of other episodes. {_LEAVE_OUT}"
            )
        self.run = np.flatnonzero(own)[first]
        self.start, self.count = starts[self.run], frames.count[self.run]

    def mend(self, complete: bool, fixed_index: bool) -> list[str]:
        """Sentences for everything that was set right."""
        meta, lacking = self.meta, np.setdiff1d(self.chosen, self.here).tolist()
        if complete and lacking:
            raise ValueError(
                f"{_listed(lacking)} of {meta.repo_id} in meta/episodes, but no data file has frames of "
                f"{'it' if len(lacking) == 1 else 'them'} ({meta.get_data_file_path(lacking[0])} should). {_LEAVE_OUT}"
            )
        self._check_frames()
        said = self._lengths()
        if len(self.here) == len(meta.episodes):
            said += self._numbers()
        else:
            first, last = (values[self.here] for values in _bounds(meta))
            # whatever the other episodes are
            fits = np.array_equal(self.frames.index[self.run], first) and np.array_equal(last - first, self.count)
            said += [] if fits and len(self.here) else _number_by_length(meta)
        said += [*self._places(), *self._instructions()]
        if fixed_index:
            self._check_index()
        return said

    def _check_frames(self) -> None:
        """Every frame of an episode is there, once and in order."""
        frames = self.frames
        wrong = np.sort(self.run[frames.disorder[self.run] >= 0])
        if not len(wrong):
            return
        episode, place = frames.episode[wrong[0]], frames.disorder[wrong[0]]
        found = frames.frames_of(int(episode))
        values, times = np.unique(found, return_counts=True)
        if times.max() > 1:
            what = f"are incomplete or doubled: frame {values[times > 1][0]} is there {times.max()} times"
        elif np.array_equal(values, np.arange(len(found))):
            what = "are out of order"
        else:
            what = f"are incomplete: frame {place} is missing"
        raise ValueError(
            f"The frames of episode {episode} of {self.meta.repo_id} {what} in "
            f"{frames.file_of(frames.start[wrong[0]] + place)}. {_LEAVE_OUT}"
        )

    def _lengths(self) -> list[str]:
        """An episode's length is the number of its frames, where its bounds agree with them."""
        meta, length = self.meta, episode_column(self.meta, LENGTH).to_numpy().copy()
        first, last = (values[self.here] for values in _bounds(meta))
        wrong = np.flatnonzero(self.count != length[self.here])
        for place in wrong[(self.count != last - first)[wrong]][:1]:
            raise ValueError(
                f"Episode {self.here[place]} of {meta.repo_id} has {length[self.here[place]]} frames by meta/episodes and "
                f"{self.count[place]} in {meta.get_data_file_path(int(self.here[place]))}: frames or metadata are missing. "
                f"{_LEAVE_OUT}"
            )
        if not len(wrong):
            return []
        length[self.here] = self.count
        _replace(meta, {LENGTH: length})
        return [
            f"The length of episode {self.here[wrong[0]]} in meta/episodes of {meta.repo_id} is not that of its frames: "
            f"{len(wrong)} are counted anew in memory."
        ]

    def _numbers(self) -> list[str]:
        """Of a dataset that is read whole LeRobot takes a frame's number for its place."""
        said, meta = [], self.meta
        first, last = _bounds(meta)
        off = np.flatnonzero((first != self.start) | (last != self.start + self.count))
        if len(off):
            _replace(meta, {FROM: self.start, TO: self.start + self.count})
            said.append(_derived(meta, int(off[0])))
        total = self.frames.frames
        if meta.info.total_frames != total:
            said.append(
                f"meta/info.json of {meta.repo_id} counts {meta.info.total_frames} frames; {total} are there and read."
            )
            meta.info.total_frames = total
        return said

    def _places(self) -> list[str]:
        """The data file of every episode, by which LeRobot fetches it and a stream keeps it."""
        meta, names = self.meta, ("data/chunk_index", "data/file_index")
        if not set(names) <= set(meta.episodes.column_names):
            raise ValueError(
                f"meta/episodes of {meta.repo_id} lacks {names[0]} or {names[1]}: convert the dataset anew."
            )
        root, given = Path(meta.root), np.stack([episode_column(meta, name) for name in names], axis=1)
        numbers = {
            root / meta.data_path.format(chunk_index=chunk, file_index=file): (chunk, file)
            for chunk, file in np.unique(given, axis=0).tolist()
        }
        files = [self.frames.file_of(start) for start in self.start]
        found = np.array([numbers.get(file, (-1, -1)) for file in files]).reshape(-1, 2)
        wrong = np.flatnonzero((found != given[self.here]).any(axis=1))
        if not len(wrong):
            return []
        known = found[:, 0] >= 0
        given[self.here[known]] = found[known]
        _replace(meta, dict(zip(names, given.T, strict=True)))
        return [
            f"meta/episodes of {meta.repo_id} names another data file for episode {self.here[wrong[0]]} than the one its frames "
            f"are in ({files[wrong[0]].relative_to(root)}): the frames are read where they are."
        ]

    def _instructions(self) -> list[str]:
        """Every frame's instruction exists, and meta/episodes lists the episode's own."""
        meta, names = self.meta, self.meta.tasks.index.tolist()
        recorded = episode_column(meta, TASKS).to_pylist() if TASKS in meta.episodes.column_names else None
        wrong = []
        for episode, run, start in zip(self.here.tolist(), self.run, self.start, strict=True):
            numbers = self.frames.tasks[run]
            where = self.frames.file_of(start)
            unknown = [number for number in numbers if not 0 <= number < len(names)]
            if unknown:
                raise ValueError(
                    f"Episode {episode} of {meta.repo_id} has task_index {unknown[0]} in {where}, and meta/tasks.parquet has no "
                    f"such instruction (it has 0 to {len(names) - 1}): add it there."
                )
            own = [names[number] for number in numbers]
            listed = own if recorded is None else list(recorded[episode] or ())
            if set(listed) == set(own):
                continue
            if listed and set(listed) <= set(names) and not set(listed) & set(own):
                raise ValueError(
                    f"Episode {episode} of {meta.repo_id} is {listed[0]!r} by meta/episodes and {own[0]!r} by task_index in "
                    f"{where} and meta/tasks.parquet: one of the three is wrong. Mend it, or convert the dataset anew."
                )
            wrong.append(episode)
            recorded[episode] = own  # type: ignore[index]
        if not wrong:
            return []
        _replace(meta, {TASKS: recorded})
        return [
            f"meta/episodes of {meta.repo_id} lists other instructions for episode {wrong[0]} than its frames have: those of the "
            "frames are used."
        ]

    def _check_index(self) -> None:
        """The column `index` counts the frames as the metadata do."""
        frames, first = self.frames, episode_column(self.meta, FROM).to_numpy()
        wrong = np.sort(self.run[(frames.index[self.run] != first[self.here]) | (frames.miscount[self.run] >= 0)])
        if len(wrong):
            run = wrong[0]
            place = 0 if frames.index[run] != first[frames.episode[run]] else frames.miscount[run]
            raise ValueError(
                f"The column 'index' of {frames.file_of(frames.start[run] + place)} does not count the frames of episode "
                f"{frames.episode[run]}: convert the dataset anew, or train with PTRTrainer (ptr-train), which numbers them "
                "itself."
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
    numbers = episode_column(meta, "episode_index").to_numpy()
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
    length = episode_column(meta, LENGTH).to_numpy()
    first, last = _bounds(meta)
    order = first.argsort(kind="stable")
    ends = np.cumsum(length[order])
    if np.array_equal(first[order], ends - length[order]) and np.array_equal(last[order], ends):
        return []
    first = np.cumsum(length) - length
    _replace(meta, {FROM: first, TO: first + length})
    return [_derived(meta, 0)]


def _bounds(meta: LeRobotDatasetMetadata) -> tuple[np.ndarray, np.ndarray]:
    """As recorded; none is -1."""
    if not {FROM, TO} <= set(meta.episodes.column_names):
        return (np.full(len(meta.episodes), -1),) * 2
    return episode_column(meta, FROM).to_numpy(), episode_column(meta, TO).to_numpy()


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
