"""What the diffusion policies share: a denoiser under one conditioning vector, made of an observation history."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from lerobot.policies.utils import populate_queues
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_IMAGES
from torch import Tensor, nn
from torch.nn import functional

from ptr_hf.constants import ACTION_PAD
from ptr_hf.policies.base import AdapterBase
from ptr_hf.policies.batches import (
    action_mask,
    all_true,
    belief_token_mask,
    per_sample_mean,
    refuse_stacked_frames,
    require_keys,
    unused_dims,
    without_unused,
)
from ptr_hf.policies.hooks import (
    Call,
    Capture,
    captured_result,
    edited_call,
    patched,
    preserved_modes,
    recorded_results,
)
from ptr_hf.policies.tower import VisionTower
from ptr_hf.policies.trace import Batch, Belief, BeliefMask, PolicyTrace, RolloutTrace, Views


class ConditionedAdapter(AdapterBase):
    """Reads a policy whose denoiser sees the n observation steps as one vector (B, n · width).

    H_t is that vector, one token per step, as it is before any belief. There is no sequence to put belief tokens in: the
    mean of the readable ones is added to every step's conditioning, and none adds nothing. So H_t does not depend on the
    belief, which C_t and the loss do. The elementwise loss is the one LeRobot computes and averages, kept as it passes.

    The consequence tower is cut from the policy's image encoder, one per camera where the policy has separate ones. A
    policy without cameras feeds its state raw, so that state, normalised, is the target itself. A tower with batch norm
    is never shared: its statistics move in training.
    """

    condition = "global_cond"
    """The denoiser's keyword for the conditioning vector."""
    state_target = OBS_ENV_STATE
    """The consequence target of a policy without cameras."""
    masks_action_dims = True
    _denoiser: Any
    """The network that predicts noise, sample or velocity."""
    _sampler: Any
    """The module whose `conditional_sample` denoises a whole chunk."""

    @property
    def chunk_size(self) -> int:
        """Steps in one denoised chunk; the first n - 1 of them lie before now."""
        return int(self.base.config.horizon)

    def _trace(self, batch: Batch, belief: AbstractContextManager[Any], views: Views | None) -> PolicyTrace:
        """One forward of the squared error of noise, sample or velocity."""
        frames = self._frames(batch, self._steps, with_images=views is None)
        unused = unused_dims(batch, batch[ACTION])
        action = without_unused(batch[ACTION], unused)
        mask = action_mask(batch, action)
        inputs = {**batch, **frames, ACTION: action, ACTION_PAD: ~mask}
        with ExitStack() as scope:
            scope.enter_context(self.action_scope(batch))
            if views is not None:
                # the policy stacks its cameras' features as it stacks their images
                inputs |= views.features
                self._enter_views(scope)
            conditioning = scope.enter_context(belief)
            hidden = scope.enter_context(self._captured_hidden())
            errors = scope.enter_context(captured_result(functional.mse_loss))
            self.base.forward(inputs)
        context = conditioning.value.unflatten(1, (self._steps, -1)).float()
        return PolicyTrace(
            loss=per_sample_mean(errors.value, mask, unused),
            context=context,
            context_mask=all_true(context),
            action_tokens=self._action_tokens(action, batch),
            action_hidden=self._steps_first(hidden.value).float(),
            action_mask=mask,
        )

    @torch.no_grad()
    def rollout(self, batch: Batch, belief: Belief | None = None, **kwargs: Any) -> RolloutTrace:
        """Sample a chunk from the observed history, or from the batch's own n steps where none was observed."""
        with (
            preserved_modes(self.policy, training=False),
            self._history(batch) as inputs,
            self.action_scope(batch),
            self.belief_scope(belief),
            self._captured_hidden(keep="last") as hidden,
            recorded_results(self._sampler, "conditional_sample") as samples,
        ):
            actions = self.base.predict_action_chunk(inputs, **kwargs)
        unused = unused_dims(batch, actions)
        # the whole chunk, of which the policy returns the steps from now on
        chunk = without_unused(samples[0], unused)
        return RolloutTrace(
            actions=without_unused(actions, unused),
            action_tokens=self._action_tokens(chunk, batch),
            action_hidden=self._steps_first(hidden.value).float(),
            action_mask=all_true(chunk),
        )

    @torch.no_grad()
    def observe(self, batch: Batch) -> None:
        """Put one observation (B, ...) into the policy's own queues, as its `select_action` does."""
        populate_queues(self.base._queues, {key: value[:, 0] for key, value in self._stacked(batch, 1).items()})

    def encode_views(self, batch: Batch, layer: int | None = None) -> Views:
        """Image features of all rows and observation steps, one encoder call per camera; see `AdapterBase`.

        Random crops are drawn here, one per camera. The layer states are those of the last step's centre crop, which
        costs another truncated pass where the policy's own crop is random.
        """
        views = super().encode_views(batch, layer)
        if layer is not None and self._cameras and self._crops_at_random(self._encoders[0]):
            tower = self.build_tower(layer, share=True)
            views.tower = {key: self.encode_image(tower, key, self._present(batch, key)) for key in self._cameras}
        return views

    def target_keys(self) -> tuple[str, ...]:
        """The policy's cameras, or the state of a policy that sees no images."""
        return self._cameras or (self.state_target,)

    @property
    def tower(self) -> VisionTower:
        """That of the first camera's encoder; without cameras none, so that a state is what its tower makes of it."""
        if self._cameras:
            return self._tower_in(self._encoders[0])
        return VisionTower(nn.Identity(), (), ((),), self.base.config.input_features[self.state_target].shape)

    def tower_is_frozen(self) -> bool:
        """Whether nothing in the vision tower changes in training, the running statistics of a batch norm included."""
        towers = [self._tower_in(encoder) for encoder in self._encoders]
        moves = any(isinstance(module, nn.BatchNorm2d) for tower in towers for module in tower.root.modules())
        return not moves and all(tower.frozen for tower in towers)

    def build_tower(self, layer: int, share: bool = False) -> nn.Module:
        """One truncated tower per encoder, or the identity for a state; see `AdapterBase.build_tower`."""
        if not self._cameras:
            return super().build_tower(layer, share)
        towers = nn.ModuleList(self._tower_in(encoder).cut(layer, share) for encoder in self._encoders)
        return towers if share else towers.eval()

    def tower_parameters(self, layer: int) -> Iterable[tuple[str, Tensor]]:
        """The live towers' parameters and buffers under the names of `build_tower(layer).state_dict()`."""
        for index, encoder in enumerate(self._encoders):
            for name, value in self._tower_in(encoder).parameters(layer):
                yield f"{index}.{name}", value

    def _tower_tokens(
        self, tower: nn.Module, key: str, image: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch patches target_dim"]:
        """Of images that are resized and centre-cropped as the policy does in eval mode."""
        if not self._cameras:
            return image.unsqueeze(1)
        truncated = tower.get_submodule(str(self._encoders.index(self._encoder(key))))
        states = truncated(self._prepared(key, image).to(next(truncated.parameters()).dtype))
        return self._cells(states if isinstance(states, Tensor) else states.last_hidden_state)

    def check(self, batch: Batch, *, training: bool, with_images: bool = True) -> None:
        """Refuse a batch that the policy cannot read."""
        self._frames(batch, self._steps, with_images)
        require_keys(batch, self.targets if training else (), self.family)

    def _check_images(self, batch: Batch) -> None:
        self._frames(batch, self._steps)

    def _images_of(self, batch: Batch) -> Iterable[tuple[str, Tensor, Bool[Tensor, " rows"]]]:
        return super()._images_of(self._frames(batch, self._steps))

    def _embed_image(self, key: str, image: Float[Tensor, "rows steps *shape"]) -> Float[Tensor, "rows steps dim 1 1"]:
        return self._encode(self._encoder(key), image.flatten(0, 1)).unflatten(0, image.shape[:2])

    def _tower_of(self, key: str) -> VisionTower:
        return self._tower_in(self._encoder(key))

    def _tokens(self, states: Float[Tensor, "images *state"], rows: int) -> Float[Tensor, "rows patches dim"]:
        return self._cells(states).unflatten(0, (rows, -1))[:, -1]

    def _present(self, batch: Batch, key: str) -> Float[Tensor, "batch *shape"]:
        return self._frames(batch, self._steps)[key][:, -1]

    def _encoder(self, key: str) -> Any:
        """A camera's."""
        return self._encoders[self._cameras.index(key) % len(self._encoders)]

    @property
    def _steps(self) -> int:
        return int(self.base.config.n_obs_steps)

    @property
    def _cameras(self) -> tuple[str, ...]:
        return tuple(self.base.config.image_features)

    def _frames(
        self, batch: Batch, steps: int, with_images: bool = True
    ) -> dict[str, Float[Tensor, "batch steps ..."]]:
        """The observations (B, steps, ...) the policy reads; a single step may lack the axis, as in LeRobot's datasets."""
        dims = dict.fromkeys(self.observations, 2) | (dict.fromkeys(self._cameras, 4) if with_images else {})
        require_keys(batch, dims, self.family)
        frames = {}
        for key, ndim in dims.items():
            refuse_stacked_frames(batch, [key], ndim, frames=steps)
            frames[key] = batch[key] if batch[key].ndim > ndim else batch[key].unsqueeze(1)
            if frames[key].shape[1] != steps:
                raise ValueError(
                    f"{key!r} holds {frames[key].shape[1]} frames per row where the {self.family} policy reads {steps}: "
                    "read the dataset at the policy's observation_delta_indices, and at inference pass each environment "
                    "step to observe() first."
                )
        return frames

    def _stacked(self, batch: Batch, steps: int) -> dict[str, Float[Tensor, "batch steps ..."]]:
        """The observations under the keys of the policy's queues, its cameras on one axis."""
        frames = self._frames(batch, steps)
        stacked = {key: frames[key] for key in self.observations}
        if self._cameras:
            stacked[OBS_IMAGES] = torch.stack([frames[key] for key in self._cameras], dim=2)
        return stacked

    @contextmanager
    def _history(self, batch: Batch) -> Iterator[Batch]:
        """What `predict_action_chunk` takes; empty observation queues hold the batch's own steps meanwhile."""
        queues = {key: queue for key, queue in self.base._queues.items() if key != ACTION}
        borrowed = not any(queues.values())
        if borrowed:
            for key, value in self._stacked(batch, self._steps).items():
                queues[key].extend(value.unbind(1))
        try:
            latest = {key: queue[-1] for key, queue in queues.items()}
            yield {key: value for key, value in batch.items() if key != ACTION} | latest
        finally:
            if borrowed:
                for queue in queues.values():
                    queue.clear()

    def _enter_belief(self, scope: ExitStack, belief: Belief | None, mask: BeliefMask | None) -> Capture:
        """Add the readable belief tokens' mean to the conditioning of every denoiser call.

        Returns the conditioning as the policy makes it, from the first denoiser call.
        """
        own, steps = Capture(), self._steps
        shift = None if belief is None else _readable_mean(belief, mask).repeat(1, steps)

        def edit(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
            conditioning = kwargs[self.condition]
            own.offer(conditioning)
            if shift is None:
                return args, kwargs
            if shift.shape != conditioning.shape:
                raise RuntimeError(
                    f"The belief makes a conditioning of {tuple(shift.shape)} where the policy has "
                    f"{tuple(conditioning.shape)}: pass one belief per row, {self.context_dim} wide."
                )
            return args, {**kwargs, self.condition: conditioning + shift.to(conditioning.dtype)}

        scope.enter_context(edited_call(self._denoiser, edit))
        return own

    @contextmanager
    def _masked_chunks(self, unused: Bool[Tensor, "batch dims"]) -> Iterator[None]:
        """Clear the noised chunk that the denoiser is given."""

        def edit(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
            return (without_unused(args[0], unused), *args[1:]), kwargs

        with edited_call(self._denoiser, edit):
            yield

    def _enter_views(self, scope: ExitStack) -> None:
        for encoder in self._encoders:
            scope.enter_context(patched(encoder, "forward", self._from_features))

    @property
    @abstractmethod
    def _image_encoder(self) -> Any:
        """The image encoder of all cameras, or a list of theirs."""

    @property
    def _encoders(self) -> list[Any]:
        """The image encoders: one for all cameras, or one each."""
        if not self._cameras:
            return []
        encoder = self._image_encoder
        return list(encoder) if isinstance(encoder, nn.ModuleList) else [encoder]

    def _steps_first(self, hidden: Float[Tensor, "batch _ _"]) -> Float[Tensor, "batch steps dim"]:
        """C_t with the steps before the width."""
        return hidden

    @abstractmethod
    def _tower_in(self, encoder: Any) -> VisionTower:
        """An encoder's vision tower."""

    def _cells(self, state: Float[Tensor, "batch *state"]) -> Float[Tensor, "batch patches dim"]:
        """A tower's states as tokens."""
        return state

    @abstractmethod
    def _encode(self, encoder: Any, images: Float[Tensor, "rows _ _ _"]) -> Float[Tensor, "rows dim 1 1"]:
        """Features that stand in an image's place: the policy stacks both alike."""

    def _from_features(self, features: Float[Tensor, "rows dim 1 1"]) -> Float[Tensor, "rows dim *ones"]:
        """What an encoder returns when it is given its own features."""
        return features

    @abstractmethod
    def _crops_at_random(self, encoder: Any) -> bool:
        """Whether the policy would crop at random now."""


def _readable_mean(belief: Float[Tensor, "batch tokens dim"], mask: BeliefMask | None) -> Float[Tensor, "batch dim"]:
    """Mean of the readable tokens, zeros where there are none."""
    readable = belief_token_mask(belief, mask).unsqueeze(-1)
    return torch.where(readable, belief, 0).sum(dim=1) / readable.sum(dim=1).clamp_min(1)
