"""What a mixture of datasets is made of: read from YAML, a dict, or a list of datasets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import draccus
import yaml
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from ptr_hf.data.datasets import is_dataset_folder
from ptr_hf.data.given_datasets import check_given

Shares = Literal["size", "temperature", "fixed"]
Statistics = Literal["source", "embodiment", "pooled"]
Space = Literal["standard", "compact"]

YAML_ENDINGS = (".yaml", ".yml")
EXAMPLE = "sources: [{dataset: me/bench}, {dataset: lab/franka, embodiment: franka}]"


@dataclass(frozen=True)
class SourceConfig:
    """One dataset of a mixture.

    Attributes:
        dataset: Hub id, local folder, or an open LeRobotDataset.
        name: what the source is called in metrics, report and card; by default the last part of the id.
        embodiment: the robot: a ready layout's name, a YAML file, or `{action: [slots], state: [slots]}`; None assigns slots
            from the dataset's feature names.
        revision: of a dataset on the Hub.
        share: of the samples, where shares are fixed; any positive numbers, they are divided by their sum.
        episodes: a subset; None takes all (of an open dataset, its own).
        rename: dataset key -> policy key, for cameras.
        tasks: recorded instruction -> what it is called in the mixture.

    Raises:
        ValueError: the dataset is none of these, or cannot be opened anew (`ptr_hf.data.given_datasets`).
    """

    dataset: Any
    name: str | None = None
    embodiment: Any = None
    revision: str | None = None
    share: float | None = None
    episodes: list[int] | None = None
    rename: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_given(self.dataset, self.revision)

    @property
    def called(self) -> str:
        """`name`, or the last part of the dataset's id or folder."""
        if self.name is not None:
            return self.name
        source = self.dataset.repo_id if isinstance(self.dataset, LeRobotDataset) else self.dataset
        return Path(str(source)).resolve().name if is_dataset_folder(source) else str(source).rsplit("/", 1)[-1]


