"""One tiny policy of a family, and the batches the conformance suite runs it on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

TOP, WRIST, STATE, ENV = (
    "observation.images.top",
    "observation.images.wrist",
    "observation.state",
    "observation.environment_state",
)
STATE_DIM, ACTION_DIM, CHUNK = 14, 14, 6
TASKS = ("open the drawer", "press the handle", "reach", "push the puck to the goal")
PADDED_STEPS = 2


def predict_chunk(policy: PreTrainedPolicy, batch: dict[str, Any]) -> Tensor:
    """LeRobot's own prediction, which a rollout without belief must equal."""
    return policy.predict_action_chunk(batch)


@dataclass(frozen=True)
class Family:
    """One policy configuration.

    Attributes:
        name: the test id.
        build: makes the policy from (input_features, output_features) and `settings`.
        cameras: image features of the policy.
        env_state: whether the policy reads an environment state.
        settings: of the builder.
        lora: a pattern of linear modules, the action head's projections among them.
        tower: the first module of the vision tower, to count its passes by; None for a policy that sees no images.
        core: the module whose forward is the one forward of a training step ("" is the policy itself).
        image_size: side of the square images, in pixels.
        observation_steps: observations per row; above 1 they are stacked on a time axis.
        reads: observations, cameras aside, whose absence from a preprocessed batch must be refused.
        masks_padding: whether LeRobot's own loss leaves padded action steps out.
        regression: whether the head predicts the chunk without seeing a noised one.
        waits: whether LeRobot's own forward waits for the device, so that a trace cannot help it.
        action_tokens: length of A_t and C_t; only a policy that writes its chunk as text has another than the steps.
        targets: what a training batch must hold besides observations.
        context_reads_belief: whether H_t depends on the belief; not where both enter the head side by side.
        adapts_projector: whether LoRA can reach the projector that A_t goes through.
        pickles: whether LeRobot's policy can be pickled.
        half: brings the policy's weights to the bfloat16 that it supports (VLM, not heads); None where it supports none.
        checkpoints: whether LeRobot's policy has gradient checkpointing.
        compiles: whether parts of the policy can be compiled in place.
        predict: LeRobot's own prediction of a chunk from a preprocessed observation.
    """

    name: str
    build: Callable[..., PreTrainedPolicy]
    cameras: tuple[str, ...] = (TOP,)
    env_state: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    lora: str = ".*"
    tower: str | None = None
    core: str = "model"
    image_size: int = 32
    observation_steps: int = 1
    reads: tuple[str, ...] = (STATE,)
    masks_padding: bool = True
    regression: bool = False
    waits: bool = False
    half: Callable[[PreTrainedPolicy], None] | None = None
    checkpoints: bool = False
    compiles: bool = False
    action_tokens: int = CHUNK
    targets: tuple[str, ...] = ("action",)
    context_reads_belief: bool = True
    adapts_projector: bool = True
    pickles: bool = True
    predict: Callable[[PreTrainedPolicy, dict[str, Any]], Tensor] = predict_chunk

    @property
    def writes_tokens(self) -> bool:
        """Whether A_t are text tokens, which no single step can be read from."""
        return self.action_tokens != CHUNK

    def action_mask(self, batch: dict[str, Any]) -> Tensor:
        """Which of A_t are real."""
        pad = batch["action_is_pad"]
        return batch["action.token_mask"] & ~pad.all(1, keepdim=True) if self.writes_tokens else ~pad

    @property
    def features(self) -> tuple[dict[str, PolicyFeature], dict[str, PolicyFeature]]:
        image = (3, self.image_size, self.image_size)
        inputs = {key: PolicyFeature(FeatureType.VISUAL, image) for key in self.cameras}
        inputs[STATE] = PolicyFeature(FeatureType.STATE, (STATE_DIM,))
        if self.env_state:
            inputs[ENV] = PolicyFeature(FeatureType.ENV, (5,))
        return inputs, {"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))}

    def policy(self, **settings: Any) -> PreTrainedPolicy:
        return self.build(self.features, **{**self.settings, **settings})

    def batch(self, policy: PreTrainedPolicy, rows: int = 4, seed: int = 0) -> dict[str, Any]:
        """A collated training batch after the policy's own preprocessor; every row's last steps are padding."""
        generator = torch.Generator().manual_seed(seed)
        steps = () if self.observation_steps == 1 else (self.observation_steps,)
        normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        image = (3, self.image_size, self.image_size)
        raw: dict[str, Any] = {key: torch.rand(rows, *steps, *image, generator=generator) for key in self.cameras}
        raw |= {STATE: normal(rows, *steps, STATE_DIM), "action": normal(rows, CHUNK, ACTION_DIM)}
        raw["task"] = list(TASKS[:rows])
        if self.env_state:
            raw[ENV] = normal(rows, *steps, 5)
        raw["action_is_pad"] = torch.arange(CHUNK).expand(rows, CHUNK) >= CHUNK - PADDED_STEPS
        preprocessor, _ = make_pre_post_processors(policy.config, dataset_stats=self.stats)
        return preprocessor(raw)

    @property
    def stats(self) -> dict[str, dict[str, Tensor]]:
        """Dataset statistics for whichever normalisation the policy uses."""
        values = {"mean": 0.1, "std": 0.7, "min": -3.0, "max": 3.0, "q01": -2.0, "q99": 2.0, "q10": -1.5, "q90": 1.5}
        return {
            key: {name: torch.full(feature.shape, value) for name, value in values.items()}
            for key, feature in {**self.features[0], **self.features[1]}.items()
        }
