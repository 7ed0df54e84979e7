"""Policies small enough for two CPU cores, built offline with random weights: for recipes, tutorials and tests.

They are LeRobot's own classes and processors at small sizes, so everything that works on them works on the released
checkpoints. The default `tiny_smolvla` has 1.1 M parameters, 4 vision and 4 text layers of width 96 and 36 patches
(9 tokens) per camera; a training step on 32 rows of one 84-pixel camera takes about 115 ms of one core's time.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.utils.constants import ACTION, OBS_STATE
from lerobot.utils.feature_utils import dataset_to_policy_features
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig, PreTrainedTokenizerFast, SmolVLMConfig, SmolVLMProcessor
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.image_processing_smolvlm import SmolVLMImageProcessor
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

from ptr_hf.policies.configuration_smolvla_state import SmolVLAStateConfig
from ptr_hf.policies.hooks import captured_output
from ptr_hf.policies.modeling_smolvla_state import SmolVLAStatePolicy

PAD, END, IMAGE = "<pad>", "<end_of_utterance>", "<image>"
FAKE_IMAGE, GLOBAL_IMAGE = "<fake_token_around_image>", "<global-img>"

Features = Mapping[str, dict[str, Any]] | tuple[dict[str, PolicyFeature], dict[str, PolicyFeature]]
"""A LeRobot dataset's `meta.features`, or a policy's (input_features, output_features)."""


def write_tiny_vlm(
    folder: str | Path,
    *,
    image_size: int = 84,
    patch_size: int = 14,
    scale_factor: int = 2,
    vision_dim: int = 96,
    vision_layers: int = 4,
    vision_heads: int = 4,
    text_dim: int = 96,
    text_layers: int = 4,
    text_heads: int = 4,
    texts: Iterable[str] = (),
    vocab_size: int = 512,
) -> Path:
    """Write the config, processor and tokenizer of a tiny SmolVLM, to be named as SmolVLA's `vlm_model_name`.

    There are no weights in the folder: SmolVLA draws them (`load_vlm_weights=False`) or loads its own checkpoint.

    Args:
        folder: where the files go; created if missing.
        image_size: side of the square image that SmolVLA resizes to, in pixels.
        patch_size: side of a vision patch, in pixels.
        scale_factor: the connector merges scale_factor² patches into one text token.
        vision_dim, vision_layers, vision_heads: size of the SigLIP tower.
        text_dim, text_layers, text_heads: size of the text model, and with SmolVLA's multiplier of the action expert.
        texts: instructions to learn byte-pair merges from; without them every byte is a token.
        vocab_size: upper bound on the tokenizer's vocabulary.

    Returns:
        The folder.

    Raises:
        ValueError: the image does not divide into patches, or the patches into text tokens.
    """
    side, rest = divmod(image_size, patch_size)
    if rest or side % scale_factor:
        raise ValueError(
            f"image_size {image_size} must be a multiple of patch_size {patch_size} and give a number of patches per "
            f"side that scale_factor {scale_factor} divides."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _byte_level_tokenizer(texts, vocab_size)
    config = SmolVLMConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=text_dim,
            intermediate_size=2 * text_dim,
            num_hidden_layers=text_layers,
            num_attention_heads=text_heads,
            num_key_value_heads=max(1, text_heads // 2),
            head_dim=text_dim // text_heads,
            max_position_embeddings=1024,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        vision_config=SmolVLMVisionConfig(
            hidden_size=vision_dim,
            intermediate_size=2 * vision_dim,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_heads,
            image_size=image_size,
            patch_size=patch_size,
        ),
        scale_factor=scale_factor,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        pad_token_id=tokenizer.pad_token_id,
    )
    config.save_pretrained(folder)
    size = {"longest_edge": image_size}
    SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(size=size, max_image_size=size),
        tokenizer=tokenizer,
        video_processor=SmolVLMVideoProcessor(size=size, max_image_size=size),
        image_seq_len=(side // scale_factor) ** 2,
    ).save_pretrained(folder)
    return folder


def tiny_smolvla(
    features: Features,
    vlm_folder: str | Path,
    *,
    chunk_size: int = 16,
    expert_width_multiplier: float = 0.75,
    num_steps: int = 4,
    tokenizer_max_length: int = 48,
    freeze_vision_encoder: bool = False,
    train_expert_only: bool = False,
    device: str = "cpu",
    seed: int = 0,
    frames: Mapping[str, Float[Tensor, "frames channels height width"]] | None = None,
    **config: Any,
) -> SmolVLAPolicy:
    """A `SmolVLAPolicy` over the VLM that `write_tiny_vlm` described, with random weights.

    Without a camera among the features it is a `SmolVLAStatePolicy`, as wide as the robot's own state and actions: a VLM
    with `text_dim=64, text_layers=2` and `expert_width_multiplier=1.0` is enough for Meta-World's 39-d states.

    Args:
        features: a LeRobot dataset's `meta.features`, or (input_features, output_features).
        vlm_folder: what `write_tiny_vlm` returned.
        chunk_size: steps in one action chunk, all of them executed.
        expert_width_multiplier: width of the action expert relative to the text model.
        num_steps: denoising steps at inference.
        tokenizer_max_length: longest instruction, in tokens.
        freeze_vision_encoder: keep the vision tower as drawn.
        train_expert_only: train nothing but the action expert and the projections.
        device: where the policy lives.
        seed: of the weights; the global random stream is left as it was.
        frames: frames of the dataset by camera key for `center_vision_features`; without them a scorer on the untrained
            tower starts nearly blind.
        **config: further `SmolVLAConfig` fields.
    """
    inputs, outputs = _policy_features(features)
    vision = AutoConfig.from_pretrained(vlm_folder).vision_config
    settings: dict[str, Any] = {
        "n_action_steps": chunk_size,
        "resize_imgs_with_padding": (vision.image_size, vision.image_size),
        "num_vlm_layers": 0,
        "load_vlm_weights": False,
        "push_to_hub": False,
        "optimizer_lr": 1e-3,
    }
    sees = any(feature.type is FeatureType.VISUAL for feature in inputs.values())
    if not sees:
        widths = {key: feature.shape[0] for key, feature in {**inputs, **outputs}.items()}
        settings |= {"max_state_dim": widths.get(OBS_STATE, 0), "max_action_dim": widths[ACTION]}
    policy_config = (SmolVLAConfig if sees else SmolVLAStateConfig)(
        input_features=inputs,
        output_features=outputs,
        chunk_size=chunk_size,
        expert_width_multiplier=expert_width_multiplier,
        num_steps=num_steps,
        tokenizer_max_length=tokenizer_max_length,
        freeze_vision_encoder=freeze_vision_encoder,
        train_expert_only=train_expert_only,
        vlm_model_name=str(vlm_folder),
        device=device,
        **{**settings, **config},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not sees:
            return SmolVLAStatePolicy(policy_config).to(device)
        policy = SmolVLAPolicy(policy_config)
        _spread_vision_features(policy.model.vlm_with_expert.get_vlm_model().vision_model)
    policy.to(device)
    if frames is not None:
        center_vision_features(policy, frames)
    return policy


@torch.no_grad()
def center_vision_features(
    policy: SmolVLAPolicy, frames: Mapping[str, Float[Tensor, "frames channels height width"]]
) -> None:
    """Make the pooled features of a policy's own scenes centre on zero, by shifting biases of the vision tower.

    Frames of one camera share most of their pixels, so the features of an untrained tower point almost the same way
    and no scorer can tell consequences apart at the paper's temperatures. With the frames' mean feature taken out of
    every layer's bias, the mean pairwise cosine of Meta-World frames falls from 0.83 to 0.01.

    Args:
        policy: an untrained `SmolVLAPolicy`; changed in place.
        frames: frames by camera key as they leave the preprocessor, drawn from all tasks and from whole episodes (first
            frames alone leave 0.2); 32 are enough.
    """
    experts = policy.model.vlm_with_expert
    vision = experts.get_vlm_model().vision_model
    pixels = torch.cat([policy.prepare_images({key: images})[0][0] for key, images in frames.items()])
    layers = [(layer, layer.mlp.fc2.bias) for layer in vision.encoder.layers]
    for module, bias in [(vision.embeddings, vision.embeddings.patch_embedding.bias), *layers]:
        with captured_output(module) as state:
            experts.embed_image(pixels)
        bias -= state.value.mean(dim=(0, 1))


def tiny_act(
    features: Features,
    *,
    chunk_size: int = 16,
    dim_model: int = 64,
    use_vae: bool = False,
    device: str = "cpu",
    seed: int = 0,
    **config: Any,
) -> ACTPolicy:
    """An `ACTPolicy` with a small transformer; with cameras its backbone is the ordinary, untrained ResNet-18.

    Args:
        features: a LeRobot dataset's `meta.features`, or (input_features, output_features).
        chunk_size: steps in one action chunk, all of them executed.
        dim_model: width of the transformer.
        use_vae: train with ACT's variational objective.
        device: where the policy lives.
        seed: of the weights; the global random stream is left as it was.
        **config: further `ACTConfig` fields.
    """
    inputs, outputs = _policy_features(features)
    settings: dict[str, Any] = {
        "n_action_steps": chunk_size,
        "pretrained_backbone_weights": None,
        "dim_feedforward": 2 * dim_model,
        "n_heads": 4,
        "n_encoder_layers": 2,
        "n_decoder_layers": 1,
        "n_vae_encoder_layers": 1,
        "latent_dim": 8,
        "push_to_hub": False,
        "optimizer_lr": 3e-4,
    }
    policy_config = ACTConfig(
        input_features=inputs,
        output_features=outputs,
        chunk_size=chunk_size,
        dim_model=dim_model,
        use_vae=use_vae,
        device=device,
        **{**settings, **config},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = ACTPolicy(policy_config)
    return policy.to(device)


def _policy_features(features: Features) -> tuple[dict[str, PolicyFeature], dict[str, PolicyFeature]]:
    if isinstance(features, tuple):
        return dict(features[0]), dict(features[1])
    converted = dataset_to_policy_features(dict(features))
    outputs = {key: feature for key, feature in converted.items() if feature.type is FeatureType.ACTION}
    return {key: feature for key, feature in converted.items() if key not in outputs}, outputs


def _byte_level_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    special = [PAD, END, IMAGE, FAKE_IMAGE, GLOBAL_IMAGE]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens={
            "image_token": IMAGE,
            "fake_image_token": FAKE_IMAGE,
            "global_image_token": GLOBAL_IMAGE,
            "end_of_utterance_token": END,
        },
    )


def _spread_vision_features(vision: Any) -> None:
    """Draw vision weights whose pooled features differ between images.

    LeRobot's default draw leaves a mean pairwise cosine of 0.94 between pooled features of different Meta-World scenes,
    because every image shares its brightness. Filters that ignore a patch's mean, small position embeddings and
    residual branches weaker than the stream bring it to 0.83; `center_vision_features` removes the rest.
    """
    embeddings = vision.embeddings
    filters = embeddings.patch_embedding.weight
    nn.init.normal_(filters, std=10 / math.sqrt(filters[0].numel()))
    filters.data -= filters.data.mean(dim=(2, 3), keepdim=True)
    nn.init.normal_(embeddings.position_embedding.weight, std=0.1)
    for module in vision.encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5 / math.sqrt(module.in_features))
