"""pi0 and pi0.5: a PaliGemma backbone whose keys and values condition a flow-matching Gemma expert."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from jaxtyping import Float
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from torch import Tensor

from ptr_hf.constants import CAMERA_MASK_SUFFIX
from ptr_hf.policies.base import part
from ptr_hf.policies.flow_vla import FlowVLAAdapter, Images
from ptr_hf.policies.hooks import patched
from ptr_hf.policies.trace import Batch, Belief, RolloutTrace


class OpenPIAdapter(FlowVLAAdapter):
    """What pi0 and pi0.5 share beyond `FlowVLAAdapter`; the prefix is images and instruction, all in one block.

    LeRobot's own loss averages over padded steps; here they are left out. Its models read no camera masks either, only
    whether a camera is in the batch at all: rows that `<camera>_padding_mask` marks False are hidden here, in training
    and in `rollout`.

    With gradient checkpointing the policy runs its layers again during backward, after the hooks are gone. Image
    embeddings that were given are therefore not recomputed: `encode_views` checkpoints them itself.
    """

    preparation = "_preprocess_images"
    language_models: tuple[str, ...] = (
        "model.paligemma_with_expert.paligemma.model.language_model",
        "model.paligemma_with_expert.gemma_expert.model",
    )
    _experts = part("model.paligemma_with_expert")
    _vision = part("model.paligemma_with_expert.paligemma.model.vision_tower.vision_model")

    def rollout(self, batch: Batch, belief: Belief | None = None, **kwargs: Any) -> RolloutTrace:
        """Sample a chunk under the belief; `kwargs` (noise, num_steps, real-time chunking) go to the policy."""
        with self._masked_cameras():
            return super().rollout(batch, belief, **kwargs)

    def gradient_checkpointing_enable(self) -> None:
        """The policy's own, of vision tower, language model and expert."""
        self.base.model.gradient_checkpointing_enable()

    def _images(self, batch: Batch) -> Images:
        return self._masked_images(self.base._preprocess_images, batch)

    def _masked_cameras(self) -> AbstractContextManager[None]:
        """While open, the policy's own preparation honours camera masks."""
        policy = self.base
        return patched(policy, "_preprocess_images", partial(self._masked_images, policy._preprocess_images))

    def _masked_images(self, prepare: Callable[[Batch], Images], batch: Batch) -> Images:
        images, masks = prepare(batch)
        present = [key for key in self.base.config.image_features if key in batch]
        for index, key in enumerate(present):
            real = batch.get(key + CAMERA_MASK_SUFFIX)
            if real is not None:
                masks[index] = masks[index] & real.bool()
        return images, masks

    def _losses(
        self, images: Images, batch: Batch, action: Float[Tensor, "batch steps dim"]
    ) -> Float[Tensor, "batch steps padded_dim"]:
        model = self.base.model
        action = self.base.prepare_action({ACTION: action})
        noise = model.sample_noise(action.shape, action.device)
        time = model.sample_time(action.shape[0], action.device)
        language = (batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK])
        return model.forward(*images, *language, *self._suffix(batch), action, noise, time)

    def _suffix(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the expert reads besides the noised chunk."""
        return ()

    def _embed_image(self, key: str, image: Float[Tensor, "batch 3 _ _"]) -> Float[Tensor, "batch patches context_dim"]:
        return self.base.model._apply_checkpoint(self._experts.embed_image, image)

    @contextmanager
    def _embedded(self, features: list[Float[Tensor, "batch patches context_dim"]]) -> Iterator[None]:
        model = self.base.model
        original = model._apply_checkpoint

        def apply(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            # A patched `embed_image` would be gone when backward recomputes it.
            given = any(args[0] is feature for feature in features)
            return args[0] if given else original(function, *args, **kwargs)

        with patched(model, "_apply_checkpoint", apply):
            yield


class PI0Adapter(OpenPIAdapter):
    """Reads a `PI0Policy` (lerobot 0.6.1): the state is the first token of the expert, so H_t does not hold it."""

    family = "pi0"

    def _suffix(self, batch: Batch) -> tuple[Tensor, ...]:
        return (self.base.prepare_state(batch),)


class PI05Adapter(OpenPIAdapter):
    """Reads a `PI05Policy` (lerobot 0.6.1): its preprocessor writes the state into the instruction."""

    family = "pi05"
    preprocesses_rows = True
    observations = (OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK)
