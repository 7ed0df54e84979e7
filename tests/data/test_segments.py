"""Segments: every frame is the one it should be, and no future reaches the policy."""

from pathlib import Path
from typing import Any

import pytest
import torch
from demonstrations import write_dataset
from hypothesis import given
from hypothesis import strategies as st
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline, batch_to_transition, transition_to_batch
from small_policies import (
    CHUNK,
    FAMILIES,
    base_policy,
    frames_of,
    gradients,
    ptr_policy,
    raw_batch,
    stats_of,
    train_batch,
)
from torch import Tensor
from torch.utils.data import default_collate

from benchmarks.speed.frames import DecodedFrames
from ptr_hf.data import frame_columns
from ptr_hf.data.datasets import episode_spans, open_dataset
from ptr_hf.data.segments import Segment, SegmentLayout, segment_rows, split_segment
from ptr_hf.processor_ptr import preprocess

CAMERA, STATE = "observation.image", "observation.state"
LENGTHS = (30, 24, 40, 18)
STARTS = (0, 30, 54, 94)


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same episodes without a camera: quick to read in full."""
    return write_dataset(tmp_path_factory.mktemp("datasets") / "states", LENGTHS, cameras=())


def layout(
    segment_length: int = 3,
    stride: int = CHUNK,
    offset: int | None = CHUNK,
    steps: tuple[int, ...] | None = None,
    chunk: int = CHUNK,
) -> SegmentLayout:
    return SegmentLayout(steps, tuple(range(chunk)), segment_length, stride, offset)


LAYOUTS = {
    "offset is stride": layout(),
    "offset beyond stride": layout(offset=6),
    "offset below stride": layout(stride=6, offset=3),
    "overlapping chunks": layout(stride=2, offset=4),
    "gaps between chunks": layout(stride=7, offset=7),
    "offset of two strides": layout(offset=8),
    "one chunk": layout(segment_length=1),
    "no futures": layout(offset=None),
    "one step with a time axis": layout(steps=(0,)),
    "two observation steps": layout(steps=(-1, 0)),
    "two observation steps, odd offset": layout(steps=(-1, 0), stride=3, offset=5),
}
FEW = ("offset is stride", "offset below stride", "no futures", "two observation steps, odd offset")
"""Those that the default run reads; `-m full` reads the others."""
EVERY_LAYOUT = [pytest.param(name, marks=() if name in FEW else pytest.mark.full) for name in LAYOUTS]


def read(root: Path, layout: SegmentLayout, anchors: list[int], **settings: Any) -> tuple[dict[str, Any], Segment]:
    dataset = open_dataset(root, layout, **settings)
    batch = default_collate([dataset[anchor] for anchor in anchors])
    return batch, split_segment(batch, layout)


def episode_of(frame: int) -> int:
    return max(episode for episode, start in enumerate(STARTS) if start <= frame)


def clamped(frame: int, anchor: int) -> int:
    """The frame that LeRobot reads: past either end of the anchor's episode it repeats the last one."""
    episode = episode_of(anchor)
    return min(max(frame, STARTS[episode]), STARTS[episode] + LENGTHS[episode] - 1)


@given(
    segment_length=st.integers(1, 6),
    stride=st.integers(1, 20),
    offset=st.none() | st.integers(1, 40),
    steps=st.sampled_from([None, (0,), (-1, 0), (-4, -2, 0)]),
    chunk=st.integers(1, 20),
)
def test_every_needed_offset_is_listed_once(
    segment_length: int, stride: int, offset: int | None, steps: tuple[int, ...] | None, chunk: int
) -> None:
    layout_ = layout(segment_length, stride, offset, steps, chunk)
    starts = [t * stride for t in range(segment_length)]
    needed = {start + step for start in starts for step in (steps or (0,))}
    if offset is not None:
        needed |= {start + offset for start in starts}
    offsets = layout_.observation_offsets
    if offsets is None:
        assert (steps, segment_length, offset) == (None, 1, None), "a policy without a time axis reads plain frames"
    else:
        assert offsets == sorted(needed)
    assert layout_.action_offsets == sorted({start + step for start in starts for step in range(chunk)})
    for t in range(segment_length if offset is not None else 0):
        shared = layout_.future_chunk(t)
        expected = [u for u, start in enumerate(starts) if start == starts[t] + offset]
        assert ([] if shared is None else [shared]) == expected
        view = layout_.view_of(starts[t] + offset)
        assert [view] == expected or view >= segment_length


