"""The processor steps of a policy that was trained on several robots: from a robot's own values to the policy's, and back.

They carry the layouts and the statistics of every source, so a checkpoint needs nothing else to run on each of its robots. In
training a row says which source it is from; a robot is told to the steps once, as `source`.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from lerobot.configs import PipelineFeatureType, PolicyFeature
from lerobot.lerobot_types import EnvTransition, TransitionKey
from lerobot.processor import PolicyProcessorPipeline, ProcessorStep, ProcessorStepRegistry
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from ptr_hf.constants import ACTION_DIM_PAD, CAMERA_MASK_SUFFIX
from ptr_hf.data.mixture.action_space import from_slots, to_slots, unused_slots
from ptr_hf.data.mixture.dataset import resized
from ptr_hf.data.mixture.metadata import MixtureMetadata
from ptr_hf.data.segments import OBS_SOURCE, SOURCE_INDEX

OBSERVATION_STEP = "ptr_embodiment_observation"
ACTION_STEP = "ptr_embodiment_action"


@dataclass
class EmbodimentStep(ProcessorStep):
    """What both steps know: the robots, their slots and their statistics.

    Args:
        size, state_size: of the policy's action and state vector.
        robots: of every source its `name`, `embodiment`, the slots `action` and `state` as positions, and `rename`.
        cameras: the policy's key of every camera -> (height, width, channels).
        source: the robot that is run, a source's name or its embodiment's; not needed where there is one, and in training.
        statistics: `<key>.offset` and `<key>.scale`, stacked by source.
    """

    size: int
    state_size: int
    robots: list[dict[str, Any]]
    cameras: dict[str, list[int]] = field(default_factory=dict)
    source: str | None = None
    statistics: dict[str, Float[Tensor, "sources *rest"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.source is not None:
            self._find(self.source)

    @property
    def number(self) -> int:
        """Of the source whose robot is run.

        Raises:
            ValueError: there are several, and none was chosen.
        """
        if self.source is not None:
            return self._find(self.source)
        if len(self.robots) > 1:
            raise ValueError(
                f"This policy was trained on several robots: say which it runs on, one of {', '.join(self._names)}. In Python: "
                f"for_robot(pipeline, {self._names[0]!r}); for lerobot-eval: ptr-export --robot {self._names[0]} ..."
            )
        return 0

    @property
    def _names(self) -> list[str]:
        return [robot["name"] for robot in self.robots]

    def _find(self, name: str) -> int:
        found = [number for number, known in enumerate(self._names) if known == name]
        found = found or [number for number, robot in enumerate(self.robots) if robot["embodiment"] == name]
        if len(found) != 1:
            raise ValueError(
                f"source={name!r} names {len(found)} of the policy's sources; choose one of {', '.join(self._names)}."
            )
        return found[0]

    def get_config(self) -> dict[str, Any]:
        """Everything but the statistics, as plain values."""
        return {
            "size": self.size,
            "state_size": self.state_size,
            "robots": self.robots,
            "cameras": self.cameras,
            "source": self.source,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The statistics."""
        return {name: value.cpu() for name, value in self.statistics.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The statistics."""
        self.statistics = dict(state)

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        """Nothing is said about a robot's own features."""
        return features

    def _statistic(self, name: str, like: Tensor) -> Float[Tensor, "sources *rest"]:
        if self.statistics[name].device != like.device:
            self.statistics = {key: value.to(like.device) for key, value in self.statistics.items()}
        return self.statistics[name]

    def _of_rows(self, name: str, rows: Int[Tensor, " rows"], like: Tensor, feature_ndim: int) -> Tensor:
        """A statistic for every row, ready to be broadcast over a row's time steps."""
        taken = self._statistic(name, like).index_select(0, rows)
        return taken.reshape(len(rows), *[1] * (like.ndim - 1 - feature_ndim), *taken.shape[1:])

    def _normalized(self, key: str, value: Tensor, rows: Int[Tensor, " rows"], feature_ndim: int) -> Tensor:
        if f"{key}.offset" not in self.statistics:
            return value
        offset = self._of_rows(f"{key}.offset", rows, value, feature_ndim)
        return (value - offset) / self._of_rows(f"{key}.scale", rows, value, feature_ndim)


@ProcessorStepRegistry.register(OBSERVATION_STEP)
@dataclass
class EmbodimentObservationStep(EmbodimentStep):
    """Observations and recorded actions of any of the robots in the policy's form, normalised by their own statistics.

    A training batch has slots and cameras already and says its rows' sources (`observation.source`). A robot's observation
    has the robot's own state and cameras, with or without a batch axis.
    """

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        """Add `source_index` and, where some robot lacks a slot, `action_dim_is_pad` by row; and normalise."""
        observation = dict(transition.get(TransitionKey.OBSERVATION) or {})
        rows = observation.pop(OBS_SOURCE, None)
        if rows is None:
            observation, rows = self._from_robot(observation)
        for key, value in observation.items():
            if key == OBS_STATE:
                observation[key] = self._normalized(key, value, rows, feature_ndim=1)
            elif key in self.cameras:
                observation[key] = self._normalized(key, value, rows, feature_ndim=3)
        result = transition.copy()
        result[TransitionKey.OBSERVATION] = observation
        action = transition.get(TransitionKey.ACTION)
        if isinstance(action, Tensor) and action.shape[-1] == self.size and len(action) == len(rows):
            result[TransitionKey.ACTION] = self._normalized(ACTION, action, rows, feature_ndim=1)
        known = dict(transition.get(TransitionKey.COMPLEMENTARY_DATA) or {})
        known[SOURCE_INDEX] = rows
        if any(len(robot["action"]) < self.size for robot in self.robots):
            # robots with one and the same action need no mask, which some policies cannot read
            known[ACTION_DIM_PAD] = self._unused(rows)
        result[TransitionKey.COMPLEMENTARY_DATA] = known
        return result

    def _from_robot(self, observation: Mapping[str, Any]) -> tuple[dict[str, Any], Int[Tensor, " rows"]]:
        """The observation of the robot that is run, with a batch axis."""
        number = self.number
        robot = self.robots[number]
        renamed = {robot["rename"].get(key, key): value for key, value in observation.items()}
        placed = {key: value for key, value in renamed.items() if key != OBS_STATE and key not in self.cameras}
        count, device = 1, torch.device("cpu")
        if (state := renamed.get(OBS_STATE)) is not None:
            state = torch.as_tensor(state, dtype=torch.float32)
            state = state[None] if state.ndim == 1 else state
            if state.shape[-1] != len(robot["state"]):
                raise ValueError(
                    f"The robot {robot['name']!r} has a state of {len(robot['state'])} values, and {OBS_STATE} holds "
                    f"{state.shape[-1]}."
                )
            placed[OBS_STATE] = to_slots(state, robot["state"], self.state_size)
            count, device = len(state), state.device
        for key, (height, width, _) in self.cameras.items():
            if (frames := renamed.get(key)) is not None:
                frames = torch.as_tensor(frames)
                frames = frames[None] if frames.ndim == 3 else frames
                placed[key] = resized(frames, (height, width)).to(torch.float32) / 255.0
                count, device = len(frames), frames.device
        for key, (height, width, channels) in self.cameras.items():
            if key not in placed:
                placed[key] = torch.zeros(count, channels, height, width, device=device)
                placed[key + CAMERA_MASK_SUFFIX] = torch.zeros(count, dtype=torch.bool, device=device)
        return placed, torch.full((count,), number, device=device)

    def _unused(self, rows: Int[Tensor, " rows"]) -> Bool[Tensor, "rows size"]:
        table = torch.stack([unused_slots(robot["action"], self.size) for robot in self.robots])
        return table.to(rows.device)[rows]


@ProcessorStepRegistry.register(ACTION_STEP)
@dataclass
class EmbodimentActionStep(EmbodimentStep):
    """The policy's action as the robot that is run takes it: its own values in its own order and units."""

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        """(..., size) -> (..., robot's own action)."""
        action = transition.get(TransitionKey.ACTION)
        if not isinstance(action, Tensor):
            return transition
        number = self.number
        offset = self._statistic(f"{ACTION}.offset", action)[number]
        scale = self._statistic(f"{ACTION}.scale", action)[number]
        result = transition.copy()
        result[TransitionKey.ACTION] = from_slots(action * scale + offset, self.robots[number]["action"])
        return result


def embodiment_steps(
    meta: MixtureMetadata, statistics: Mapping[str, Tensor]
) -> tuple[EmbodimentObservationStep, EmbodimentActionStep]:
    """The first step of a preprocessor and the last of a postprocessor.

    Args:
        meta: of the mixture.
        statistics: `ptr_hf.data.mixture.statistics.mixture_statistics` of it.
    """
    shared: dict[str, Any] = {
        "size": len(meta.space),
        "state_size": len(meta.state_space),
        "robots": [
            {
                "name": source.name,
                "embodiment": source.robot.name,
                "action": list(source.action),
                "state": list(source.state),
                "rename": source.cameras,
            }
            for source in meta.sources
        ],
        "cameras": {key: list(meta.features[key]["shape"]) for key in meta.camera_keys},
    }
    of_action = {name: value for name, value in statistics.items() if name.startswith(f"{ACTION}.")}
    return (
        EmbodimentObservationStep(**shared, statistics=dict(statistics)),
        EmbodimentActionStep(**shared, statistics=of_action),
    )


def for_robot(pipeline: PolicyProcessorPipeline, source: str) -> PolicyProcessorPipeline:
    """The same pipeline for one of the robots that the policy was trained on.

    Args:
        pipeline: a pre- or postprocessor.
        source: the source's name, or its robot's.

    Raises:
        ValueError: the policy knows no such robot.
    """
    if not any(isinstance(step, EmbodimentStep) for step in pipeline.steps):
        raise ValueError(f"This policy was trained on one robot, so there is no {source!r} to choose.")
    chosen = copy(pipeline)
    chosen.steps = [
        replace(step, source=source) if isinstance(step, EmbodimentStep) else step for step in pipeline.steps
    ]
    return chosen


def robots_of(pipeline: PolicyProcessorPipeline) -> tuple[str, ...]:
    """The sources that a policy's processor knows; empty for a policy of one robot."""
    return tuple(robot["name"] for step in pipeline.steps if isinstance(step, EmbodimentStep) for robot in step.robots)


def check_robots(preprocessor: PolicyProcessorPipeline, meta: Any) -> None:
    """Refuse data of other sources than a policy's processors know, whose numbers would mean other robots.

    Args:
        preprocessor: of the policy.
        meta: of the data, LeRobot's or a mixture's.

    Raises:
        ValueError: the numbers of sources differ, or a layout does.
    """
    known = [
        (robot["action"], robot["state"])
        for step in preprocessor.steps
        if isinstance(step, EmbodimentStep)
        for robot in step.robots
    ]
    sources = meta.sources if isinstance(meta, MixtureMetadata) else ()
    given = [(list(source.action), list(source.state)) for source in sources]
    if known != given:
        raise ValueError(
            f"The policy was trained on {_described(robots_of(preprocessor))}, and {meta.repo_id} is "
            f"{_described([source.name for source in sources])}: give the same sources in the same order."
        )


def _described(names: Sequence[str]) -> str:
    return f"a mixture of {', '.join(names)}" if names else "no mixture"
