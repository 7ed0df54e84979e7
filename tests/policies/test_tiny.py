"""The offline builders: small, reproducible, LeRobot's own artefacts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families_smolvla import vlm_folder
from family import CHUNK, TASKS, TOP
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from policy_families import FAMILIES
from torch.nn.functional import interpolate, normalize
from transformers import AutoProcessor, AutoTokenizer

from ptr_hf.policies import make_adapter
from ptr_hf.policies.tiny import center_vision_features, tiny_act, tiny_smolvla, write_tiny_vlm

DATASET_FEATURES: dict[str, dict[str, Any]] = {
    TOP: {"dtype": "video", "shape": (84, 84, 3), "names": ["height", "width", "channels"]},
    "observation.state": {"dtype": "float32", "shape": (4,), "names": None},
    "action": {"dtype": "float32", "shape": (4,), "names": None},
    "timestamp": {"dtype": "float32", "shape": (1,), "names": None},
}


def scenes(count: int) -> torch.Tensor:
    """One cluttered scene seen `count` times with a square at another place and of another colour."""
    generator = torch.Generator().manual_seed(0)
    background = interpolate(torch.rand(1, 3, 9, 9, generator=generator), size=(84, 84), mode="nearest")
    frames = background.repeat(count, 1, 1, 1)
    for frame in frames:
        row, column = torch.randint(0, 60, (2,), generator=generator).tolist()
        frame[:, row : row + 24, column : column + 24] = torch.rand(3, 1, 1, generator=generator)
    return frames


def mean_cosine(policy: SmolVLAPolicy, frames: torch.Tensor, layer: int) -> float:
    adapter = make_adapter(policy)
    pooled = normalize(adapter.encode_image(adapter.build_tower(layer), TOP, frames).mean(dim=1), dim=-1)
    similarity = pooled @ pooled.T
    return float((similarity.sum() - similarity.trace()) / (len(frames) * (len(frames) - 1)))


def test_default_policy_from_dataset_features(tmp_path: Path) -> None:
    policy = tiny_smolvla(DATASET_FEATURES, write_tiny_vlm(tmp_path / "vlm", texts=TASKS), chunk_size=CHUNK)
    assert list(policy.config.input_features) == [TOP, "observation.state"]
    assert list(policy.config.output_features) == ["action"]
    assert sum(parameter.numel() for parameter in policy.parameters()) < 1.5e6
    adapter = make_adapter(policy)
    assert adapter.num_tower_layers() >= 4
    assert not adapter.tower_is_frozen()
    frozen = tiny_smolvla(DATASET_FEATURES, policy.config.vlm_model_name, freeze_vision_encoder=True)
    assert make_adapter(frozen).tower_is_frozen()


def test_features_of_one_scene_spread_once_centred(tmp_path: Path) -> None:
    vlm = write_tiny_vlm(tmp_path)
    frames = scenes(48)
    plain = tiny_smolvla(DATASET_FEATURES, vlm)
    centred = tiny_smolvla(DATASET_FEATURES, vlm, frames={TOP: frames[:24]})
    for layer in range(1, 5):
        before, after = mean_cosine(plain, frames[24:], layer), mean_cosine(centred, frames[24:], layer)
        assert after < 0.2 < before, f"layer {layer}: {before:.2f} -> {after:.2f}"
    center_vision_features(plain, {TOP: frames[:24]})
    assert mean_cosine(plain, frames[24:], 2) == pytest.approx(mean_cosine(centred, frames[24:], 2), abs=1e-4)


def test_weights_depend_on_the_seed_alone() -> None:
    family = FAMILIES[0]
    for build in (lambda seed: family.policy(seed=seed), lambda seed: tiny_act(family.features, seed=seed)):
        torch.manual_seed(123)
        first = build(0)
        drawn = torch.rand(1)
        torch.manual_seed(123)
        assert torch.equal(torch.rand(1), drawn), "building a policy must not move the global random stream"
        second, other = build(0), build(1)
        same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
        assert all(same)
        assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    family = FAMILIES[0]
    policy = family.policy()
    policy.save_pretrained(tmp_path)
    loaded = SmolVLAPolicy.from_pretrained(tmp_path)
    batch = family.batch(policy)
    torch.manual_seed(0)
    expected = make_adapter(policy).rollout(batch).actions
    torch.manual_seed(0)
    torch.testing.assert_close(make_adapter(loaded).rollout(batch).actions, expected, rtol=0, atol=0)


def test_tokenizer_is_byte_level_and_learns_merges(tmp_path: Path) -> None:
    learned = AutoTokenizer.from_pretrained(vlm_folder())
    plain = AutoTokenizer.from_pretrained(write_tiny_vlm(tmp_path / "plain"))
    text = "push the puck to the goal\n"
    assert len(plain(text)["input_ids"]) == len(text)
    assert len(learned(text)["input_ids"]) < len(text) // 2
    for tokenizer in (learned, plain):
        for sample in (text, "öffne die Schublade ✓"):
            assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample
    assert AutoProcessor.from_pretrained(vlm_folder()).image_seq_len == (32 // 8 // 2) ** 2


def test_impossible_patches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiple of patch_size 16"):
        write_tiny_vlm(tmp_path, image_size=84, patch_size=16)
    with pytest.raises(ValueError, match="scale_factor 2 divides"):
        write_tiny_vlm(tmp_path, image_size=84, patch_size=12)
