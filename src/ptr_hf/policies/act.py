"""ACT: a transformer that regresses the action chunk from camera, state and latent tokens."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from jaxtyping import Float
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_IMAGES, OBS_STATE
from torch import Tensor, nn

from ptr_hf.constants import ACTION_PAD
from ptr_hf.policies.base import AdapterBase, part
from ptr_hf.policies.batches import (
    action_mask,
    all_true,
    belief_token_mask,
    per_sample_mean,
    unused_dims,
    without_unused,
)
from ptr_hf.policies.hooks import (
    Call,
    captured_output,
    edited_call,
    patched,
    preserved_modes,
    recorded_calls,
)
from ptr_hf.policies.tower import VisionTower, flatten_map, projector_tower, resnet_tower
from ptr_hf.policies.trace import Batch, Belief, BeliefMask, PolicyTrace, Views


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
    # ACT has one width
    context_dim = action_dim = part("config.dim_model")
    _action_out = part("model.action_head")
    _reads_context = True

    @property
    def tower(self) -> VisionTower:
        """The ResNet, or the state projector of a policy that sees no images."""
        model = self.base.model
        if self.base.config.image_features:
            return resnet_tower(model.backbone)
        return projector_tower(model.encoder_env_state_input_proj, self.context_dim)

    @property
    def observations(self) -> tuple[str, ...]:
        """The states that the policy's config names."""
        config = self.base.config
        named = ((OBS_STATE, config.robot_state_feature), (OBS_ENV_STATE, config.env_state_feature))
        return tuple(key for key, feature in named if feature)

    def _trace(self, batch: Batch, belief: AbstractContextManager[Any], views: Views | None) -> PolicyTrace:
        """One forward of the masked L1 loss plus, with VAE in training, each row's weighted KL divergence."""
        model, config = self.base.model, self.base.config
        unused = unused_dims(batch, batch[ACTION])
        action = without_unused(batch[ACTION], unused)
        mask = action_mask(batch, action)
        inputs = {**batch, ACTION: action, ACTION_PAD: ~mask}
        with ExitStack() as scope:
            self._enter_images(scope, inputs, views)
            calls = scope.enter_context(
                recorded_calls(model.encoder, lambda args, kwargs: (args[0], kwargs["pos_embed"]))
            )
            scope.enter_context(belief)
            encoded = scope.enter_context(captured_output(model.encoder))
            hidden = scope.enter_context(self._captured_hidden())
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
            context_mask=all_true(context),
            action_tokens=self._action_tokens(action, batch),
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

    def _enter_belief(self, scope: ExitStack, belief: Belief | None, mask: BeliefMask | None) -> None:
        """Append the belief tokens to what the encoder reads and the decoder attends to."""
        if belief is None:
            return
        model, injection = self.base.model, _BeliefInjection(belief, mask)
        scope.enter_context(edited_call(model.encoder, injection.encoder))
        scope.enter_context(edited_call(model.decoder, injection.decoder))
        if mask is not None:
            for layer in model.decoder.layers:
                scope.enter_context(edited_call(layer.multihead_attn, injection.cross_attention))

    def compilable(self) -> Iterable[nn.Module]:
        """The backbone's residual blocks and the encoder's layers; decoder layers take a belief's mask by a hook."""
        yield from self.base.model.encoder.layers
        if self.base.config.image_features:
            for (stage,) in self.tower.layers:
                yield from self.tower.root.get_submodule(stage).children()

    def target_keys(self) -> tuple[str, ...]:
        """The policy's cameras, or its environment state when it sees no images."""
        return super().target_keys() or (OBS_ENV_STATE,)

    def _embed_image(self, key: str, image: Float[Tensor, "rows 3 _ _"]) -> Float[Tensor, "rows channels _ _"]:
        return self.base.model.backbone(image)["feature_map"]

    def _tokens(self, states: Float[Tensor, "rows *state"], rows: int) -> Float[Tensor, "rows patches channels"]:
        return flatten_map(states) if self.base.config.image_features else states.unsqueeze(1)

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
        cameras = self.base.config.image_features
        if cameras:
            inputs[OBS_IMAGES] = [(inputs if views is None else views.features)[key] for key in cameras]
        if cameras and views is not None:
            scope.enter_context(patched(self.base.model.backbone, "forward", _as_feature_map))

    def _action_tokens(
        self, action: Float[Tensor, "batch steps dim"], batch: Batch
    ) -> Float[Tensor, "batch steps action_dim"]:
        model = self.base.model
        if self.base.config.use_vae:
            return model.vae_encoder_action_input_proj(action).float()
        # Reading the head as a linear map sees a PEFT update of it too, which its `weight` does not.
        basis = torch.eye(self.context_dim, dtype=action.dtype, device=action.device)
        columns = model.action_head(basis) - model.action_head(torch.zeros_like(basis[:1]))
        return (action @ columns.T).float()


class _BeliefInjection:
    """Belief tokens at the end of ACT's context sequence (sequence first)."""

    def __init__(self, belief: Belief, mask: BeliefMask | None) -> None:
        self._tokens = belief.transpose(0, 1)
        self._hidden = ~belief_token_mask(belief, mask)
        self._masked = mask is not None

    def encoder(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Extend the encoder's tokens and positions, and hide masked tokens from its attention."""
        tokens = args[0]
        kwargs = {**kwargs, "pos_embed": self._extend_position(kwargs["pos_embed"])}
        if self._masked:
            kwargs["key_padding_mask"] = self._key_padding(tokens.shape[0])
        return (torch.cat([tokens, self._tokens.to(tokens.dtype)]), *args[1:]), kwargs

    def decoder(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Extend the positions of the encoder output that the decoder attends to."""
        return args, {**kwargs, "encoder_pos_embed": self._extend_position(kwargs["encoder_pos_embed"])}

    def cross_attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Hide masked tokens from a decoder layer, which takes no mask of its own."""
        context = kwargs["key"].shape[0] - self._tokens.shape[0]
        return args, {**kwargs, "key_padding_mask": self._key_padding(context)}

    def _extend_position(self, position: Float[Tensor, "context 1 dim"]) -> Float[Tensor, "extended 1 dim"]:
        return torch.cat([position, position.new_zeros(self._tokens.shape[0], *position.shape[1:])])

    def _key_padding(self, context: int) -> Tensor:
        return torch.cat([self._hidden.new_zeros(self._hidden.shape[0], context), self._hidden], dim=1)


def _as_feature_map(features: Tensor) -> dict[str, Tensor]:
    return {"feature_map": features}
