"""What the dataset arguments of `PTRTrainer` stand for: one LeRobotDataset, or a mixture of several."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from ptr_hf.configuration_ptr import PTRConfig
from ptr_hf.data.datasets import check_dataset, dataset_metadata, open_dataset
from ptr_hf.data.demonstrations import load_truth
from ptr_hf.data.fit import check_fit, check_mixture_fit
from ptr_hf.data.frame_columns import episode_column
from ptr_hf.data.in_memory import InMemorySegments
from ptr_hf.data.mixture.config import MixtureConfig
from ptr_hf.data.mixture.dataset import Mixture
from ptr_hf.data.mixture.metadata import MixtureMetadata
from ptr_hf.data.mixture.streaming import StreamingMixture
from ptr_hf.publishing.card_facts import TrainingData
from ptr_hf.scores import EpisodeTable
from ptr_hf.training.arguments import PTRTrainingArguments

type DatasetSource = str | Path | LeRobotDataset
type DataSource = DatasetSource | MixtureConfig | Mapping[str, Any] | Sequence[Any]
"""A Hub id, a folder or an open dataset; or a mixture: a `MixtureConfig`, its dict or YAML file, or a list of datasets."""
type Metadata = LeRobotDatasetMetadata | MixtureMetadata
type TrainingSet = LeRobotDataset | InMemorySegments | Mixture | StreamingMixture


def read_metadata(
    given: DataSource, args: PTRTrainingArguments, like: Metadata | None = None, widest: int | None = None
) -> Metadata:
    """What is known of the data before it is read.

    Args:
        given: a dataset argument of `PTRTrainer`.
        args: its revision.
        like: of the training data, where `given` is what the policy is evaluated on: it has to have the same form.
        widest: vector that the policy takes (`ptr_hf.training.policy_sources.widest_vector`).

    Raises:
        ValueError: it cannot be read, or has another form than the training data.
    """
    config = MixtureConfig.of(given)
    trained = like if isinstance(like, MixtureMetadata) else None
    if config is None:
        if trained is not None:
            raise ValueError(
                "The policy is trained on a mixture, so eval_dataset has to be one too, with the same robots in the same "
                f"order ({', '.join(trained.names)})."
            )
        return dataset_metadata(given, args.dataset_revision)
    if args.dataset_revision is not None:
        raise ValueError("dataset_revision is of a single dataset: give each source of the mixture its own `revision`.")
    if args.observation_renames:
        raise ValueError("rename_map is of a single dataset: give each source of the mixture its own `rename`.")
    return MixtureMetadata.read(config, trained, widest)


def open_data(
    given: DataSource,
    meta: Metadata,
    config: PTRConfig,
    args: PTRTrainingArguments,
    training: bool = True,
    renames: Mapping[str, str] | None = None,
) -> TrainingSet:
    """The data, ready to be read at the policy's segment layout.

    Args:
        given: a dataset argument of `PTRTrainer`.
        meta: its `read_metadata`.
        config: of the policy.
        args: how it is read.
        training: whether it may be a stream, which has no end.
        renames: dataset key -> policy key; by default the arguments' own.

    Raises:
        ValueError: there is nothing to learn from, or the data do not fit the policy.
    """
    layout = config.layout
    if isinstance(meta, MixtureMetadata):
        _check_widths(config, meta)
        check_mixture_fit(config.base_config, meta)
        if meta.config.streaming and training:
            return StreamingMixture(meta, layout, seed=args.seed if args.data_seed is None else args.data_seed)
        return Mixture(
            meta,
            layout,
            in_memory=args.in_memory,
            max_gigabytes=args.max_gigabytes,
        )
    renames = args.observation_renames if renames is None else renames
    check_fit(config.base_config, meta.features, renames, meta.repo_id, given=training and bool(args.rename_map))
    dataset = open_dataset(given, layout, revision=args.dataset_revision)
    check_dataset(dataset, layout)
    # what its data files set right, which for a dataset on the Hub are here only now
    meta.episodes, meta.tasks, meta.info = dataset.meta.episodes, dataset.meta.tasks, dataset.meta.info
    if not args.in_memory:
        return dataset
    return InMemorySegments(dataset, layout, max_gigabytes=args.max_gigabytes)


def described(given: DataSource, meta: Metadata, args: PTRTrainingArguments) -> tuple[TrainingData, ...]:
    """The data as the card names it, one entry a dataset."""
    if isinstance(meta, MixtureMetadata):
        return tuple(
            TrainingData(
                source=_named(source.config.dataset),
                name=source.name,
                revision=source.config.revision,
                episodes=len(source.episodes),
                frames=source.frames,
            )
            for source in meta.sources
        )
    assert isinstance(given, str | Path | LeRobotDataset)
    chosen = given.episodes if isinstance(given, LeRobotDataset) and given.episodes else range(meta.total_episodes)
    lengths = episode_column(meta, "length").to_numpy()
    return (
        TrainingData(
            source=_named(given),
            revision=args.dataset_revision,
            episodes=len(chosen),
            frames=int(lengths[list(chosen)].sum()),
        ),
    )


def episode_table(config: PTRConfig, meta: Metadata, args: PTRTrainingArguments) -> EpisodeTable:
    """The training episodes; for the oracle alone, with the truth about them."""
    corrupted: list[int] = []
    if config.score == "oracle":
        if isinstance(meta, MixtureMetadata):
            for source in meta.sources:
                found = load_truth(Path(source.meta.root)).corrupted.nonzero()[0]
                corrupted += [source.first_episode + episode for episode in found.tolist()]
        else:
            truth = load_truth(Path(args.truth) if args.truth else Path(meta.root))
            corrupted = truth.corrupted.nonzero()[0].tolist()
    return EpisodeTable.from_metadata(meta, config.standardize_by, corrupted)


def _check_widths(config: PTRConfig, meta: MixtureMetadata) -> None:
    """Refuse a mixture whose vectors are wider than the policy takes; VLAs pad every robot's to a width of their own."""
    known = vars(config.base_config)
    for name, size in (("max_action_dim", len(meta.space)), ("max_state_dim", len(meta.state_space))):
        if name in known and known[name] < size:
            compact = (
                "set `action_space: compact` in the mixture, or " if meta.config.action_space == "standard" else ""
            )
            raise ValueError(
                f"The mixture's vector has {size} slots and the policy's {name} is {known[name]}: {compact}train a policy whose "
                f"{name} is at least {size}."
            )


def _named(given: Any) -> str | Path:
    return given.repo_id if isinstance(given, LeRobotDataset) else given
