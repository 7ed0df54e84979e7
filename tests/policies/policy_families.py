"""The policies every adapter is tested on: real LeRobot classes and processors, tiny random weights.

A new adapter joins the conformance suite with one line in `FAMILIES`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pretrained import PreTrainedPolicy

from ptr_hf.policies.tiny import tiny_act, tiny_smolvla, write_tiny_vlm

TOP, WRIST, STATE, ENV = (
    "observation.images.top",
    "observation.images.wrist",
    "observation.state",
    "observation.environment_state",
)
IMAGE_SHAPE, STATE_DIM, ACTION_DIM, CHUNK = (3, 32, 32), 14, 14, 6
TASKS = ("open the drawer", "press the handle", "reach", "push the puck to the goal")
PADDED_STEPS = 2


@cache
def vlm_folder() -> Path:
    """A SmolVLM small enough for hundreds of forwards in a minute."""
    return write_tiny_vlm(
        mkdtemp(prefix="tiny_vlm_"),
        image_size=32,
        patch_size=8,
        vision_dim=32,
        text_dim=32,
        text_layers=2,
        texts=TASKS,
    )


def _features(cameras: tuple[str, ...], env_state: bool) -> tuple[dict[str, PolicyFeature], dict[str, PolicyFeature]]:
    inputs = {key: PolicyFeature(FeatureType.VISUAL, IMAGE_SHAPE) for key in cameras}
    inputs[STATE] = PolicyFeature(FeatureType.STATE, (STATE_DIM,))
    if env_state:
        inputs[ENV] = PolicyFeature(FeatureType.ENV, (5,))
    return inputs, {"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))}


def _smolvla(features: Any, **settings: Any) -> PreTrainedPolicy:
    return tiny_smolvla(features, vlm_folder(), chunk_size=CHUNK, num_steps=2, **settings)


def _act(features: Any, **settings: Any) -> PreTrainedPolicy:
    return tiny_act(features, chunk_size=CHUNK, dim_model=32, **settings)


@dataclass(frozen=True)
class Family:
    """One policy configuration.

    Attributes:
        name: the test id.
        build: makes the policy from its features.
        cameras: image features of the policy.
        env_state: whether the policy reads an environment state.
        settings: of the builder.
        lora: a pattern of linear modules, the action head's projections among them.
        tower: the first module of the vision tower, to count its passes by; None for a policy that sees no images.
    """

    name: str
    build: Callable[..., PreTrainedPolicy]
    cameras: tuple[str, ...] = (TOP,)
    env_state: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    lora: str = ".*"
    tower: str | None = None

    @property
    def features(self) -> tuple[dict[str, PolicyFeature], dict[str, PolicyFeature]]:
        return _features(self.cameras, self.env_state)

    def policy(self, **settings: Any) -> PreTrainedPolicy:
        return self.build(self.features, **{**self.settings, **settings})

    def batch(self, policy: PreTrainedPolicy, rows: int = 4, seed: int = 0) -> dict[str, Any]:
        """A collated training batch after the policy's own preprocessor; every row's last steps are padding."""
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        raw: dict[str, Any] = {key: torch.rand(rows, *IMAGE_SHAPE, generator=generator) for key in self.cameras}
        raw |= {STATE: normal(rows, STATE_DIM), "action": normal(rows, CHUNK, ACTION_DIM), "task": list(TASKS[:rows])}
        if self.env_state:
            raw[ENV] = normal(rows, 5)
        raw["action_is_pad"] = torch.arange(CHUNK).expand(rows, CHUNK) >= CHUNK - PADDED_STEPS
        stats = {
            key: {"mean": torch.full(feature.shape, 0.1), "std": torch.full(feature.shape, 0.7)}
            for key, feature in {**self.features[0], **self.features[1]}.items()
        }
        preprocessor, _ = make_pre_post_processors(policy.config, dataset_stats=stats)
        return preprocessor(raw)


_SMOLVLA = {
    "build": _smolvla,
    "lora": r".*(action_in_proj|action_out_proj|state_proj|lm_expert.*[qv]_proj)",
    "tower": "model.vlm_with_expert.vlm.model.vision_model.embeddings",
}
_STATE = {"build": _smolvla, "cameras": (), "lora": r".*(action_in_proj|action_out_proj|lm_expert.*[qv]_proj)"}
_ACT = {"build": _act, "lora": r".*(action_head|linear1|action_input_proj)", "tower": "model.backbone.conv1"}

FAMILIES = (
    Family("smolvla", **_SMOLVLA),
    Family("smolvla-two-cameras", cameras=(TOP, WRIST), settings={"empty_cameras": 1}, **_SMOLVLA),
    Family("smolvla-frozen", settings={"freeze_vision_encoder": True, "train_expert_only": True}, **_SMOLVLA),
    Family("smolvla-state", **_STATE),
    Family("smolvla-state-frozen", settings={"train_state_proj": False, "expert_width_multiplier": 1.0}, **_STATE),
    Family("act", cameras=(TOP, WRIST), **_ACT),
    Family("act-vae", settings={"use_vae": True, "n_decoder_layers": 2}, **_ACT),
    Family("act-state", cameras=(), env_state=True, **{**_ACT, "tower": None}),
)