@pytest.mark.parametrize("segment_length", [1, 4])
def test_one_frame_more_than_chunks_when_the_offset_is_the_stride(segment_length: int) -> None:
    offsets = layout(segment_length).observation_offsets
    assert offsets == [t * CHUNK for t in range(segment_length + 1)]


@pytest.mark.parametrize("name", EVERY_LAYOUT)
def test_rows_are_the_hand_indexed_frames(points: Path, name: str) -> None:
    check_rows(points, LAYOUTS[name], [0, 5, 29, 31, 40, 60, 75, 93, 94, 105, 111])


def test_rows_are_the_hand_indexed_frames_of_a_video(point_videos: Path) -> None:
    check_rows(point_videos, layout(offset=6), [0, 20, 47, 93, 100])


def check_rows(root: Path, layout: SegmentLayout, anchors: list[int]) -> None:
    """Compare every row of a split batch with frames read one by one."""
    frames = frames_of(root)
    _, segment = read(root, layout, anchors)
    assert (segment.batch_size, segment.length) == (len(anchors), layout.segment_length)
    for t, start in enumerate(layout.chunk_starts):
        for b, anchor in enumerate(anchors):
            row, now = t * len(anchors) + b, anchor + start
            steps = layout.observation_steps or (0,)
            current = [frames[clamped(now + step, anchor)] for step in steps]
            actions = [frames[clamped(now + step, anchor)]["action"] for step in layout.action_steps]
            for key in (CAMERA, STATE):
                expected = torch.stack([frame[key] for frame in current])
                expected = expected.squeeze(0) if layout.observation_steps is None else expected
                assert torch.equal(segment.chunks[key][row], expected), f"{key} of chunk {t} at {anchor}"
            assert torch.equal(segment.chunks["action"][row], torch.stack(actions))
            assert segment.chunks["task"][row] == frames[anchor]["task"]
            assert segment.index[row] == now
            assert segment.episode[row] == episode_of(anchor)
            assert segment.task[row] == frames[anchor]["task_index"]
            if layout.consequence_offset is not None:
                future = frames[clamped(now + layout.consequence_offset, anchor)]
                for key in (CAMERA, STATE):
                    assert torch.equal(segment.futures[key][segment.future_index[t]][b], future[key])
                assert segment.target_index[row] == now + layout.consequence_offset
    assert sorted(segment.chunk(0)) == sorted(segment.chunks)
    assert torch.equal(segment.chunk(0)["action"], segment.chunks["action"][: len(anchors)])


@pytest.mark.parametrize("name", EVERY_LAYOUT)
def test_validity_ends_exactly_with_the_episode(states: Path, name: str) -> None:
    layout_, anchors = LAYOUTS[name], list(range(sum(LENGTHS)))
    _, segment = read(states, layout_, anchors)
    chunk, future, actions = [], [], []
    for start in layout_.chunk_starts:
        for anchor in anchors:
            end = STARTS[episode_of(anchor)] + LENGTHS[episode_of(anchor)]
            now = anchor + start
            chunk.append(now < end)
            future.append(layout_.consequence_offset is not None and now + layout_.consequence_offset < end)
            actions.append([now + step >= end for step in layout_.action_steps])
    assert segment.chunk_valid.tolist() == chunk
    assert segment.future_valid.tolist() == future
    assert segment.chunks["action_is_pad"].tolist() == actions
    if layout_.consequence_offset is not None:
        assert any(future)
        assert not all(future)


