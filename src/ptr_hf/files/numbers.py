"""How large a number of a configuration may be: a file of a few bytes must not ask for hours or terabytes.

LeRobot makes lists, layers, padded tensors and loops of these numbers, some of them before anything could stop it.
"""

import math
from typing import Any

from ptr_hf.files.regular import quoted

MAX_WIDTH = 65_536
"""Of a number that no other limit names: widths, vocabularies' parts, buckets."""
MAX_COUNT = 10_000_000
MAX_ELEMENTS = 2**26
"""Of one feature: an image of 4096 × 4096 pixels."""
MAX_FEATURES = 256

_GROUPS: dict[int, tuple[str, ...]] = {
    # cameras and the like: one pass, or one feature, for each
    64: ("empty_cameras", "max_views", "num_image_views", "jepa_tubelet_size", "repeated_diffusion_steps"),
    # what multiplies a width
    16: ("expert_width_multiplier",),
    # layers
    512: (
        *("n_encoder_layers", "n_decoder_layers", "n_vae_encoder_layers", "num_layers", "action_num_layers", "depth"),
        *("num_vlm_layers", "num_expert_layers", "vlm_num_layers", "predictor_depth", "tune_top_llm_layers"),
        *("self_attn_every_n_layers", "target_layer"),
    ),
    # passes of the policy for one action
    1000: (
        "num_steps",
        "num_inference_steps",
        "num_inference_timesteps",
        "num_denoising_steps",
        "num_integration_steps",
    ),
    # heads, groups, frames
    1024: (
        *("n_heads", "num_heads", "action_num_heads", "predictor_num_heads", "n_groups", "kernel_size"),
        *("n_obs_steps", "num_video_frames", "state_horizon", "video_horizon"),
    ),
    # steps of a chunk, pixels of a side, padded dimensions
    4096: (
        *("chunk_size", "horizon", "n_action_steps", "action_horizon", "valid_action_horizon"),
        *("resize_imgs_with_padding", "image_resolution", "resize_shape", "image_resize_shape", "image_size"),
        *("resize_images_to", "crop_shape", "image_crop_shape", "image_crop_size", "image_target_size"),
        *("shortest_image_edge", "resize_size", "max_action_dim", "max_state_dim", "action_dim", "state_dim"),
        *("postprocess_action_dim", "env_action_dim", "expected_action_dim", "num_domains", "num_categories"),
        *("spatial_softmax_num_keypoints", "r", "lora_rank"),
    ),
    # tokens of a prompt or a prefix
    8192: (
        *("tokenizer_max_length", "max_text_length", "prefix_length", "max_len_seq", "max_action_tokens"),
        *("max_decoding_steps", "action_max_seq_len", "len_soft_prompts", "num_target_vision_tokens"),
        *("num_embodied_action_tokens_per_instruction", "num_action_tokens_per_timestep", "max_sequence_length"),
    ),
    # noise levels
    10_000: ("num_train_timesteps", "action_num_timestep_buckets"),
    # what is only counted or compared
    MAX_COUNT: (
        *("scheduler_decay_steps", "scheduler_warmup_steps", "max_steps", "save_steps", "run_steps"),
        *("scorer_warmup_steps", "score_refresh_steps", "controller_interval", "aggregation_frames"),
        *("image_min_pixels", "image_max_pixels", "drop_n_last_frames", "max_episode_steps", "queue_size"),
        *("chunk_stride", "consequence_offset", "total_step", "tinit", "tfinal", "deltaT", "vocab_size"),
    ),
    # seeds and identities
    2**64: ("random_seed", "random_loc_seed", "projection_prng_key", "projection_seed", "proj_seed", "generator_seed"),
}
_IDENTITIES = ("_id", "_index")
_STATISTICS = ("stats", "raw_stats", "statistics")
"""Of data, in a step's settings: nothing is counted or allocated by them."""
LIMITS = {name: limit for limit, names in _GROUPS.items() for name in names}
"""The largest absolute value of a field, by its name."""


def check_numbers(content: Any, where: str = "") -> None:
    """Refuse a number that is larger than any policy needs.

    Args:
        content: parsed JSON; the numbers of a list are taken as its field's.
        where: what holds it, at the beginning of the error message.

    Raises:
        ValueError: names the number, its value and the limit.
    """
    try:
        _check(content, "")
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None


def _check(content: Any, name: str) -> None:
    key = name.rpartition(".")[2]
    if isinstance(content, dict):
        if key in ("input_features", "output_features") and len(content) > MAX_FEATURES:
            raise ValueError(f"{name} has {len(content)} entries; the limit is {MAX_FEATURES}.")
        for own, value in content.items():
            if own in _STATISTICS:
                continue
            _check(value, f"{name}.{own}" if name else str(own))
    elif isinstance(content, list | tuple):
        for value in content:
            _check(value, name)
        if key == "shape":
            _check_shape(content, name)
    else:
        _check_number(content, key, name)


def _check_number(value: Any, key: str, name: str) -> None:
    # draccus reads an integer from a string as well
    if isinstance(value, str) and key in LIMITS and value.strip().lstrip("+-").isdecimal():
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if key.endswith(_IDENTITIES):
        return
    limit = LIMITS.get(key, MAX_WIDTH if isinstance(value, int) else math.inf)
    if abs(value) > limit:
        raise ValueError(f"{name}={quoted(value)} is out of range: the limit is {limit}.")


def _check_shape(shape: Any, name: str) -> None:
    if not all(isinstance(size, int) and size >= 0 for size in shape) or math.prod(shape) > MAX_ELEMENTS:
        raise ValueError(
            f"{name}={quoted(list(shape))} is out of range: sizes are 0 or more, and {MAX_ELEMENTS} elements in all."
        )
