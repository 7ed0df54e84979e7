"""The facts of a run that its cards are written from; whoever fills them leaves out what it does not know."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from ptr_hf.artifacts.sources import is_repo_id
from ptr_hf.configuration_ptr import PTRConfig
from ptr_hf.hyperparameters import PTRHyperparameters
from ptr_hf.report.dynamics import Dynamics
from ptr_hf.report.evaluation import WeightShare

OWN_POLICY_TYPES = ("smolvla_state",)
"""Policy types that only ptr_hf brings."""


@dataclass(frozen=True, kw_only=True)
class BasePolicy:
    """The policy that was post-trained: LeRobot's type and the source of its weights, a Hub id or a folder.

    Without a source it started from `random_weights`, or was given in memory and nobody knows.
    """

    policy_type: str
    source: str | Path | None = None
    revision: str | None = None
    random_weights: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """A dataset (Hub id or folder) and how much of it was trained on; in a mixture the `name` that it has there."""

    source: str | Path
    revision: str | None = None
    episodes: int | None = None
    frames: int | None = None
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Measured success, a fraction of the episodes, with its standard error if known.

    `step` is the training step of the policy that was evaluated; None means the policy of the card.

    Raises:
        ValueError: the success is no fraction, or there were no episodes.
    """

    environment: str
    task: str
    episodes: int
    success: float
    standard_error: float | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.success <= 1.0 or self.episodes < 1:
            raise ValueError(
                f"An evaluation is a success in [0, 1] over 1 or more episodes, got success={self.success} and "
                f"episodes={self.episodes}: give the fraction of solved episodes."
            )


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a policy's card is written from.

    Args:
        config: the run's hyperparameters; a `PTRConfig` is one.
        base: the policy that was post-trained.
        chunk_size: L, where `config` leaves it to the base policy.
        peft: whether the repo holds a PEFT adapter without the base policy's weights.
        steps: that the policy was trained for.
        settings: of the optimisation worth saying, by what the card calls them.
        task_shares, source_shares: as `ptr_hf.report.weight_shares` gives them.
        effective_sample_size: a fraction of the chunks, over the whole training data at the end.
        versions: of the libraries, by name (`library_versions`).
        license: the Hub's identifier of the policy's license, e.g. apache-2.0.
        repo_id: where the policy is published, if known.

    Raises:
        ValueError: `repo_id` could not be the name of a repo.
    """

    config: PTRHyperparameters
    base: BasePolicy
    chunk_size: int | None = None
    peft: bool = False
    data: Sequence[TrainingData] = ()
    steps: int | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    dynamics: Dynamics | None = None
    task_shares: Sequence[WeightShare] = ()
    source_shares: Sequence[WeightShare] = ()
    effective_sample_size: float | None = None
    evaluations: Sequence[Evaluation] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    license: str | None = None
    repo_id: str | None = None

    def __post_init__(self) -> None:
        if self.repo_id is not None and not is_repo_id(self.repo_id):
            raise ValueError(f"repo_id={self.repo_id!r} is no name of a repo on the Hub: give it as user/name.")

    @property
    def robots(self) -> tuple[str, ...]:
        """The sources of the mixture that the policy was trained on, each a robot it can run on; empty for one dataset."""
        recorded = self.config.robots if isinstance(self.config, PTRConfig) else ()
        return tuple(recorded) or tuple(part.name for part in self.data if part.name is not None)

    @property
    def needs_ptr_hf(self) -> bool:
        """Whether plain LeRobot cannot run the policy: belief tokens, a policy type or processors of ptr_hf's own."""
        return bool(self.config.num_belief_tokens or self.base.policy_type in OWN_POLICY_TYPES or self.robots)

    @property
    def weighed(self) -> bool:
        """Whether weights could leave 1; without them the loss is that of plain post-training."""
        record = vars(self.config).get("weights_record", {})
        given = self.config.weights is not None and not record.get("smallest", 0.0) == record.get("largest") == 1.0
        return (self.config.scorer or given) and self.config.alpha > 0.0

    @property
    def measured(self) -> list[Evaluation]:
        """The evaluations of this very checkpoint."""
        return [result for result in self.evaluations if result.step in (None, self.steps)]


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that training rests on, of those that are installed."""
    versions = {"Python": platform.python_version()}
    names = ("lerobot", "transformers", "torch", "accelerate", "peft", "datasets", "huggingface_hub")
    for label, name in {"ptr_hf": "lerobot_policy_ptr", **{name: name for name in names}}.items():
        try:
            versions[label] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