@pytest.mark.parametrize(
    "episodes", [*(pytest.param(some, marks=pytest.mark.full) for some in ([1], [3], [0, 2])), [3, 1]]
)
def test_a_subset_of_episodes_reads_its_own_frames(points: Path, episodes: list[int]) -> None:
    """LeRobot once computed padding and frames of a subset from the wrong episode (huggingface/lerobot#2610)."""
    layout_, frames = layout(offset=6), frames_of(points)
    dataset = open_dataset(points, layout_, episodes=episodes)
    assert len(dataset) == sum(LENGTHS[episode] for episode in episodes)
    batch = default_collate([dataset[position] for position in range(len(dataset))])
    segment = split_segment(batch, layout_)
    anchors = batch["index"].tolist()
    assert sorted(anchors) == sorted(
        frame for episode in episodes for frame in range(STARTS[episode], STARTS[episode] + LENGTHS[episode])
    )
    for t, start in enumerate(layout_.chunk_starts):
        for b, anchor in enumerate(anchors):
            row, end = t * len(anchors) + b, STARTS[episode_of(anchor)] + LENGTHS[episode_of(anchor)]
            assert segment.chunk_valid[row] == (anchor + start < end)
            assert segment.future_valid[row] == (anchor + start + 6 < end)
            assert torch.equal(segment.chunks[STATE][row], frames[clamped(anchor + start, anchor)][STATE])
            future = frames[clamped(anchor + start + 6, anchor)]
            assert torch.equal(segment.futures[CAMERA][segment.future_index[t]][b], future[CAMERA])


@pytest.mark.parametrize("block", [7, 24, frame_columns.BLOCK])
def test_spans_of_a_subset_are_positions_in_it(points: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_columns, "BLOCK", block)
    assert episode_spans(open_dataset(points, layout())) == list(zip(range(4), STARTS, LENGTHS, strict=True))
    assert episode_spans(open_dataset(points, layout(), episodes=[1, 3])) == [(1, 0, 24), (3, 24, 18)]


def test_renamed_observations_keep_their_validity(points: Path) -> None:
    layout_, anchors = layout(offset=6), [0, 20, 28]
    batch, expected = read(points, layout_, anchors)
    renamed = {CAMERA: "observation.images.top", STATE: "observation.state"}
    policy = base_policy("act", points)
    policy.config.input_features = {renamed[key]: value for key, value in policy.config.input_features.items()}
    preprocessor, _ = make_pre_post_processors(policy.config, dataset_stats=stats_of(points))
    preprocessor.steps[0].rename_map = {CAMERA: "observation.images.top"}
    segment = split_segment(preprocess(batch, preprocessor, layout_), layout_)
    assert torch.equal(segment.future_valid, expected.future_valid)
    assert torch.equal(segment.chunks["observation.images.top"], expected.chunks[CAMERA])
    for found, future in zip(segment.futures["observation.images.top"], expected.futures[CAMERA], strict=True):
        assert torch.equal(found, future)
    assert CAMERA not in segment.chunks
    assert not [key for key in segment.chunks if key.startswith("observation.") and key.endswith("_is_pad")]


@pytest.mark.parametrize("name", EVERY_LAYOUT)
def test_rows_are_a_plain_batch_and_hold_every_frame_once(points: Path, name: str) -> None:
    layout_, anchors = LAYOUTS[name], [0, 20, 28, 40]
    batch, segment = read(points, layout_, anchors)
    rows = segment_rows(batch, layout_)
    assert segment_rows(rows, layout_) is rows, "rows are laid out once"
    blocks = layout_.segment_length + len(layout_.lone_futures)
    sizes = {key: len(value) for key, value in rows.items() if not isinstance(value, Tensor) or value.ndim}
    assert set(sizes.values()) == {blocks * len(anchors)}
    again = split_segment(rows, layout_)
    for key, value in segment.chunks.items():
        assert torch.equal(value, again.chunks[key]) if isinstance(value, Tensor) else value == again.chunks[key]
    assert torch.equal(again.future_valid, segment.future_valid)
    chunk_rows = layout_.segment_length * len(anchors)
    assert rows["action_is_pad"][chunk_rows:].all(), "a row that is no chunk has no action"
    if layout_.observation_steps is None and layout_.observation_offsets is not None:
        assert blocks == len(layout_.observation_offsets)


