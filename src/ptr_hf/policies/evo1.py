"""EVO1: an InternVL3 backbone whose hidden states condition a flow-matching action head."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from lerobot.policies.evo1.internvl3_embedder import IMAGENET_MEAN, IMAGENET_STD, _batched_pixel_values
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ptr_hf.constants import ACTION_DIM_PAD, EMPTY_CAMERA
from ptr_hf.policies.base import AdapterBase, part
from ptr_hf.policies.batches import (
    action_mask,
    all_true,
    belief_token_mask,
    refuse_stacked_frames,
    require_keys,
    without_unused,
)
from ptr_hf.policies.hooks import Call, Capture, captured_output, edited_call, patched, recorded_results
from ptr_hf.policies.tower import VisionTower, transformer_tower
from ptr_hf.policies.trace import Batch, Belief, BeliefMask, PolicyTrace, Views

ACTION_DIMS = "action_mask"


class Evo1Adapter(AdapterBase):
    """Reads an `Evo1Policy` (lerobot 0.6.1).

    H_t is what the action head attends to: the language model's last hidden states over images and instruction, then the
    state's token. A_t is the clean chunk through `action_head._project_actions`; C_t the output of `action_head.norm_out`.

    Belief tokens are prepended to the language model's sequence, because it is causal: only then do images and
    instruction read them. The head attends to them like to any other context token.

    LeRobot runs a frozen backbone (stage 1) without gradients; under a belief it passes them on, its weights still frozen.

    The consequence tower is the InternViT up to one of its layers, class token included.

    Raises:
        ValueError: the policy names no camera in its input features.
    """

    family = "evo1"
    preprocesses_rows = True
    reads_features = True
    masks_action_dims = True
    observations = (OBS_STATE,)
    # the action head has one width, which is the language model's
    context_dim = action_dim = part("config.embed_dim")
    _embedder = part("model.embedder")
    _vlm = part("model.embedder.model")

    def __init__(self, policy: nn.Module) -> None:
        super().__init__(policy)
        if not self.target_keys():
            raise ValueError("PTR needs to know an EVO1 policy's cameras: name them in its config's input_features.")

    @property
    def tower(self) -> VisionTower:
        """The InternViT without its final norm."""
        return transformer_tower(self._vlm.vision_tower, ("embeddings",), "encoder.layer", ("layernorm",))

    def _trace(self, batch: Batch, belief: AbstractContextManager[Any], views: Views | None) -> PolicyTrace:
        """One forward of `Evo1Policy.model`, without the waits of the policy's own logging."""
        policy = self.base
        batch = _with_used_dims(batch)
        action = batch[ACTION]
        with ExitStack() as scope:
            if views is None:
                images, image_masks = policy._collect_image_batches(batch)
            else:
                images, image_masks = self._enter_views(scope, views)
            state, _ = policy._prepare_state(batch)
            target, entries = policy._prepare_actions(batch)
            first = scope.enter_context(belief)
            seen = scope.enter_context(recorded_results(policy.model.action_head, "_prepare_context"))
            hidden = scope.enter_context(self._captured_hidden())
            scope.enter_context(policy._maybe_autocast())
            fused, fused_mask = policy._compute_fused_tokens(policy._normalize_task_batch(batch), images, image_masks)
            velocity, noise = policy.model(
                fused,
                state=state,
                actions_gt=target,
                action_mask=entries.to(target.dtype),
                embodiment_ids=policy._get_embodiment_ids(batch, state.shape[0]),
                context_mask=fused_mask,
            )
        context, padded, _ = seen[0]
        real = all_true(context) if padded is None else ~padded
        flow = ((target.float() - noise.float()) * entries).flatten(1)
        return PolicyTrace(
            loss=policy._compute_masked_loss(velocity.float(), flow, entries, "none"),
            context=context[:, first:].float(),
            context_mask=real[:, first:],
            action_tokens=self._projected({key: batch[key] for key in (ACTION, ACTION_DIMS) if key in batch}, batch),
            action_hidden=hidden.value.float(),
            action_mask=action_mask(batch, action),
        )

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the layers of InternViT and language model in the backward pass.

        Raises:
            ValueError: the backbone is frozen: LeRobot keeps it in eval mode, which recomputes nothing.
        """
        if not self.base._tracks_vlm_gradients:
            raise ValueError("A frozen EVO1 backbone has no gradient checkpointing: leave it out, or train stage 2.")
        self._vlm.gradient_checkpointing_enable({"use_reentrant": False})
        self._vlm.disable_input_require_grads()  # a hook that only reentrant checkpointing needs
        self._vlm.language_model.config.use_cache = False

    def compilable(self) -> Iterable[nn.Module]:
        """The layers' attention and feed-forward parts in InternViT and language model, and the head's blocks."""
        for layer in self._vlm.vision_tower.encoder.layer:
            yield from (layer.attention, layer.mlp)
        for layer in self._vlm.language_model.layers:
            yield from (layer.self_attn, layer.mlp)
        yield from self.base.model.action_head.transformer_blocks

    @contextmanager
    def _masked_chunks(self, unused: Bool[Tensor, "batch dims"]) -> Iterator[None]:
        """Add the unused dimensions to the ones that the head leaves out when it samples."""
        policy = self.base
        original = policy._prepare_inference_action_mask

        def prepare_inference_action_mask(rows: int) -> Bool[Tensor, "batch width"]:
            return without_unused(original(rows), unused)

        with patched(policy, "_prepare_inference_action_mask", prepare_inference_action_mask):
            yield

    def _enter_belief(self, scope: ExitStack, belief: Belief | None, mask: BeliefMask | None) -> int:
        """Prepend the belief to the language model's sequence, and say in the head's mask which of it is readable.

        Returns how many tokens there are.

        Raises:
            ValueError: the policy pools its context into one token.
        """
        if belief is None:
            return 0
        policy = self.base
        if policy.config.return_cls_only:
            raise ValueError(
                "A context that return_cls_only=True pools into one token has no place for a belief: set "
                "return_cls_only=False, or num_belief_tokens=0."
            )
        original = policy._compute_fused_tokens
        readable = belief_token_mask(belief, mask)

        def prepend(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
            embeddings, attention = kwargs["inputs_embeds"], kwargs["attention_mask"]
            return args, {
                **kwargs,
                "inputs_embeds": torch.cat([belief.to(embeddings.dtype), embeddings], dim=1),
                "attention_mask": torch.cat([readable.to(attention.dtype), attention], dim=1),
            }

        def compute_fused_tokens(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            with _tracked_gradients(policy.config):
                fused, attention = original(*args, **kwargs)
            return fused, torch.cat([readable, attention], dim=1)

        scope.enter_context(edited_call(self._vlm.language_model, prepend))
        scope.enter_context(patched(policy, "_compute_fused_tokens", compute_fused_tokens))
        return belief.shape[1]

    def _images_of(self, batch: Batch) -> Iterable[tuple[str, Tensor, Bool[Tensor, " rows"]]]:
        images, masks = self.base._collect_image_batches(batch)
        keys = [key for key in self.base.config.image_features if key in batch]
        return zip(keys, images, masks[:, : len(keys)].unbind(1), strict=True)

    def _embed_image(self, key: str, image: Float[Tensor, "rows 3 _ _"]) -> Float[Tensor, "rows patches dim"]:
        with self.base._maybe_autocast():
            return self._vlm.get_image_features(pixel_values=self._pixels(image)).pooler_output

    def _prepared(self, key: str, image: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *input"]:
        return self._pixels(image)

    def _captured_hidden(self, keep: str = "first") -> AbstractContextManager[Capture]:
        return captured_output(self.base.model.action_head.norm_out, keep)

    def _pixels(self, image: Float[Tensor, "batch 3 _ _"]) -> Float[Tensor, "batch 3 size size"]:
        embedder = self._embedder
        mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=embedder.device)
        return _batched_pixel_values([image], 1, embedder.image_size, mean, std, embedder.model_dtype, embedder.device)

    def _enter_views(
        self, scope: ExitStack, views: Views
    ) -> tuple[list[Float[Tensor, "batch patches dim"]], Bool[Tensor, "batch views"]]:
        """Let the embedder take features for images, and the vision tower return them as they are."""
        embedder, count = self._embedder, self.base.config.max_views
        masks = torch.stack(list(views.masks.values()), dim=1)
        rows = len(masks)
        masks = torch.cat([masks, masks.new_zeros(rows, count - masks.shape[1])], dim=1)

        def fused_embedding(
            camera_images: Sequence[Tensor], image_masks: Tensor, text_prompts: Sequence[str], return_cls_only: bool
        ) -> tuple[Tensor, Tensor | None]:
            # nothing attends to an absent view, so its features need not come from the tower
            blank = [torch.zeros_like(camera_images[0])] * (count - len(camera_images))
            stacked = torch.stack([*camera_images, *blank], dim=1).flatten(0, 1)
            return embedder._forward_vlm(stacked, [[1] * count] * rows, image_masks, text_prompts, return_cls_only)

        scope.enter_context(patched(embedder, "get_fused_image_text_embedding_batched", fused_embedding))
        scope.enter_context(patched(embedder.model, "get_image_features", _as_image_features))
        return list(views.features.values()), masks

    def _enter_features(self, scope: ExitStack, views: Views) -> Batch:
        prepared = self._enter_views(scope, views)
        scope.enter_context(patched(self.base, "_collect_image_batches", lambda _batch: prepared))
        return {}

    def _action_tokens(
        self, action: Float[Tensor, "batch steps dim"], batch: Batch
    ) -> Float[Tensor, "batch steps action_dim"]:
        return self._projected({ACTION: action}, batch)

    def _projected(self, chunk: Batch, batch: Batch) -> Float[Tensor, "batch steps action_dim"]:
        action, entries = self.base._prepare_actions(chunk)
        embodiment = self.base._get_embodiment_ids(batch, action.shape[0])
        return self.base.model.action_head._project_actions(action * entries, embodiment).float()

    def check(self, batch: Batch, *, training: bool, with_images: bool = True) -> None:
        """Refuse a batch that the policy cannot read."""
        require_keys(
            batch, [self.base.config.task_field if self.base.config.task_field in batch else "task"], self.family
        )
        super().check(batch, training=training, with_images=with_images)

    def _check_images(self, batch: Batch) -> None:
        # EVO1 takes as many absent cameras as its config announces, but needs one.
        cameras = list(self.base.config.image_features)
        missing = [key for key in cameras if key not in batch]
        if len(missing) > self.base.config.empty_cameras or len(missing) == len(cameras):
            require_keys(batch, [key for key in cameras if not key.startswith(EMPTY_CAMERA)], self.family)
        refuse_stacked_frames(batch, cameras, single_frame_ndim=4)


def _with_used_dims(batch: Batch) -> Batch:
    """Unused dimensions in the policy's own mask of action entries, with zeros where they were recorded."""
    unused = batch.get(ACTION_DIM_PAD)
    if unused is None:
        return batch
    action = batch[ACTION]
    entries = batch.get(ACTION_DIMS, torch.ones_like(action, dtype=torch.bool))
    return {**batch, ACTION: without_unused(action, unused), ACTION_DIMS: without_unused(entries, unused)}


@contextmanager
def _tracked_gradients(config: Any) -> Iterator[None]:
    """Let a frozen backbone pass gradients on: the policy looks at this flag when it embeds its context."""
    previous, config.finetune_vlm = config.finetune_vlm, True
    try:
        yield
    finally:
        config.finetune_vlm = previous


def _as_image_features(pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
    return BaseModelOutputWithPooling(pooler_output=pixel_values)
