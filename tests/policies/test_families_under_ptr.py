"""Every family inside a `PTRPolicy`: what its chunks are made of, what it predicts, how it is optimised."""

import itertools
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from demonstrations import write_dataset
from family import TOP, WRIST, Family
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.policies.factory import make_pre_post_processors
from policy_families import FAMILIES
from test_training_runs import FIRST_OF_EACH, policy_for
from torch import Tensor
from torch.utils.data import default_collate

from ptr_hf import PTRConfig, PTRPolicy, PTRTrainer, PTRTrainingArguments
from ptr_hf.data.datasets import open_dataset
from ptr_hf.data.normalizers import harmless
from ptr_hf.data.segments import SegmentLayout, segment_rows
from ptr_hf.pathway.targets import samples_of
from ptr_hf.processor_ptr import make_ptr_pre_post_processors, preprocess

LENGTH, ANCHORS = 3, (0, 30, 41)
SMALL = {"preset": "ptr", "scorer_warmup_steps": 0, "queue_size": 0, "queue_negatives": 0, "device": "cpu"}


@cache
def dataset(cameras: tuple[str, ...], size: int) -> Path:
    return write_dataset(Path(mkdtemp(prefix="points_")) / "d", (24, 30, 24), cameras=cameras, size=size, vivid=True)


def ptr_policy(family: Family, **settings: Any) -> tuple[PTRPolicy, Path]:
    root = dataset(("observation.image",) if family.cameras else (), family.image_size)
    config = PTRConfig(**{**SMALL, "segment_length": LENGTH, **settings})
    torch.manual_seed(0)
    return PTRPolicy(config, base_policy=policy_for(family, root)), root


def named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def raw_segments(policy: PTRPolicy, root: Path, layout: SegmentLayout, anchors: tuple[int, ...]) -> dict[str, Any]:
    opened = open_dataset(root, layout)
    return default_collate([opened[anchor] for anchor in anchors])


@pytest.mark.parametrize("family", FIRST_OF_EACH, ids=lambda family: family.name)
def test_a_chunk_of_a_segment_is_the_policys_own_batch(family: Family) -> None:
    policy, root = ptr_policy(family, num_belief_tokens=0)
    layout, base = policy.config.layout, policy.config.base_config
    stats = LeRobotDatasetMetadata("tests/points", root=root).stats
    preprocessor, _ = make_pre_post_processors(base, dataset_stats=stats)
    raw = raw_segments(policy, root, layout, ANCHORS)
    segment = policy.split(preprocess(raw, preprocessor, layout))
    plain = SegmentLayout(layout.observation_steps, layout.action_steps, 1, layout.chunk_stride, None)
    for t, start in enumerate(layout.chunk_starts):
        anchors = tuple(anchor + start for anchor in ANCHORS)
        own = preprocessor(raw_segments(policy, root, plain, anchors))
        own = policy.adapter.arrange(own)
        chunk = segment.chunk(t)
        compared = 0
        for key, value in own.items():
            if not isinstance(value, Tensor) or value.ndim == 0 or key in ("timestamp", "frame_index"):
                continue
            if key.endswith("_is_pad") and key != "action_is_pad":
                continue
            found = chunk[key].reshape(value.shape) if chunk[key].numel() == value.numel() else chunk[key]
            assert torch.equal(found, value), f"{key} of chunk {t}"
            compared += 1
        assert compared > 3


@pytest.mark.parametrize("family", FIRST_OF_EACH, ids=lambda family: family.name)
def test_lerobots_own_loop_gets_the_same_rows(family: Family) -> None:
    policy, root = ptr_policy(family, num_belief_tokens=0)
    layout = policy.config.layout
    meta = LeRobotDatasetMetadata("tests/points", root=root)
    preprocessor, _ = make_ptr_pre_post_processors(policy.config, meta.stats, meta)
    plain, _ = make_pre_post_processors(policy.config.base_config, dataset_stats=meta.stats)
    # the episode's number, constant in every episode, has q01 = q99 in LeRobot's average over episodes
    plain = harmless(plain)
    raw = raw_segments(policy, root, layout, ANCHORS)
    found, expected = preprocessor(dict(raw)), plain(segment_rows(dict(raw), layout))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value) if isinstance(value, Tensor) else found[key] == value, key
    output = policy.compute(found)
    assert output.loss.shape == (LENGTH * len(ANCHORS),)
    assert output.loss.isfinite().all()


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.name in ("pi05", "pi0_fast", "groot")], ids=lambda f: f.name
)
def test_segments_that_went_through_the_preprocessor_whole_are_refused(family: Family) -> None:
    policy, root = ptr_policy(family, num_belief_tokens=0)
    raw = raw_segments(policy, root, policy.config.layout, ANCHORS)
    with pytest.raises(ValueError, match=rf"{family.name} policy's preprocessor reads one chunk a row"):
        policy.compute(raw)