@dataclass(frozen=True)
class MixtureConfig:
    """Several datasets, and how a training run reads them as one.

    Attributes:
        sources: at least one.
        shares: `size`: every frame alike; `temperature`: share ∝ frames^(1/temperature), 1 as by size, larger is more even;
            `fixed`: each source's `share`. None is `fixed` where a source has a share, else `size`.
        temperature: see `shares`.
        statistics: what normalises a sample: those of its own dataset (`source`), of all datasets of its robot
            (`embodiment`), or of all (`pooled`, slot by slot).
        action_space: `standard`: the 200 named slots; `compact`: those that some source uses, in the same order. None:
            standard, where the policy takes vectors that wide, else compact.
        image_size: (height, width) of every camera; None: the policy's, or the first source's that has the camera.
        streaming: fetch and read a few episodes at a time instead of all, for data that does not fit the disk.
        stream_episodes: so many of each source, among whose samples a stream is shuffled.

    Raises:
        ValueError: no source, a name twice, shares that are missing or not positive, an unknown word.
    """

    sources: list[SourceConfig]
    shares: str | None = None
    temperature: float = 1.0
    statistics: str = "source"
    action_space: str | None = None
    image_size: tuple[int, int] | None = None
    streaming: bool = False
    stream_episodes: int = 64

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError(f"A mixture needs at least one source, e.g. {EXAMPLE}.")
        names = self.names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"Several sources of the mixture are called {', '.join(twice)}: give each a `name` of its own."
            )
        for what, value, known in (
            ("shares", self.shares, (None, *get_args(Shares))),
            ("statistics", self.statistics, get_args(Statistics)),
            ("action_space", self.action_space, (None, *get_args(Space))),
        ):
            if value not in known:
                raise ValueError(
                    f"{what}={value!r} of the mixture is unknown: choose one of {', '.join(filter(None, known))}."
                )
        if self.temperature <= 0 or self.stream_episodes < 1:
            raise ValueError(
                f"temperature={self.temperature}, stream_episodes={self.stream_episodes}: each must be positive."
            )
        given = {name: source.share for name, source in zip(names, self.sources, strict=True)}
        if self.how_shared == "fixed":
            wrong = [name for name, share in given.items() if share is None or not share > 0]
            if wrong:
                raise ValueError(
                    f"Fixed shares need a positive `share` for every source; {', '.join(wrong)} have none."
                )
        elif any(share is not None for share in given.values()):
            raise ValueError(f"shares={self.shares!r} computes the shares: drop `share` from the sources, or `shares`.")

    @property
    def names(self) -> list[str]:
        """What the sources are called, in their order."""
        return [source.called for source in self.sources]

    @property
    def how_shared(self) -> Shares:
        """`shares`, where it was left out what the sources imply."""
        if self.shares is None:
            return "fixed" if any(source.share is not None for source in self.sources) else "size"
        return self.shares  # type: ignore[return-value]  # checked above

    def without(self, name: str) -> "MixtureConfig":
        """The mixture with one source left out.

        Raises:
            ValueError: there is no such source, or no other one.
        """
        found = self._place(name)
        return replace(self, sources=[*self.sources[:found], *self.sources[found + 1 :]])

    def only(self, name: str) -> "MixtureConfig":
        """The mixture of one source alone, for a specialist; a compact action space becomes that of its robot."""
        return replace(self, sources=[self.sources[self._place(name)]])

    def _place(self, name: str) -> int:
        if name not in self.names:
            raise ValueError(f"The mixture has no source {name!r}; it has {', '.join(self.names)}.")
        return self.names.index(name)

    def shares_of(self, sizes: Sequence[int]) -> tuple[float, ...]:
        """π: the share of samples that each source is given.

        Args:
            sizes: frames of every source.
        """
        how = self.how_shared
        if how == "fixed":
            raw = [float(source.share or 0.0) for source in self.sources]
        else:
            exponent = 1.0 / self.temperature if how == "temperature" else 1.0
            raw = [float(size) ** exponent for size in sizes]
        return tuple(value / sum(raw) for value in raw)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "MixtureConfig":
        """Read a YAML file; datasets and layouts named by relative paths lie beside it.

        Raises:
            ValueError: there is no such file, or it describes no mixture.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"There is no mixture file {path}.")
        try:
            content = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {error}") from error
        return cls.from_dict(content, str(path), folder=path.parent)

    @classmethod
    def from_dict(cls, content: Any, where: str = "The mixture", folder: Path | None = None) -> "MixtureConfig":
        """From plain values, `{sources: [...], ...}`; a source may be a dataset's name alone.

        Args:
            content: the values.
            where: what error messages call it.
            folder: in which relative paths are looked up.
        """
        if not isinstance(content, Mapping) or not isinstance(content.get("sources"), list):
            raise ValueError(f"{where} describes no mixture: it needs a list `sources`, e.g. {EXAMPLE}.")
        sources = [_beside({"dataset": item} if isinstance(item, str) else item, folder) for item in content["sources"]]
        try:
            return draccus.decode(cls, {**content, "sources": sources})
        except draccus.ParsingError as error:
            reason = error.__cause__ or error
            if isinstance(reason, ValueError) and not isinstance(reason, draccus.ParsingError):
                raise ValueError(f"{where}: {reason}") from error
            raise ValueError(f"{where} describes no mixture: {error}") from error

    @classmethod
    def of(cls, given: Any) -> "MixtureConfig | None":
        """The mixture that a `train_dataset` argument stands for; None where it is a single dataset.

        Args:
            given: a `MixtureConfig`, a dict, the path of a YAML file, or a list of datasets, dicts and `SourceConfig`s.
        """
        if isinstance(given, MixtureConfig):
            return given
        if isinstance(given, Mapping):
            return cls.from_dict(given)
        if isinstance(given, str | Path) and str(given).endswith(YAML_ENDINGS):
            return cls.from_yaml(given)
        if isinstance(given, Sequence) and not isinstance(given, str):
            return cls([_source(item) for item in given])
        return None


def _source(item: Any) -> SourceConfig:
    if isinstance(item, SourceConfig):
        return item
    if isinstance(item, Mapping):
        return MixtureConfig.from_dict({"sources": [dict(item)]}).sources[0]
    return SourceConfig(item)


def _beside(item: Any, folder: Path | None) -> Any:
    """Paths relative to the YAML file they were read from; Hub ids stay what they are."""
    if folder is None or not isinstance(item, Mapping):
        return item
    placed = dict(item)
    for key in ("dataset", "embodiment"):
        value = placed.get(key)
        if isinstance(value, str) and (folder / value).exists():
            placed[key] = str(folder / value)
    return placed
