"""ACT: a transformer that regresses the action chunk from camera, state and latent tokens."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_IMAGES, OBS_STATE
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from ptr_hf.policies.hooks import (
    AdapterBase,
    captured_input,
    captured_output,
    edited_call,
    frozen_copy,
    patched,
    preserved_modes,
)
from ptr_hf.policies.protocol import (
    ACTION_PAD,
    Batch,
    BeliefMask,
    PolicyTrace,
    RolloutTrace,
    Views,
    action_mask,
    belief_token_mask,
    check_layer,
    per_sample_mean,
    refuse_stacked_frames,
    require_keys,
    unused_dims,
    without_unused,
)

RESNET_STAGES = 4


class ACTAdapter(AdapterBase):
    """Reads an `ACTPolicy` (lerobot 0.6.1), with cameras or with an environment state alone, with or without VAE.

    H_t is the encoder's output over latent, state and camera tokens; A_t the clean chunk through the VAE encoder's
    action projection, or without VAE through the action head's transpose (the head with tied weights); C_t the input
    of the action head. Belief tokens are appended to the encoder's input without positional embedding, and the
    decoder attends to them like to any other context token. Action dimensions that a robot lacks are kept from the VAE encoder,
    the only part that reads actions.

    The consequence tower is the ResNet up to one of its four stages, or `encoder_env_state_input_proj` of a policy
    that sees no images.

    With `use_vae` the latent of a training pass encodes the recorded action, so it would leak into H_t: H_t then comes
    from a second, dropout-free pass of the encoder alone with the prior's latent, the one used at inference. It costs
    one encoder pass and no pass of the backbone.
    """

    family = "act"
    masks_action_dims = True
    _reads_context = True

    @property
    def context_dim(self) -> int:
        """Width of H_t: ACT has one width."""
        return int(self.base.config.dim_model)

    @property
    def action_dim(self) -> int:
        """Width of A_t: ACT has one width."""
        return self.context_dim

    @property
    def hidden_dim(self) -> int:
        """Width of C_t: ACT has one width."""
        return self.context_dim

    @property
    def chunk_size(self) -> int:
        """Steps in one action chunk."""
        return int(self.base.config.chunk_size)

    def trace(
        self,
        batch: Batch,
        belief: Float[Tensor, "batch tokens context_dim"] | None = None,
        belief_mask: BeliefMask | None = None,
        views: Views | None = None,
    ) -> PolicyTrace:
        """One forward of the masked L1 loss plus, with VAE in training, each row's weighted KL divergence."""
        model, config = self.base.model, self.base.config
        self._check(batch, training=True, with_images=views is None)
        unused = unused_dims(batch, batch[ACTION])
        action = without_unused(batch[ACTION], unused)
        mask = action_mask(batch, action.shape[1], action.shape[0], action.device)
        inputs = {**batch, ACTION: action, ACTION_PAD: ~mask}
        with ExitStack() as scope:
            self._enter_images(scope, inputs, views)
            calls = scope.enter_context(_captured_calls(model.encoder))
            scope.enter_context(self.belief_scope(belief, belief_mask))
            encoded = scope.enter_context(captured_output(model.encoder))
            hidden = scope.enter_context(captured_input(model.action_head))
            predicted, (mean, log_variance) = model(inputs)
            tokens, position = calls[0]
            leaks = mean is not None and self._reads_context
            context = self._prior_context(tokens, position) if leaks else encoded.value
        context = context[: tokens.shape[0]].transpose(0, 1).float()
        loss = per_sample_mean((action - predicted).abs(), mask, unused)
        if mean is not None:
            divergence = -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum(-1)
            if unused is not None:
                divergence = divergence * ~unused.all(dim=1)
            loss = loss + config.kl_weight * divergence.float()
        return PolicyTrace(
            loss=loss,
            context=context,
            context_mask=torch.ones(context.shape[:2], dtype=torch.bool, device=context.device),
            action_tokens=self._action_tokens(action),
            action_hidden=hidden.value.float(),
            action_mask=mask,
        )

    def losses(self, batch: Batch) -> Float[Tensor, " batch"]:
        """The loss of `trace` without the second pass that only its context needs."""
        self._reads_context = False
        try:
            return self.trace(batch).loss
        finally:
            self._reads_context = True

    @torch.no_grad()
    def rollout(
        self, batch: Batch, belief: Float[Tensor, "batch tokens context_dim"] | None = None, **kwargs: Any
    ) -> RolloutTrace:
        """Predict a chunk under the belief."""
        self._check(batch, training=False, with_images=True)
        with (
            preserved_modes(self.policy),
            self.belief_scope(belief),
            captured_input(self.base.model.action_head) as hidden,
        ):
            actions = self.base.predict_action_chunk(batch, **kwargs)
        actions = without_unused(actions, unused_dims(batch, actions))
        return RolloutTrace(
            actions=actions,
            action_tokens=self._action_tokens(actions),
            action_hidden=hidden.value.float(),
            action_mask=torch.ones(actions.shape[:2], dtype=torch.bool, device=actions.device),
        )

    @contextmanager
    def belief_scope(
        self, belief: Float[Tensor, "batch tokens context_dim"] | None, mask: BeliefMask | None = None
    ) -> Iterator[None]:
        """Append the belief tokens to what the encoder reads and the decoder attends to while the scope is open."""
        model = self.base.model
        with ExitStack() as scope:
            scope.enter_context(self.exclusive())
            if belief is not None:
                injection = _BeliefInjection(belief, mask)
                scope.enter_context(edited_call(model.encoder, injection.encoder))
                scope.enter_context(edited_call(model.decoder, injection.decoder))
                if mask is not None:
                    for layer in model.decoder.layers:
                        scope.enter_context(edited_call(layer.multihead_attn, injection.cross_attention))
            yield

    def compilable(self) -> Iterable[nn.Module]:
        """The backbone's residual blocks and the encoder's layers; decoder layers take a belief's mask by a hook."""
        model = self.base.model
        yield from model.encoder.layers
        if self.base.config.image_features:
            for stage in range(1, RESNET_STAGES + 1):
                yield from model.backbone[f"layer{stage}"]

    def encode_views(self, batch: Batch, layer: int | None = None) -> Views:
        """Feature maps of all rows, one backbone call per camera; see `PolicyAdapter.encode_views`."""
        if layer is not None:
            check_layer(layer, self.num_tower_layers())
            if not self.tower_is_frozen():
                raise ValueError("Layer states are shared only while the vision tower is frozen; pass layer=None.")
        self._check_observation(batch, with_images=True)
        if not self.base.config.image_features:
            tower = {} if layer is None else {OBS_ENV_STATE: self._state_tokens(batch)}
            return Views(features={}, masks={}, tower=tower)
        features, masks, tower = {}, {}, {}
        backbone = self.base.model.backbone
        for key in self.base.config.image_features:
            with ExitStack() as scope:
                if layer is not None:
                    stage = scope.enter_context(captured_output(backbone[f"layer{layer}"]))
                features[key] = backbone(batch[key])["feature_map"]
                if layer is not None:
                    tower[key] = _flatten_map(stage.value.detach())
            masks[key] = torch.ones(batch[key].shape[0], dtype=torch.bool, device=batch[key].device)
        return Views(features=features, masks=masks, tower=tower)

    def target_keys(self) -> tuple[str, ...]:
        """The policy's cameras, or its environment state when it sees no images."""
        return tuple(self.base.config.image_features) or (OBS_ENV_STATE,)

    def tower_is_frozen(self) -> bool:
        """Whether no parameter of the backbone (or state projector) trains."""
        return not any(parameter.requires_grad for parameter in self._tower_source().parameters())

    def num_tower_layers(self) -> int:
        """ResNet stages, or 1 for the state projector."""
        return RESNET_STAGES if self.base.config.image_features else 1

    def target_dim(self, layer: int) -> int:
        """Channels of the ResNet stage, or the width of the state projector."""
        check_layer(layer, self.num_tower_layers())
        if not self.base.config.image_features:
            return self.context_dim
        block = self.base.model.backbone[f"layer{layer}"][-1]
        last = block.conv3 if isinstance(block, Bottleneck) else block.conv2
        return int(last.out_channels)

    def build_tower(self, layer: int, share: bool = False) -> nn.Module:
        """The ResNet up to stage `layer`, or the state projector; see `PolicyAdapter.build_tower`."""
        check_layer(layer, self.num_tower_layers())
        tower = nn.Sequential()
        for name, child in self._tower_children(layer):
            tower.add_module(name, child)
        return tower if share else frozen_copy(tower)

    def tower_parameters(self, layer: int) -> Iterable[tuple[str, Tensor]]:
        """The live tower's parameters and buffers under the names of `build_tower(layer).state_dict()`."""
        check_layer(layer, self.num_tower_layers())
        for name, child in self._tower_children(layer):
            yield from child.state_dict(prefix=f"{name}.").items()

    @torch.no_grad()
    def encode_image(
        self, tower: nn.Module, key: str, image: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch patches target_dim"]:
        """Flattened feature map of one camera's normalised images, or the one token of an environment state."""
        if key not in self.target_keys():
            raise ValueError(f"{key!r} is not among this policy's target features: {', '.join(self.target_keys())}.")
        encoded = tower(image.to(next(tower.parameters()).dtype))
        return _flatten_map(encoded) if self.base.config.image_features else encoded.unsqueeze(1)

    def _tower_source(self) -> Any:
        model = self.base.model
        return model.backbone if self.base.config.image_features else model.encoder_env_state_input_proj

    def _tower_children(self, layer: int) -> Iterator[tuple[str, nn.Module]]:
        source = self._tower_source()
        if not self.base.config.image_features:
            yield "projection", source
            return
        for name, child in source.named_children():
            yield name, child
            if name == f"layer{layer}":
                return

    @torch.no_grad()
    def _state_tokens(self, batch: Batch) -> Float[Tensor, "batch 1 context_dim"]:
        return self._tower_source()(batch[OBS_ENV_STATE]).unsqueeze(1)

    def _prior_context(
        self, tokens: Float[Tensor, "context batch dim"], position: Float[Tensor, "context 1 dim"]
    ) -> Float[Tensor, "extended batch dim"]:
        """Encoder output with the prior's latent (zeros) in place of the one that saw the action."""
        model = self.base.model
        latent = torch.zeros(tokens.shape[1], self.base.config.latent_dim, device=tokens.device)
        prior = model.encoder_latent_input_proj(latent).to(tokens.dtype).unsqueeze(0)
        # Without dropout the extra pass leaves the random stream of training as it was.
        with preserved_modes(model.encoder, training=False):
            return model.encoder(torch.cat([prior, tokens[1:]]), pos_embed=position)

    def _enter_images(self, scope: ExitStack, inputs: Batch, views: Views | None) -> None:
        if not self.base.config.image_features:
            return
        if views is None:
            inputs[OBS_IMAGES] = [inputs[key] for key in self.base.config.image_features]
            return
        inputs[OBS_IMAGES] = [views.features[key] for key in self.base.config.image_features]
        if inputs[OBS_IMAGES][0].shape[0] != inputs[ACTION].shape[0]:
            rows = inputs[OBS_IMAGES][0].shape[0]
            raise ValueError(f"views has {rows} rows and the batch {inputs[ACTION].shape[0]}.")
        scope.enter_context(patched(self.base.model.backbone, "forward", _as_feature_map))

    def _check(self, batch: Batch, training: bool, with_images: bool) -> None:
        self._check_observation(batch, with_images)
        if training:
            require_keys(batch, [ACTION], self.family)

    def _check_observation(self, batch: Batch, with_images: bool) -> None:
        config = self.base.config
        keys = [OBS_STATE] if config.robot_state_feature else []
        keys += [OBS_ENV_STATE] if config.env_state_feature else []
        cameras = list(config.image_features)
        require_keys(batch, keys + cameras if with_images else keys, self.family)
        refuse_stacked_frames(batch, keys, single_frame_ndim=2)
        refuse_stacked_frames(batch, cameras, single_frame_ndim=4)

    def _action_tokens(self, action: Float[Tensor, "batch steps dim"]) -> Float[Tensor, "batch steps action_dim"]:
        model = self.base.model
        if self.base.config.use_vae:
            return model.vae_encoder_action_input_proj(action).float()
        # Reading the head as a linear map sees a PEFT update of it too, which its `weight` does not.
        basis = torch.eye(self.context_dim, dtype=action.dtype, device=action.device)
        columns = model.action_head(basis) - model.action_head(torch.zeros_like(basis[:1]))
        return (action @ columns.T).float()


class _BeliefInjection:
    """Belief tokens at the end of ACT's context sequence (sequence first)."""

    def __init__(self, belief: Float[Tensor, "batch tokens dim"], mask: BeliefMask | None) -> None:
        self._tokens = belief.transpose(0, 1)
        self._hidden = ~belief_token_mask(belief, mask)
        self._masked = mask is not None

    def encoder(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Extend the encoder's tokens and positions, and hide masked tokens from its attention."""
        tokens = args[0]
        kwargs = {**kwargs, "pos_embed": self._extend_position(kwargs["pos_embed"])}
        if self._masked:
            kwargs["key_padding_mask"] = self._key_padding(tokens.shape[0])
        return (torch.cat([tokens, self._tokens.to(tokens.dtype)]), *args[1:]), kwargs

    def decoder(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Extend the positions of the encoder output that the decoder attends to."""
        return args, {**kwargs, "encoder_pos_embed": self._extend_position(kwargs["encoder_pos_embed"])}

    def cross_attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hide masked tokens from a decoder layer, which takes no mask of its own."""
        context = kwargs["key"].shape[0] - self._tokens.shape[0]
        return args, {**kwargs, "key_padding_mask": self._key_padding(context)}

    def _extend_position(self, position: Float[Tensor, "context 1 dim"]) -> Float[Tensor, "extended 1 dim"]:
        return torch.cat([position, position.new_zeros(self._tokens.shape[0], *position.shape[1:])])

    def _key_padding(self, context: int) -> Tensor:
        return torch.cat([self._hidden.new_zeros(self._hidden.shape[0], context), self._hidden], dim=1)


@contextmanager
def _captured_calls(encoder: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Tokens and positions of each encoder call, before any belief is appended."""
    calls: list[tuple[Tensor, Tensor]] = []

    def record(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        calls.append((args[0], kwargs["pos_embed"]))
        return args, kwargs

    with edited_call(encoder, record):
        yield calls


def _flatten_map(feature_map: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch patches channels"]:
    return feature_map.flatten(2).transpose(1, 2)


def _as_feature_map(features: Tensor) -> dict[str, Tensor]:
    return {"feature_map": features}