@pytest.mark.parametrize("name", ["act", "diffusion-history", "multi_task_dit-flow", "pi0_fast", "groot", "evo1"])
def test_a_belief_is_carried_through_an_episode(name: str) -> None:
    family = named(name)
    family = Family(**{**vars(family), "cameras": (TOP,)}) if len(family.cameras) > 1 else family
    policy, root = ptr_policy(family, num_belief_tokens=2)
    stats = LeRobotDatasetMetadata("tests/points", root=root).stats
    preprocessor, _ = make_pre_post_processors(policy.config.base_config, dataset_stats=stats)
    frames = open_dataset(root, SegmentLayout(None, (0,), 1, 1, None))
    keys = [key for key in frames[0] if key.startswith("observation.") and not key.endswith("_is_pad")]
    executed = int(policy.config.base_config.n_action_steps)
    policy.eval()
    policy.reset()
    beliefs = []
    for step in range(2 * executed + 1):
        item = frames[step]
        batch = preprocessor({**{key: item[key][None] for key in keys}, "task": [item["task"]]})
        action = policy.select_action(batch)
        assert action.shape[0] == 1
        assert action.isfinite().all()
        assert policy._belief_tokens is not None
        beliefs.append(policy._belief_tokens)
    changes = [not torch.equal(a, b) for a, b in itertools.pairwise(beliefs)]
    assert changes == [(step + 1) % executed == 0 for step in range(2 * executed)], "it moves once a chunk"
    policy.reset()
    assert policy._belief_tokens is None


def test_the_history_of_a_policy_is_what_it_would_have_kept_itself() -> None:
    family = named("diffusion-history")
    family = Family(**{**vars(family), "cameras": (TOP,)})
    policy, root = ptr_policy(family, num_belief_tokens=2)
    stats = LeRobotDatasetMetadata("tests/points", root=root).stats
    preprocessor, _ = make_pre_post_processors(policy.config.base_config, dataset_stats=stats)
    frames = open_dataset(root, SegmentLayout(None, (0,), 1, 1, None))
    alone = policy_for(family, root).eval()
    policy.eval()
    for step in range(4):
        item = frames[step]
        observation = {key: item[key][None] for key in item if key in ("observation.image", "observation.state")}
        batch = preprocessor({**observation, "task": [item["task"]]})
        policy.select_action(dict(batch))
        alone.select_action(dict(batch))
        for key in ("observation.state", "observation.images"):
            for kept, own in zip(policy.base._queues[key], alone._queues[key], strict=True):
                assert torch.equal(kept, own)


def test_a_camera_that_some_episodes_lack_has_no_part_in_their_consequences() -> None:
    family = named("smolvla-two-cameras")
    root = dataset((TOP, WRIST), family.image_size)
    config = PTRConfig(**SMALL, segment_length=LENGTH, num_belief_tokens=0)
    policy = PTRPolicy(config, base_policy=policy_for(family, root)).eval()
    layout = policy.config.layout
    stats = LeRobotDatasetMetadata("tests/points", root=root).stats
    preprocessor, _ = make_pre_post_processors(policy.config.base_config, dataset_stats=stats)
    raw = raw_segments(policy, root, layout, ANCHORS)
    raw[WRIST] = 1 - raw[WRIST]  # the two cameras show different pictures
    mask = torch.tensor([True, False, True])
    masked = {**raw, f"{WRIST}_padding_mask": mask}

    def targets(batch: dict[str, Any]) -> Tensor:
        segment = policy.split(preprocess(batch, preprocessor, layout))
        found, _ = policy._targets(segment, policy._encode_views(segment))
        return found.unflatten(0, (LENGTH, len(ANCHORS)))

    both, some = targets(raw), targets(masked)
    scrambled = {**masked, WRIST: torch.where(mask[:, None, None, None, None], raw[WRIST], torch.rand_like(raw[WRIST]))}
    assert torch.equal(some[:, mask], both[:, mask])
    assert not torch.allclose(some[:, ~mask], both[:, ~mask])
    assert torch.equal(targets(scrambled), some), "what lies in a missing camera's place reaches nothing"
    nothing = {**raw, f"{WRIST}_padding_mask": ~mask, f"{TOP}_padding_mask": torch.zeros(3, dtype=torch.bool)}
    segment = policy.split(preprocess(nothing, preprocessor, layout))
    samples = samples_of(segment, targets(nothing).flatten(0, 1), policy.adapter, state_dim=0)
    assert not samples.valid.unflatten(0, (LENGTH, 3))[:, mask].any(), "a consequence that no camera saw is none"


def test_a_world_models_coming_frames_stay_away_from_the_policy() -> None:
    policy, _ = ptr_policy(named("vla_jepa"), num_belief_tokens=0)
    assert max(policy.config.base_config.observation_delta_indices) > 0
    assert policy.config.layout.observation_steps is None


def test_parameters_that_a_policy_names_keep_their_own_learning_rates(tmp_path: Path) -> None:
    family = named("xvla")
    root = dataset(("observation.image",), family.image_size)
    args = PTRTrainingArguments(
        preset="ptr",
        output_dir=str(tmp_path),
        max_steps=1,
        learning_rate=2e-4,
        segment_length=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = PTRTrainer(policy_for(family, root), args, root)
    groups = trainer.create_optimizer().param_groups
    rates = {}
    names = {id(parameter): name for name, parameter in trainer.policy.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            rates[names[id(parameter)]] = group["lr"]
    # LeRobot goes by the name: everything called vlm learns at a tenth
    vlm = {rate for name, rate in rates.items() if "vlm" in name}
    others = {rate for name, rate in rates.items() if "vlm" not in name}
    assert list(vlm) == pytest.approx([2e-5])
    assert list(others) == pytest.approx([2e-4])
    assert rates.keys() == {name for name, p in trainer.policy.named_parameters() if p.requires_grad}
    lerobots = trainer.policy.config.get_optimizer_preset().build(trainer.policy.get_optim_params())
    assert len(lerobots.param_groups) == len(groups)
