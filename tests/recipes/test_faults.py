"""The corruption protocol: it changes the labels it names, nothing else, and tells the truth about it."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import faults
from episodes import Episode
from faults import IMAGE_KINDS, KINDS, PAPER_SHARES, CorruptionPlan, corrupt, shifted
from ptr_hf.data.demonstrations import CLEAN

TASKS = ("reach", "push", "pick and place", "open the faucet")


def episode(length: int = 50, task: str = "push", seed: int = 0) -> Episode:
    rng = np.random.default_rng(seed)
    frames = {
        "action": rng.uniform(-1, 1, (length, 4)).astype(np.float32),
        "observation.state": rng.normal(size=(length, 4)).astype(np.float32),
        "observation.image": rng.integers(0, 256, (length, 8, 8, 3), dtype=np.uint8),
    }
    return Episode(frames, task)


@given(
    kind=st.sampled_from(KINDS), length=st.integers(10, 120), seed=st.integers(0, 2**32 - 1), data=st.integers(0, 1000)
)
@settings(max_examples=150)
def test_only_the_named_labels_change(kind: str, length: int, seed: int, data: int) -> None:
    clean = episode(length, seed=data)
    before = {key: value.copy() for key, value in clean.frames.items()}
    corrupted, _ = corrupt(clean, kind, seed, TASKS, episode(length // 2, seed=data + 1))
    kept = corrupted.length
    label = "observation.image" if kind in IMAGE_KINDS else "action"
    for key, value in before.items():
        np.testing.assert_array_equal(clean.frames[key], value, err_msg="the input must stay untouched")
        assert corrupted.frames[key].dtype == value.dtype
        if key != label:
            np.testing.assert_array_equal(corrupted.frames[key], value[:kept])
    if kind in ("truncation", "wrong_instruction"):
        np.testing.assert_array_equal(corrupted.actions, before["action"][:kept])
    else:
        assert not np.array_equal(corrupted.frames[label], before[label])
    assert (kept < length) == (kind == "truncation")
    assert (corrupted.task != clean.task) == (kind == "wrong_instruction")


@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_a_seed_decides_everything(kind: str, seed: int) -> None:
    first, values = corrupt(episode(), kind, seed, TASKS, episode(seed=1))
    second, again = corrupt(episode(), kind, seed, TASKS, episode(seed=1))
    assert values == again
    assert first.task == second.task
    for key, value in first.frames.items():
        np.testing.assert_array_equal(value, second.frames[key])


@given(length=st.integers(10, 500), seed=st.integers(0, 2**32 - 1))
def test_truncation_keeps_40_to_70_percent(length: int, seed: int) -> None:
    steps = faults.draw_truncation(length, seed)
    assert 0.4 * length <= steps <= 0.7 * length


def test_truncation_reaches_both_ends_of_its_range() -> None:
    drawn = {faults.draw_truncation(100, seed) for seed in range(1000)}
    assert drawn == set(range(40, 71))


def test_truncation_needs_a_whole_number_of_steps() -> None:
    with pytest.raises(ValueError, match="widen the range"):
        faults.draw_truncation(1, seed=0)
    with pytest.raises(ValueError, match="Cannot keep 51 steps"):
        faults.truncate(episode(50), 51)


def test_noise_has_the_asked_standard_deviation_and_respects_bounds() -> None:
    clean = episode(5000)
    clean = clean.with_actions(np.zeros((5000, 4), np.float32))
    noise = faults.add_action_noise(clean, seed=1, std=0.3).actions
    assert noise.std() == pytest.approx(0.3, rel=0.02)
    assert abs(noise.mean()) < 0.01
    assert np.abs(noise).max() > 0.2
    channels = clean.actions.shape[1]
    own = faults.add_action_noise(clean, seed=1, std=[0.3, *[0.0] * (channels - 1)]).actions
    np.testing.assert_array_equal(own[:, 0], noise[:, 0])
    np.testing.assert_array_equal(own[:, 1:], clean.actions[:, 1:])
    bounded = faults.add_action_noise(clean, seed=1, std=0.3, bounds=(-0.2, 0.2)).actions
    np.testing.assert_allclose(bounded, np.clip(noise, -0.2, 0.2), atol=1e-7)


def test_noise_differs_between_seeds() -> None:
    one, other = (faults.add_action_noise(episode(), seed).actions for seed in (1, 2))
    assert not np.array_equal(one, other)


def test_wrong_convention_is_its_own_inverse() -> None:
    clean = episode()
    flipped = faults.flip_convention(clean, axes=(0, 1))
    np.testing.assert_array_equal(flipped.actions[:, :2], -clean.actions[:, :2])
    np.testing.assert_array_equal(flipped.actions[:, 2:], clean.actions[:, 2:])
    np.testing.assert_array_equal(faults.flip_convention(flipped, axes=(0, 1)).actions, clean.actions)


def test_delay_moves_actions_later_and_holds_the_first() -> None:
    clean = episode(20)
    delayed = faults.delay_actions(clean, steps=3).actions
    np.testing.assert_array_equal(delayed[3:], clean.actions[:-3])
    np.testing.assert_array_equal(delayed[:3], np.repeat(clean.actions[:1], 3, 0))
    np.testing.assert_array_equal(faults.delay_actions(clean, steps=99).actions, np.repeat(clean.actions[:1], 20, 0))
    with pytest.raises(ValueError, match="delay"):
        faults.delay_actions(clean, steps=-1)


def test_scaling_and_zeroing_can_be_limited_to_axes() -> None:
    clean = episode()
    scaled = faults.scale_actions(clean, 0.5, axes=(0, 1, 2)).actions
    np.testing.assert_array_equal(scaled[:, :3], clean.actions[:, :3] * 0.5)
    np.testing.assert_array_equal(scaled[:, 3], clean.actions[:, 3])
    zeroed = faults.zero_actions(clean, axes=(0,)).actions
    assert not zeroed[:, 0].any()
    np.testing.assert_array_equal(zeroed[:, 1:], clean.actions[:, 1:])
    assert not faults.zero_actions(clean).actions.any()


def test_noise_in_part_leaves_the_rest() -> None:
    clean = episode(40)
    noisy, values = corrupt(clean, "noise_in_part", 3, std=0.4)
    changed = np.flatnonzero((noisy.actions != clean.actions).any(axis=1))
    assert changed.tolist() == list(range(values["start"], values["start"] + 10))


def test_a_moved_camera_shows_the_same_shifted() -> None:
    shown = episode(5).frames["observation.image"]
    moved = shifted(shown, 2, -3)
    np.testing.assert_array_equal(moved[:, 2:, :-3], shown[:, :-2, 3:])
    np.testing.assert_array_equal(moved[:, 0], moved[:, 2])


def test_frozen_frames_are_held_and_released() -> None:
    clean = episode(40)
    hung, values = corrupt(clean, "frozen_frames", 5)
    before, after = (item.frames["observation.image"] for item in (clean, hung))
    stretch = slice(values["start"], values["start"] + values["steps"])
    assert values["steps"] == 12
    assert (after[stretch] == before[values["start"]]).all()
    np.testing.assert_array_equal(np.delete(after, range(40)[stretch], 0), np.delete(before, range(40)[stretch], 0))


def test_a_wrong_camera_is_another_one_or_the_episode_before() -> None:
    clean, beside = episode(12), episode(5, seed=1)
    wrong, values = corrupt(clean, "wrong_camera", 0, beside=beside)
    assert values["shows"] == "the episode beside it"
    np.testing.assert_array_equal(wrong.frames["observation.image"][4:], beside.frames["observation.image"][[4] * 8])
    two = Episode({**clean.frames, "observation.wrist": beside.frames["observation.image"][[0] * 12]}, "push")
    wrong, values = corrupt(two, "wrong_camera", 0)
    np.testing.assert_array_equal(wrong.frames[values["camera"]], two.frames[values["shows"]])
    with pytest.raises(ValueError, match="a second camera of the same size, or a second episode"):
        corrupt(clean, "wrong_camera", 0)
    blind = Episode({"action": clean.actions}, "push")
    with pytest.raises(ValueError, match="no colour camera"):
        corrupt(blind, "camera_moved", 0)


def test_the_plan_takes_the_episode_before_and_for_the_first_the_second() -> None:
    clean = [episode(10, seed=seed) for seed in range(3)]
    spoiled = list(CorruptionPlan({"wrong_camera": 1.0}).apply(clean, [item.task for item in clean]))
    for place, other in enumerate((1, 0, 1)):
        shown = spoiled[place][0].frames["observation.image"]
        np.testing.assert_array_equal(shown, clean[other].frames["observation.image"])


def test_a_wrong_instruction_is_another_one_and_all_are_drawn() -> None:
    drawn = {faults.draw_instruction("push", TASKS, seed) for seed in range(200)}
    assert drawn == set(TASKS) - {"push"}
    with pytest.raises(ValueError, match="no instruction other than 'push'"):
        faults.draw_instruction("push", ["push", "push"], seed=0)


def test_unknown_corruptions_and_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="Unknown corruption 'blur'"):
        corrupt(episode(), "blur", 0)
    with pytest.raises(TypeError, match="strength"):
        corrupt(episode(), "noise", 0, strength=2)
    with pytest.raises(ValueError, match="blur"):
        CorruptionPlan({"blur": 0.1})
    with pytest.raises(ValueError, match="between 0 and 1"):
        CorruptionPlan({"noise": 1.1})
    with pytest.raises(ValueError, match="allow overlapping"):
        CorruptionPlan({"noise": 0.6, "truncation": 0.6})


def test_an_episode_needs_streams_of_one_length() -> None:
    with pytest.raises(ValueError, match="same number of steps"):
        Episode({"action": np.zeros((3, 4)), "observation.state": np.zeros((4, 4))}, "push")
    with pytest.raises(ValueError, match="'action'"):
        Episode({"observation.state": np.zeros((4, 4))}, "push")


@given(per_task=st.integers(3, 30), tasks=st.integers(1, 6), seed=st.integers(0, 1000))
@settings(max_examples=60)
def test_shares_hold_and_spread_over_the_tasks(per_task: int, tasks: int, seed: int) -> None:
    names = [f"task {index % tasks}" for index in range(per_task * tasks)]
    plan = CorruptionPlan({"noise": 0.25, "truncation": 0.2, "zeroed": 0.1}, seed)
    assigned = plan.assign(names)
    assert all(len(kinds) <= 1 for kinds in assigned)
    counts = Counter(kind for kinds in assigned for kind in kinds)
    for kind, share in plan.shares.items():
        assert counts[kind] == round(share * len(names))
        by_task = Counter(name for name, kinds in zip(names, assigned, strict=True) if kind in kinds)
        spread = [by_task[name] for name in set(names)]
        assert max(spread) - min(spread) <= 1


def test_the_plan_depends_on_its_seed_only() -> None:
    names = [TASKS[index % 4] for index in range(80)]
    assert CorruptionPlan(PAPER_SHARES, 3).assign(names) == CorruptionPlan(PAPER_SHARES, 3).assign(names)
    assert CorruptionPlan(PAPER_SHARES, 3).assign(names) != CorruptionPlan(PAPER_SHARES, 4).assign(names)


def test_overlapping_kinds_are_drawn_independently() -> None:
    names = [TASKS[index % 4] for index in range(400)]
    assigned = CorruptionPlan(PAPER_SHARES, overlapping=True).assign(names)
    counts = Counter(kind for kinds in assigned for kind in kinds)
    assert counts == {kind: 400 * share for kind, share in PAPER_SHARES.items()}
    both = sum({"noise", "truncation"} <= set(kinds) for kinds in assigned)
    assert both == pytest.approx(400 * 0.30 * 0.25, rel=0.5)


@pytest.mark.parametrize("overlapping", [False, True])
def test_the_truth_is_complete_and_reproduces_the_data(overlapping: bool) -> None:
    clean = [episode(30 + index, TASKS[index % 4], seed=index) for index in range(80)]
    plan = CorruptionPlan(
        dict.fromkeys(KINDS, 0.08), seed=5, parameters={"noise": {"std": 0.2}}, overlapping=overlapping
    )
    written = list(plan.apply(clean, [item.task for item in clean]))
    assert len(written) == len(clean)
    for index, (original, (corrupted, records)) in enumerate(zip(clean, written, strict=True)):
        assert {record.episode_index for record in records} == {index}
        assert {record.source_task for record in records} == {original.task}
        assert {record.task for record in records} == {corrupted.task}
        rebuilt, beside = original, clean[index - 1 if index else 1]
        for record in records:
            if record.kind != CLEAN:
                assert record.seed is not None
                rebuilt, values = corrupt(
                    rebuilt, record.kind, record.seed, TASKS, beside, **plan.parameters.get(record.kind, {})
                )
                assert values == record.parameters
        assert rebuilt.task == corrupted.task
        for key in original.frames:
            np.testing.assert_array_equal(rebuilt.frames[key], corrupted.frames[key])
    kinds = Counter(record.kind for _, records in written for record in records)
    assert all(kinds[kind] == round(0.08 * 80) for kind in KINDS)


def test_alternatives_limit_the_wrong_instructions() -> None:
    clean = [episode(task=TASKS[index % 2]) for index in range(20)]
    plan = CorruptionPlan({"wrong_instruction": 1.0}, alternatives={"reach": ["push"], "push": ["lift"]})
    tasks = [item.task for item in clean]
    assert {
        (item.task, corrupted.task) for item, (corrupted, _) in zip(clean, plan.apply(clean, tasks), strict=True)
    } == {
        ("reach", "push"),
        ("push", "lift"),
    }


def test_episodes_must_be_those_the_plan_was_made_for() -> None:
    with pytest.raises(ValueError, match="Episode 0 is 'push'"):
        list(CorruptionPlan({}).apply([episode(task="push")], ["reach"]))