def test_preprocessing_rows_is_preprocessing_segments(points: Path) -> None:
    policy = ptr_policy("smolvla", points, segment_length=3, num_belief_tokens=0)
    layout_ = policy.config.layout
    raw = raw_batch(policy, points, [0, 40, 75])
    preprocessor, _ = make_pre_post_processors(policy.config.base_config, dataset_stats=stats_of(points))
    before, after = (
        split_segment(preprocessor(segment_rows(dict(raw), layout_)), layout_),
        split_segment(preprocessor(dict(raw)), layout_),
    )
    for key, value in before.chunks.items():
        if isinstance(value, Tensor) and key.startswith(("observation.", "action")):
            assert torch.equal(value, after.chunks[key]), key
    for key, values in before.futures.items():
        assert all(torch.equal(*pair) for pair in zip(values, after.futures[key], strict=True)), key


@pytest.mark.parametrize("timed", [True, False])
def test_camera_masks_follow_their_rows(points: Path, timed: bool) -> None:
    layout_ = layout(2)
    batch, _ = read(points, layout_, [0, 40])
    mask = torch.tensor([True, False])
    shape = (mask[:, None].expand(2, 3)[..., None], mask)[not timed]
    segment = split_segment({**batch, f"{CAMERA}_padding_mask": shape}, layout_)
    assert segment.chunks[f"{CAMERA}_padding_mask"].tolist() == [True, False] * 2
    assert [view.tolist() for view in segment.futures[f"{CAMERA}_padding_mask"]] == [[True, False]] * 2


def test_preprocessed_language_belongs_to_every_chunk(points: Path) -> None:
    policy = ptr_policy("smolvla", points, segment_length=3, num_belief_tokens=0)
    batch = train_batch(policy, points, [0, 40])
    segment = split_segment(batch, policy.config.layout)
    tokens = segment.chunks["observation.language.tokens"]
    assert torch.equal(tokens, batch["observation.language.tokens"][:6])
    assert torch.equal(tokens, tokens[:2].repeat(3, 1))
    assert not torch.equal(tokens[0], tokens[1]), "the two episodes have different instructions"
    assert not [key for key in segment.futures if "language" in key]


