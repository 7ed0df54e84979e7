"""`PTRConfig`: a LeRobot policy configuration that wraps the configuration of a base policy."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import draccus
import lerobot.policies  # noqa: F401  registers LeRobot's own policy configurations
from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig, LRSchedulerConfig, OptimizerConfig, XVLAAdamWConfig

import ptr_hf.policies.configuration_smolvla_state  # noqa: F401  registers the policy type `smolvla_state`
from ptr_hf.data.segments import SegmentLayout
from ptr_hf.files.base_source import check_base
from ptr_hf.hyperparameters import PTRHyperparameters
from ptr_hf.scores import WHOLE_EPISODE

PTR_CONFIG_NAME = "ptr_config.json"
RETIRED = ("num_episodes", "num_slots", "num_tasks")
"""Fields that said how large the training data were: LeRobot parses files of earlier releases, which have them, by itself."""


@PreTrainedConfig.register_subclass("ptr")
@dataclass(kw_only=True)
class PTRConfig(PTRHyperparameters, PreTrainedConfig):
    """Configuration of `PTRPolicy`: the method's hyperparameters and the base policy they post-train.

    Give `base` (a LeRobot policy configuration as a dict with its `type`) to start from random weights, `base_path` (a Hub
    id or a folder) to post-train a checkpoint, or both to override fields of the checkpoint's configuration.

    Raises:
        ValueError: a hyperparameter is out of range, or the base is missing, unknown or another PTR policy.

    Example:
        >>> PTRConfig(base_path="lerobot/smolvla_base", preset="ptr", num_belief_tokens=0).alpha
        1.0
    """

    weights_reader: ClassVar[Callable[[Any, Any, Any], Any] | None] = None
    """Under LeRobot's own loop: the weights that `weights` names, for a configuration, a dataset's folder and its metadata.
    `lerobot_policy_ptr` sets it."""

    base: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Configuration of the base policy, e.g. {type: act, chunk_size: 16}."}
    )
    base_path: str | None = field(default=None, metadata={"help": "Hub id or folder of the base policy."})
    base_revision: str | None = field(default=None, metadata={"help": "Revision of base_path on the Hub."})
    run_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps of the run that trains the policy, of which scorer_warmup_steps takes its share; PTRTrainer sets "
            "it, LeRobot's training loop leaves it open (then the warm-up is the paper's 3000 steps)."
        },
    )
    robots: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Sources of the mixture that the policy was trained on; set when it is known. Its action is then a vector of "
            "slots, whatever the environment's or robot's own is."
        },
    )
    weights_record: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Which weights the policy was trained with, and what they are in sum; set when it is known."},
    )

    num_episodes: int | None = field(default=None, metadata={"help": "Not read any more."})
    num_slots: int | None = field(default=None, metadata={"help": "Not read any more."})
    num_tasks: int | None = field(default=None, metadata={"help": "Not read any more."})

    def __post_init__(self, _filled: Mapping[str, Any] | None) -> None:
        self.num_episodes = self.num_slots = self.num_tasks = None
        PreTrainedConfig.__post_init__(self)
        PTRHyperparameters.__post_init__(self, _filled)
        self._base_config: PreTrainedConfig | None = None

    @property
    def base_config(self) -> PreTrainedConfig:
        """The base policy's configuration, read once; PTR's features and device always replace its own."""
        if self._base_config is None:
            self._base_config = self._read_base()
        config = self._base_config
        config.device = self.device
        if self.robots and self._owns_features:
            # LeRobot gives a policy the features of the environment it will run in; the processors make these of the slots
            return config
        if self.input_features:
            config.input_features = self.input_features
        if self.output_features:
            config.output_features = self.output_features
        return config

    @property
    def _owns_features(self) -> bool:
        return "output_features" in self.base

    @property
    def needs_ptr_hf(self) -> bool:
        """Whether plain LeRobot could not run the policy: it carries a belief, or several robots' slots."""
        return self.num_belief_tokens > 0 or bool(self.robots)

    def adopt(self, config: PreTrainedConfig) -> None:
        """Take the configuration of a base policy that already exists as the base."""
        self._base_config = config
        self.base = draccus.encode(config, PreTrainedConfig)
        self.input_features, self.output_features = config.input_features, config.output_features
        self.device, self.n_obs_steps = config.device, config.n_obs_steps

    def _read_base(self) -> PreTrainedConfig:
        choices = PreTrainedConfig.get_known_choices()
        if not self.base and self.base_path is None:
            raise ValueError(
                "PTRConfig has no base policy: set base={'type': 'act', ...} for a new policy or base_path to a Hub id or "
                "folder for a pretrained one."
            )
        overrides = dict(self.base)
        # A saved configuration holds the base policy's in full: base_path is then a record, which may be gone.
        if self.base_path is not None and not _is_whole(overrides):
            check_base(self.base_path, self.base_revision, trusted=list(self.base.values()))
            config = PreTrainedConfig.from_pretrained(self.base_path, revision=self.base_revision)
            overrides = {**draccus.encode(config, PreTrainedConfig), **overrides}
        policy_type = overrides.pop("type", None)
        if policy_type not in choices or policy_type == "ptr":
            known = ", ".join(sorted(name for name in choices if name != "ptr"))
            raise ValueError(f"The base policy's type {policy_type!r} is unknown; LeRobot has {known}.")
        if self.chunk_size is not None:
            overrides |= chunk_settings(choices[policy_type], self.chunk_size, overrides)
        overrides["device"] = self.device
        # A base on its own asks where to push; PTR publishes the whole.
        overrides["push_to_hub"] = False
        try:
            return draccus.decode(choices[policy_type], overrides)
        except draccus.ParsingError as error:
            reason = error.__cause__ or error
            raise ValueError(
                f"The configuration of the base policy {policy_type!r} does not parse: {reason}"
            ) from error

    @property
    def state_dim(self) -> int:
        """Width of the robot's recorded state; 0 where the policy reads none."""
        state = self.robot_state_feature
        return state.shape[0] if state else 0

    @property
    def layout(self) -> SegmentLayout:
        """Which frames a training sample reads."""
        actions, steps = self._action_steps, self._observation_steps
        # the first frame that the chunk's actions do not reach
        after = actions[-1] + 1
        return SegmentLayout(
            observation_steps=None if steps is None else tuple(steps),
            action_steps=tuple(actions),
            segment_length=self.segment_length or 1,
            chunk_stride=self.chunk_stride or after,
            consequence_offset=(self.consequence_offset or after) if self.reads_futures else None,
        )

    @property
    def _observation_steps(self) -> list[int] | None:
        """The base policy's, without the coming frames that a world model would learn from: PTR keeps futures apart."""
        steps = self.base_config.observation_delta_indices
        if steps is None or not self.scorer or max(steps) <= 0:
            return steps
        present = [step for step in steps if step <= 0]
        return None if present == [0] else present

    @property
    def _action_steps(self) -> list[int]:
        base = self.base_config
        if base.action_delta_indices is None:
            raise ValueError(f"The base policy {base.type!r} predicts no action chunks, which PTR needs.")
        return base.action_delta_indices

    @property
    def slot_frames(self) -> int:
        """Frames that share one verdict: a whole episode's, a stretch's or a chunk's."""
        if self.aggregation == "trajectory":
            return WHOLE_EPISODE
        return self.aggregation_frames or 2 * self.resolved_chunk_size

    @property
    def resolved_chunk_size(self) -> int:
        """L: the configured chunk size, or the base policy's own (a diffusion policy's horizon)."""
        return self.chunk_size or len(self._action_steps)

    @property
    def normalization_mapping(self) -> dict[str, NormalizationMode]:
        """The base policy's own."""
        return vars(self.base_config)["normalization_mapping"]

    @property
    def observation_delta_indices(self) -> list[int] | None:
        """Observation offsets of a segment, for LeRobot's dataset factory."""
        return self.layout.observation_offsets

    @property
    def action_delta_indices(self) -> list[int]:
        """Action offsets of a segment, for LeRobot's dataset factory."""
        return self.layout.action_offsets

    @property
    def reward_delta_indices(self) -> None:
        """PTR reads no rewards."""
        return None

    def get_optimizer_preset(self) -> OptimizerConfig:
        """The base policy's own, as plain AdamW where it would group parameters by name: PTR's groups are made already."""
        preset = self.base_config.get_optimizer_preset()
        if isinstance(preset, XVLAAdamWConfig):
            return AdamWConfig(preset.lr, preset.weight_decay, preset.grad_clip_norm, preset.betas, preset.eps)
        return preset

    def get_scheduler_preset(self) -> LRSchedulerConfig | None:
        """The base policy's own."""
        return self.base_config.get_scheduler_preset()

    def validate_features(self) -> None:
        """The base policy validates its own features."""
        self.base_config.validate_features()

    def to_dict(self) -> dict[str, Any]:
        """The whole configuration as plain values; transformers' logging callbacks ask for it."""
        return draccus.encode(self, PreTrainedConfig)

    def to_json_string(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def _save_pretrained(self, save_directory: Path) -> None:
        if self._base_config is not None:
            self.base = draccus.encode(self.base_config, PreTrainedConfig)
        super()._save_pretrained(save_directory)


def chunk_settings(policy_config: type, size: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Fields of a LeRobot policy configuration that make it predict chunks of `size` steps and execute what it can.

    Args:
        policy_config: the configuration's class.
        size: L.
        settings: its other fields, where they are not the class's defaults.
    """
    defaults = {item.name: item.default for item in fields(policy_config)}
    values = {**defaults, **settings}
    # a policy with a history predicts from its first observation on
    steps = size - values["n_obs_steps"] + 1
    executed = min(steps, settings.get("n_action_steps", steps))
    return {"chunk_size" if "chunk_size" in defaults else "horizon": size, "n_action_steps": executed}


def _is_whole(base: dict[str, Any]) -> bool:
    """Whether a configuration dict sets every field of its policy type."""
    choices = PreTrainedConfig.get_known_choices()
    policy_type = base.get("type")
    return policy_type in choices and {item.name for item in fields(choices[policy_type]) if item.init} <= base.keys()
