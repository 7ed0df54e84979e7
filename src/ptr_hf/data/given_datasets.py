"""What a user may hand over as a dataset, and what of an open one has to survive its being opened at a segment's offsets."""

from pathlib import Path
from typing import Any

from lerobot.datasets import LeRobotDatasetMetadata, MultiLeRobotDataset, StreamingLeRobotDataset
from lerobot.datasets.feature_utils import get_hf_features_from_features
from lerobot.datasets.io_utils import hf_transform_to_torch, load_info, load_nested_dataset
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torch.utils.data import ConcatDataset, Subset

from ptr_hf.data.segment_dataset import SegmentDataset

_READS = {"__getitem__", "__getitems__", "__len__", "num_frames", "hf_dataset", "reader", "_ensure_reader"}


def check_given(source: Any, revision: str | None = None) -> None:
    """Refuse what is no Hub id, folder or LeRobotDataset, or one that cannot be opened anew.

    Args:
        source: what was given as a dataset.
        revision: that was asked for.

    Raises:
        ValueError: saying what to give instead.
    """
    if not isinstance(source, str | Path | LeRobotDataset):
        raise ValueError(_instead(source))
    if not isinstance(source, LeRobotDataset):
        return
    if source.writer is not None and not source._is_finalized:
        raise ValueError(f"The dataset {source.repo_id} is still being recorded: call its finalize() first.")
    if revision not in (None, source.revision):
        raise ValueError(
            f"Revision {revision!r} was asked for, but the dataset {source.repo_id} is open at {source.revision!r}: open it at "
            "that revision, or give its Hub id."
        )
    changed = _overridden(source)
    if changed:
        raise ValueError(
            f"{type(source).__name__} changes how a LeRobotDataset is read ({', '.join(changed)}), and PTR, which opens a "
            "dataset anew at offsets of its own, would lose that: write the change into the dataset's files, give it as "
            "image_transforms, or put it into the preprocessor."
        )


def check_unedited(dataset: LeRobotDataset) -> None:
    """Refuse an open dataset whose rows the user has filtered or changed in memory: its files are read anew.

    Raises:
        ValueError: the rows are not those of the files.
    """
    features = get_hf_features_from_features(load_info(dataset.root).features)
    recorded = load_nested_dataset(dataset.root / "data", features, dataset.episodes)
    recorded.set_transform(hf_transform_to_torch)
    rows = dataset.hf_dataset
    if rows._fingerprint == recorded._fingerprint:
        return
    # other files may have been fetched into the folder since, frames may have been numbered anew (`mend_dataset`), and no policy
    # reads some columns (`without_unreadable`)
    columns = sorted(set(recorded.column_names) & set(rows.column_names) - {"index"})
    same = len(rows) == len(recorded) and all(rows.features[name] == recorded.features[name] for name in columns)
    same &= all(rows.format[name] == recorded.format[name] for name in ("type", "format_kwargs"))
    given, files = (table.select_columns(columns).with_format("arrow") for table in (rows, recorded))
    if not same or not given[:].equals(files[:]):
        raise ValueError(
            f"The rows of the open dataset {dataset.repo_id} are not those of its files in {dataset.root}, which PTR reads: "
            "they were filtered or changed in memory. Choose episodes with LeRobotDataset(..., episodes=[...]), or write the "
            "changed dataset to a folder and give that."
        )


def _instead(source: Any) -> str:
    kind = type(source).__name__
    if isinstance(source, StreamingLeRobotDataset):
        return (
            f"A {kind} cannot be read at a segment's offsets: give its Hub id ({source.repo_id!r}), or, to read a few episodes "
            f"at a time, the mixture {{'sources': [{{'dataset': {source.repo_id!r}}}], 'streaming': True}}."
        )
    if isinstance(source, MultiLeRobotDataset | ConcatDataset):
        return f"A {kind} is not read: give the list of its datasets, which is a mixture (docs/mixtures.md)."
    if isinstance(source, Subset):
        return (
            "A Subset picks frames, and a segment needs those that follow: choose whole episodes with "
            "LeRobotDataset(..., episodes=[...])."
        )
    if isinstance(source, LeRobotDatasetMetadata):
        return f"The metadata of {source.repo_id} alone is no dataset: give the dataset, its Hub id or its folder."
    return (
        f"A {kind} is no dataset that PTR reads: give a LeRobotDataset, its folder or its Hub id, or a list of these."
    )


def _overridden(source: LeRobotDataset) -> list[str]:
    """What a subclass of the user's defines itself of all that reading goes through."""
    kinds = type(source).__mro__
    ours = SegmentDataset if isinstance(source, SegmentDataset) else LeRobotDataset
    return sorted({name for kind in kinds[: kinds.index(ours)] for name in vars(kind)} & _READS)
