"""What PTR reads from a LeRobot policy: one adapter a policy family, each a subclass of `AdapterBase`."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from operator import attrgetter
from typing import Any

import torch
from jaxtyping import Bool, Float
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_STATE
from peft import PeftModel
from torch import Tensor, nn

from ptr_hf.constants import ACTION_DIM_PAD, CAMERA_MASK_SUFFIX, EMPTY_CAMERA, FEATURES_PREFIX, VIEW_PREFIX
from ptr_hf.policies.batches import all_true, refuse_stacked_frames, require_keys, unused_dims, without_unused
from ptr_hf.policies.hooks import Capture, captured_input, captured_output, preserved_modes
from ptr_hf.policies.tower import VisionTower
from ptr_hf.policies.trace import Batch, Belief, BeliefMask, PolicyTrace, RolloutTrace, Views


def part(path: str) -> Any:
    """A property of an adapter: what lies at a dotted path inside the LeRobot policy."""
    return property(lambda adapter: attrgetter(path)(adapter.base))


class AdapterBase(ABC):
    """One policy family, seen by the method.

    An adapter holds the policy (or the `PeftModel` around it) and nothing derived from it: modules are looked up at
    each call, hooks and patches live only while a call or a `belief_scope` runs, and the batch is never changed.

    Attributes:
        policy: the LeRobot policy or the `PeftModel` around one.
        family: LeRobot's name of the policy type.
        preprocesses_rows: whether the policy's preprocessor needs rows of single chunks (it writes a row's state into its
            prompt, say), so that whole segments must not pass through it.
        masks_action_dims: whether batches may mark action dimensions as unused (`action_dim_is_pad`). Then those entries enter
            neither the model nor the loss, whatever was recorded or drawn in them.
        needs_every_camera: whether a batch must have all of the policy's cameras, and not just one of them.
        features_ndim: axes of a batch of one camera's features.
        image_ndim: axes of a batch of one camera's images.
        targets: what a training batch has besides observations.
    """

    family: str
    preprocesses_rows = False
    masks_action_dims = False
    needs_every_camera = True
    features_ndim = 3
    image_ndim = 4
    targets: tuple[str, ...] = (ACTION,)
    _action_out: Any
    """The module whose input is C_t."""

    def __init__(self, policy: nn.Module) -> None:
        self.policy = policy
        self._belief_open = False

    @property
    def base(self) -> Any:
        """The LeRobot policy itself, looked up anew because PEFT may have wrapped it."""
        return unwrap(self.policy)

    @property
    @abstractmethod
    def context_dim(self) -> int:
        """Width of H_t, and of a belief token."""

    @property
    @abstractmethod
    def action_dim(self) -> int:
        """Width of A_t."""

    @property
    def hidden_dim(self) -> int:
        """Width of C_t: that of A_t, unless the family says otherwise."""
        return self.action_dim

    @property
    def chunk_size(self) -> int:
        """Steps in one action chunk."""
        return int(self.base.config.chunk_size)

    @property
    def action_steps(self) -> int:
        """Steps of A_t and C_t: those of the chunk, unless the family writes it in tokens."""
        return self.chunk_size

    @property
    def reads_features(self) -> bool:
        """Whether a batch may hold what the tower makes of pictures in their place, as `features_key` names it."""
        return False

    @property
    @abstractmethod
    def tower(self) -> VisionTower:
        """The policy's vision tower, or the state projector of a policy that sees no images."""

    @property
    @abstractmethod
    def observations(self) -> tuple[str, ...]:
        """What the policy reads besides images."""

    def trace(
        self,
        batch: Batch,
        belief: Belief | None = None,
        belief_mask: BeliefMask | None = None,
        views: Views | None = None,
    ) -> PolicyTrace:
        """Exactly one forward of the base policy; with `views`, or features in the batch, the vision tower does not run.

        Raises:
            ValueError: the batch lacks a key the policy reads, stacks frames, has other rows than `views`, or marks unused action
                dimensions where the family cannot leave them out.
        """
        batch = self._without_coming(batch)
        if views is None and self._holds_features(batch):
            views = self._kept_views(batch)
        self.check(batch, training=True, with_images=views is None)
        if views is not None:
            views.check_rows(len(batch[self.targets[0]]))
        return self._trace(batch, self.belief_scope(belief, belief_mask), views)

    @abstractmethod
    def _trace(self, batch: Batch, belief: AbstractContextManager[Any], views: Views | None) -> PolicyTrace:
        """See `trace`; `belief` is the scope in which the policy reads it, still closed."""

    def losses(self, batch: Batch) -> Float[Tensor, " batch"]:
        """The loss of `trace` at the cost of the policy's own, where nothing else of the trace is read."""
        return self.trace(batch).loss

    @torch.no_grad()
    def rollout(self, batch: Batch, belief: Belief | None = None, **kwargs: Any) -> RolloutTrace:
        """`predict_action_chunk(batch, **kwargs)` under the belief; module modes are as before afterwards."""
        self.check(batch, training=False)
        # SmolVLA's Aloha conversion writes into the state, so the policy gets a copy.
        batch = {key: value.clone() if key == OBS_STATE else value for key, value in batch.items()}
        with (
            preserved_modes(self.policy),
            self.action_scope(batch),
            self.belief_scope(belief),
            self._captured_hidden(keep="last") as hidden,
        ):
            actions = self.base.predict_action_chunk(batch, **kwargs)
        actions = without_unused(actions, unused_dims(batch, actions))
        return RolloutTrace(
            actions=actions,
            action_tokens=self._action_tokens(actions, batch),
            action_hidden=hidden.value.float(),
            action_mask=all_true(actions),
        )

    def gradient_checkpointing_enable(self) -> None:
        """Turn on the policy's own gradient checkpointing.

        Raises:
            ValueError: LeRobot's policy has none.
        """
        raise ValueError(
            f"The {self.base.name} policy of LeRobot has no gradient checkpointing: leave it out, and use smaller batches with "
            "gradient_accumulation_steps where memory is short."
        )

    def compilable(self) -> Iterable[nn.Module]:
        """Modules that can be compiled in place (`nn.Module.compile`): nothing inside them is hooked or patched."""
        return ()

    def arrange(self, batch: Batch) -> Batch:
        """What the policy's preprocessor returned, in the form that the other methods take: every tensor by row."""
        return batch

    def observe(self, batch: Batch) -> None:  # noqa: B027
        """Take in one environment step's observation, for a policy that reads several; called before each action."""

    @contextmanager
    def belief_scope(self, belief: Belief | None, mask: BeliefMask | None = None) -> Iterator[Any]:
        """While open, the policy reads the belief tokens in training and in sampling; `None` changes nothing.

        Raises:
            RuntimeError: a scope is open already.
        """
        if self._belief_open:
            raise RuntimeError(
                "A belief scope is already open on this policy: close it first, or pass the belief to trace/rollout "
                "instead of opening a scope around them."
            )
        self._belief_open = True
        try:
            with ExitStack() as scope:
                yield self._enter_belief(scope, belief, mask)
        finally:
            self._belief_open = False

    @abstractmethod
    def _enter_belief(self, scope: ExitStack, belief: Belief | None, mask: BeliefMask | None) -> Any:
        """Let the policy read the belief until the scope closes; returns what `_trace` reads of it."""

    @contextmanager
    def action_scope(self, batch: Batch) -> Iterator[None]:
        """While open, action dimensions that `batch` marks as unused enter the model as zeros, in training and in sampling.

        `trace` and `rollout` open it themselves; it is for calls of the policy's own methods. Without `action_dim_is_pad` in
        the batch it changes nothing.

        Raises:
            ValueError: the batch marks unused dimensions and the family cannot leave them out.
        """
        self._check_action_dims(batch)
        unused = batch.get(ACTION_DIM_PAD)
        with nullcontext() if unused is None else self._masked_chunks(unused):
            yield

    def encode_views(self, batch: Batch, layer: int | None = None) -> Views:
        """The policy's own vision tower on all rows, one call per camera, with gradients where it trains.

        Features that the batch holds are taken as they are. With `layer` the hidden states after that many tower layers are
        captured too: the consequence target of a frozen tower for free (METHOD.md, section 3).

        Raises:
            ValueError: `layer` is given while the tower trains, or is out of range.
        """
        self._check_layer_states(layer)
        batch = self._without_coming(batch)
        if self._holds_features(batch):
            return self._kept_views(batch)
        self._check_images(batch)
        views, targets = Views(features={}, masks={}), self.target_keys()
        for key, image, real in self._images_of(batch):
            with captured_output(self._tower_of(key).states(layer or 1)) as states:
                views.features[key] = self._embed_image(key, image)
            views.masks[key] = real
            if layer is not None and key in targets:
                views.tower[key] = self._tokens(states.value.detach(), len(image))
        if layer is not None and not views.features:
            tower = self.build_tower(layer, share=True)
            views.tower.update({key: self.encode_image(tower, key, self._present(batch, key)) for key in targets})
        return views

    def target_keys(self) -> tuple[str, ...]:
        """The cameras the consequence target is made of, or the state feature of a policy that sees no images."""
        return tuple(key for key in self.base.config.image_features if not key.startswith(EMPTY_CAMERA))

    def tower_is_frozen(self) -> bool:
        """Whether no parameter of the vision tower trains, so that the consequence encoder can share it."""
        return self.tower.frozen

    def num_tower_layers(self) -> int:
        """How many layers `build_tower` can keep."""
        return len(self.tower.layers)

    def target_dim(self, layer: int) -> int:
        """Width of the tower's hidden states after `layer` layers."""
        self.tower.names(layer)
        return self.tower.widths[layer - 1]

    def build_tower(self, layer: int, share: bool = False) -> nn.Module:
        """The tower truncated after `layer` layers, without the final norm.

        A float32 copy in eval mode that requires no gradient; with `share` the policy's own layer modules instead.

        Raises:
            ValueError: `layer` is not in 1..num_tower_layers().
        """
        return self.tower.cut(layer, share)

    def tower_parameters(self, layer: int) -> Iterable[tuple[str, Tensor]]:
        """Parameters and buffers of the live tower, under exactly the names of `build_tower(layer).state_dict()`."""
        return self.tower.parameters(layer)

    @torch.no_grad()
    def encode_image(
        self, tower: nn.Module, key: str, image: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch patches target_dim"]:
        """Tower tokens of one camera's images (batch, channels, height, width) as they leave the preprocessor.

        A policy that sees no images takes its state feature (batch, state_dim) instead. No gradient is kept.

        Raises:
            ValueError: `key` is not among `target_keys()`.
        """
        if key not in self.target_keys():
            raise ValueError(f"{key!r} is not among this policy's target features: {', '.join(self.target_keys())}.")
        return self._tower_tokens(tower, key, image)

    def check(self, batch: Batch, *, training: bool, with_images: bool = True) -> None:
        """Refuse a batch that the policy cannot read."""
        self._check_action_dims(batch)
        require_keys(batch, [*self.observations, *(self.targets if training else ())], self.family)
        refuse_stacked_frames(batch, [OBS_STATE, OBS_ENV_STATE], single_frame_ndim=2)
        if with_images:
            self._check_images(batch)

    def _check_images(self, batch: Batch) -> None:
        # A checkpoint may list cameras that this robot lacks: some policies do without them, but need one.
        keys = self.target_keys()
        if self.needs_every_camera or not any(key in batch for key in keys):
            require_keys(batch, keys, self.family)
        refuse_stacked_frames(batch, keys, single_frame_ndim=self.image_ndim)

    def _check_action_dims(self, batch: Batch) -> None:
        """Refuse a batch with unused action dimensions where they would be learned like any other."""
        if ACTION_DIM_PAD in batch and not self.masks_action_dims:
            raise ValueError(
                f"The batch has {ACTION_DIM_PAD!r}, but the {self.base.name} policy cannot leave single action dimensions out: "
                "use one that can (ptr_hf.policies.policies_with_action_masks() names them), or train on robots with one and "
                "the same action."
            )

    def _check_layer_states(self, layer: int | None) -> None:
        if layer is None:
            return
        self.tower.names(layer)
        if not self.tower_is_frozen():
            raise ValueError("Layer states are shared only while the vision tower is frozen; pass layer=None.")

    def _masked_chunks(self, unused: Bool[Tensor, "batch dims"]) -> AbstractContextManager[None]:
        """While open, every chunk that the model reads has zeros in the unused dimensions; a head may read none."""
        return nullcontext()

    def _captured_hidden(self, keep: str = "first") -> AbstractContextManager[Capture]:
        """Capture C_t."""
        return captured_input(self._action_out, keep)

    @abstractmethod
    def _action_tokens(self, action: Float[Tensor, "batch steps dim"], batch: Batch) -> Float[Tensor, "batch steps _"]:
        """A_t of a chunk in the policy's normalised action space."""

    def _images_of(self, batch: Batch) -> Iterable[tuple[str, Tensor, Bool[Tensor, " rows"]]]:
        """The cameras' images as the policy prepares them, and which rows are real."""
        for key in self.target_keys() if self.base.config.image_features else ():
            yield key, batch[key], torch.ones(len(batch[key]), dtype=torch.bool, device=batch[key].device)

    @contextmanager
    def features_scope(self, batch: Batch) -> Iterator[Batch]:
        """While open, the policy's own `forward` takes the features that `batch` holds in the place of pictures.

        Yields:
            What `forward` is called with; a batch of pictures as it is.
        """
        with ExitStack() as scope:
            if self._holds_features(batch):
                views = self._kept_views(self._without_coming(batch))
                batch = {**batch, **self._enter_features(scope, views)}
            yield batch

    def _enter_features(self, scope: ExitStack, views: Views) -> Batch:
        """Let the policy's own `forward` take views in the place of pictures; returns what it has to find in its batch.

        Raises:
            NotImplementedError: the family reads no features.
        """
        raise NotImplementedError(f"A {self.family} policy reads no features: ask reads_features first.")

    def _without_coming(self, batch: Batch) -> Batch:
        """A batch without the coming frames that LeRobot reads for a world model: no trace looks at them."""
        return batch

    def _holds_features(self, batch: Batch) -> bool:
        return self.reads_features and any(features_key(key) in batch for key in self.target_keys())

    def _kept_views(self, batch: Batch) -> Views:
        """The features that a batch holds in the place of pictures."""
        views = Views(features={}, masks={})
        for key in self.target_keys():
            features = batch.get(features_key(key))
            if features is None:
                continue
            real = batch.get(key + CAMERA_MASK_SUFFIX)
            everywhere = torch.ones(len(features), dtype=torch.bool, device=features.device)
            # with several observation steps, the policies that read features look at the last one
            views.features[key] = features[:, -1] if features.ndim > self.features_ndim else features
            views.masks[key] = everywhere if real is None else real.bool()
            if view_key(key) in batch:
                mean = batch[view_key(key)]
                views.tower[key] = mean[:, -1:] if mean.ndim > 2 else mean.unsqueeze(1)
        return views

    @abstractmethod
    def _embed_image(self, key: str, image: Float[Tensor, "rows *shape"]) -> Float[Tensor, "rows *features"]:
        """What the policy makes of one camera's prepared images, by one pass of its tower."""

    def _tower_of(self, key: str) -> VisionTower:
        """The tower that sees a camera."""
        return self.tower

    def _present(self, batch: Batch, key: str) -> Float[Tensor, "batch *shape"]:
        """The last of the policy's observation steps."""
        return batch[key]

    def _tower_tokens(
        self, tower: nn.Module, key: str, image: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch patches target_dim"]:
        """See `encode_image`."""
        states = tower(self._prepared(key, image).to(next(tower.parameters()).dtype))
        return self._tokens(states if isinstance(states, Tensor) else states.last_hidden_state, len(image))

    def _prepared(self, key: str, image: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *input"]:
        """What a truncated tower reads of one camera's images, in the policy's own preparation."""
        return image

    def _tokens(self, states: Float[Tensor, "*states"], rows: int) -> Float[Tensor, "rows patches target_dim"]:
        """A layer's hidden states as tokens."""
        return states


def features_key(camera: str) -> str:
    """Under which a batch holds what the tower makes of a camera's pictures (rows, *features)."""
    return FEATURES_PREFIX + camera.removeprefix("observation.")


def view_key(camera: str) -> str:
    """Under which it holds the mean token of the layer at which consequences are compared (rows, target_dim)."""
    return VIEW_PREFIX + camera.removeprefix("observation.")


def unwrap(policy: nn.Module) -> Any:
    """The LeRobot policy inside a `PeftModel`, or the policy itself."""
    return policy.get_base_model() if isinstance(policy, PeftModel) else policy