@pytest.mark.parametrize("belief", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_futures_cannot_reach_the_policy(points: Path, family: str, belief: int) -> None:
    policy = ptr_policy(
        family,
        points,
        alpha=0.0,
        segment_length=2,
        consequence_offset=6,
        num_belief_tokens=belief,
        detach_scorer_inputs=True,
        scorer_warmup_steps=0,
    )
    batch = train_batch(policy, points, [0, 12, 33, 60])
    assert policy.config.layout.observation_offsets == [0, 4, 6, 10]
    assert policy.config.layout.lone_futures == (6, 10)
    changed = dict(batch)
    for key in (CAMERA, STATE):
        changed[key] = batch[key].clone()
        changed[key][8:] = torch.randn_like(changed[key][8:])

    def step(inputs: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
        policy.zero_grad()
        torch.manual_seed(0)
        output = policy.compute(inputs)
        policy.objective.combine(output)["loss"].backward()
        return output, gradients(policy.base)

    (original, grads), (other, other_grads) = step(batch), step(changed)
    assert torch.equal(original.loss, other.loss)
    assert torch.equal(original.weight, torch.ones(8))
    assert grads.keys() == other_grads.keys()
    assert all(torch.equal(grads[name], other_grads[name]) for name in grads)
    assert not torch.equal(original.identification, other.identification), "the scorer does read the futures"


@pytest.mark.parametrize("name", ["offset is stride", "offset beyond stride", "overlapping chunks"])
def test_no_frame_is_decoded_twice(point_videos: Path, name: str) -> None:
    layout_, counter = LAYOUTS[name], DecodedFrames()
    dataset = open_dataset(point_videos, layout_)
    with counter.counting():
        dataset[3]
    ((_, times),) = counter.requests
    assert len(times) == len(set(times)) == len(layout_.observation_offsets)
    assert len(counter.codec_frames) == len(set(counter.codec_frames))


def test_frames_of_a_video_stay_8_bit_until_they_are_on_the_device(points: Path, point_videos: Path) -> None:
    frame = open_dataset(point_videos, layout())[0][CAMERA]
    assert frame.dtype == torch.uint8
    assert frame.max() > 1
    raw = {CAMERA: frame[None], "observation.count": torch.tensor([3], dtype=torch.uint8)}
    pipeline = PolicyProcessorPipeline(steps=[], to_transition=batch_to_transition, to_output=transition_to_batch)
    scaled = preprocess(raw, pipeline, layout())
    assert torch.allclose(scaled[CAMERA][0] * 255, frame.float())
    assert scaled["observation.count"].dtype == torch.uint8, "8-bit numbers that are no frames stay what they are"
    assert open_dataset(points, layout())[0][CAMERA].max() <= 1


class TestBatchesOfAnotherLayout:
    """A batch that was read differently is refused in one sentence."""

    def test_fewer_actions(self, points: Path) -> None:
        batch, _ = read(points, layout(2), [0, 1])
        with pytest.raises(
            ValueError, match=r"holds 8 actions per sample but the segment layout reads 12.*delta_timesta"
        ):
            split_segment(batch, layout(3))

    def test_other_observations(self, points: Path) -> None:
        batch, _ = read(points, layout(3, offset=None), [0, 1])
        with pytest.raises(ValueError, match=r"holds 3 frames per sample but the segment layout reads 4"):
            split_segment(batch, layout(3))

    def test_plain_frames(self, points: Path) -> None:
        plain = LeRobotDataset("tests/points", root=points)
        batch = default_collate([plain[0], plain[1]])
        two_actions = SegmentLayout(None, (0, 1), 1, 2, 2)
        with pytest.raises(ValueError, match=r"no 'action_is_pad'.*delta_timestamps"):
            split_segment(batch, two_actions)
        batch["action_is_pad"] = torch.zeros(2, 2, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"observation.state holds 4 frames per sample.*reads 2.*delta_timestamps"):
            split_segment(batch, two_actions)

    @pytest.mark.parametrize("key", ["action", "action_is_pad", "index", "episode_index", "task_index"])
    def test_missing_entry(self, points: Path, key: str) -> None:
        batch, _ = read(points, layout(), [0, 1])
        del batch[key]
        with pytest.raises(ValueError, match=f"no '{key}'"):
            split_segment(batch, layout())

    def test_futures_without_validity(self, points: Path) -> None:
        batch, _ = read(points, layout(), [0, 1])
        for key in (CAMERA, STATE):
            del batch[f"{key}_is_pad"]
        with pytest.raises(ValueError, match=r"observation.*_is_pad"):
            split_segment(batch, layout())


def test_futures_of_two_cameras(tmp_path: Path) -> None:
    cameras = ("observation.images.top", "observation.images.wrist")
    root = write_dataset(tmp_path / "two", lengths=(12, 9), cameras=cameras)
    batch, segment = read(root, layout(2), [0, 13])
    assert set(segment.futures) == {STATE, *cameras}
    for key in cameras:
        assert torch.equal(segment.futures[key][0], batch[key][:, 1])
        assert torch.equal(segment.futures[key][1], batch[key][:, 2])


def test_a_single_video_frame_without_a_time_axis_is_the_chunks_own() -> None:
    layout = SegmentLayout((0,), (0, 1), segment_length=1, chunk_stride=2, consequence_offset=None)
    image, state = torch.rand(2, 3, 4, 4), torch.rand(2, 1, 5)
    batch = {
        "observation.image": image,
        "observation.state": state,
        "action": torch.zeros(2, 2, 1),
        "action_is_pad": torch.zeros(2, 2, dtype=torch.bool),
        "index": torch.tensor([0, 7]),
        "episode_index": torch.tensor([0, 1]),
        "task_index": torch.tensor([0, 0]),
    }
    chunks = split_segment(batch, layout).chunks
    assert torch.equal(chunks["observation.image"].reshape_as(image), image)
    assert torch.equal(chunks["observation.state"].reshape(2, 5), state[:, 0])
