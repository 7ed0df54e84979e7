"""Recorded values that are not finite are found, made finite, and get no say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_frames import EPISODES, spoiled
from lerobot.policies.factory import make_pre_post_processors
from small_policies import FAMILIES, base_policy, stats_of
from torch.utils.data import default_collate

from ptr_hf.data.datasets import open_dataset
from ptr_hf.data.in_memory import InMemorySegments
from ptr_hf.data.screening import FINE, Screen, leave_out
from ptr_hf.data.segments import FUTURE_PAD, PAD_SUFFIX, SegmentLayout, segment_rows, split_segment
from ptr_hf.processor_ptr import preprocess

CHUNK = (0, 1, 2, 3)
LAYOUTS = {
    "futures": SegmentLayout(None, CHUNK, 2, 4, 4),
    "lone-futures": SegmentLayout((-1, 0), CHUNK, 2, 4, 7),
    "no-future": SegmentLayout(None, CHUNK, 2, 4, None),
    "plain": SegmentLayout(None, CHUNK, 1, 4, None),
    "plain-with-time": SegmentLayout((0,), CHUNK, 1, 4, None),
}
READ = ("observation.state", "observation.image")
# a frame in the middle of an episode, and the last frame of one, which is repeated past its end
BAD = {
    ("observation.state", 40): np.nan,
    ("action", 71): np.inf,
    ("action", 93): -np.inf,
    ("observation.state", 29): np.nan,
}


@pytest.fixture(scope="module")
def bad(points: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spoiled(points, tmp_path_factory.mktemp("datasets") / "bad", BAD)


def everything(root: Path, layout: SegmentLayout) -> dict[str, Any]:
    """Every segment of a dataset in one batch."""
    return InMemorySegments(open_dataset(root, layout), layout).__getitems__(range(EPISODES[-1][1]))


def floats(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in batch.items() if isinstance(value, torch.Tensor) and value.is_floating_point()}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
class TestBefore:
    @pytest.mark.full
    def test_samples_with_bad_values_are_found_and_named(self, bad: Path, layout: SegmentLayout) -> None:
        batch = everything(bad, layout)
        _, frames = Screen(layout, READ).before(batch)
        for anchor, frame in enumerate(frames.tolist()):
            finite = all(batch[key][anchor].isfinite().all() for key in (*READ, "action"))
            assert (frame == FINE) == finite, anchor
            if not finite:
                assert frame in {place for _, place in BAD} | {anchor}
        assert (frames != FINE).sum() >= len(BAD), "each bad frame is somebody's first"
        named = set(frames.tolist()) - {FINE}
        assert {place for _, place in BAD} <= named

    @pytest.mark.full
    def test_they_become_padding_and_nothing_else_changes(self, bad: Path, layout: SegmentLayout) -> None:
        batch = everything(bad, layout)
        screened, frames = Screen(layout, READ).before(batch)
        assert screened.keys() == batch.keys()
        for key, value in screened.items():
            if key.endswith(PAD_SUFFIX):
                assert value[frames != FINE].all()
                assert torch.equal(value[frames == FINE], batch[key][frames == FINE])
            elif key in floats(batch):
                assert value.isfinite().all(), key
                kept = batch[key].isfinite()
                assert torch.equal(value[kept], batch[key][kept])
            else:
                assert value is batch[key]

    @pytest.mark.full
    def test_their_chunks_count_nowhere(self, bad: Path, layout: SegmentLayout) -> None:
        screened, frames = Screen(layout, READ).before(everything(bad, layout))
        segment = split_segment(segment_rows(screened, layout), layout)
        left_out = (frames != FINE).repeat(layout.segment_length)
        assert not segment.chunk_valid[left_out].any()
        assert not segment.future_valid[left_out].any()
        clean = split_segment(segment_rows(everything(bad, layout), layout), layout)
        assert torch.equal(segment.chunk_valid[~left_out], clean.chunk_valid[~left_out])
        assert torch.equal(segment.future_valid[~left_out], clean.future_valid[~left_out])


def test_a_frame_that_is_only_repeated_is_named_by_the_sample(bad: Path) -> None:
    """Sparse futures past the end show the bad last frame without holding it at its own place."""
    layout = LAYOUTS["futures"]
    _, frames = Screen(layout, READ).before(everything(bad, layout))
    assert frames[29] == 29
    assert frames[25] == 29, "its second chunk begins at 29"
    assert frames[26] == 26, "it sees frame 29 at 30 and 34, past the end"


def test_float_images_are_looked_at(points: Path) -> None:
    layout = LAYOUTS["futures"]
    dataset = open_dataset(points, layout)
    batch = default_collate([dataset[anchor] for anchor in (3, 31, 60)])
    assert batch["observation.image"].is_floating_point(), "image files give floats"
    batch["observation.image"][1, 2, 0, 5, 5] = torch.nan
    screened, frames = Screen(layout, READ).before(batch)
    assert frames.tolist() == [FINE, 31 + 8, FINE], "the third observation, eight frames on"
    assert screened["observation.image"].isfinite().all()


def test_what_the_policy_does_not_read_is_not_looked_at(points: Path) -> None:
    layout = LAYOUTS["futures"]
    batch = everything(points, layout)
    nothing = torch.full((len(batch["index"]), 3, 2), torch.nan)
    batch |= {"observation.effort": nothing, "next.reward": nothing[:, 0]}
    assert (Screen(layout, READ).before(batch)[1] == FINE).all()
    renamed = Screen(layout, READ, renames={"observation.effort": "observation.state"})
    assert (renamed.before(batch)[1] != FINE).all(), "under the policy's own name it is read"


def test_an_observation_without_actions_and_laid_out_rows_pass(points: Path) -> None:
    layout = LAYOUTS["futures"]
    screen = Screen(layout, READ)
    robot = {"observation.state": torch.full((1, 4), torch.nan)}
    rows = segment_rows(everything(points, layout), layout)
    for batch in (robot, rows):
        same, frames = screen.before(batch)
        assert same is batch
        assert screen.after(batch, frames)[0] is batch


def test_leave_out_takes_a_mask_of_its_own(points: Path) -> None:
    layout = LAYOUTS["futures"]
    batch = everything(points, layout)
    mask = torch.arange(112) % 5 == 0
    kept = leave_out(batch, mask)
    assert not split_segment(segment_rows(kept, layout), layout).chunk_valid[mask.repeat(2)].any()
    assert all(kept[key] is batch[key] for key in batch if not key.endswith(PAD_SUFFIX))


@pytest.mark.parametrize("family", FAMILIES)
class TestAfterThePreprocessor:
    def rows(
        self, root: Path, stats: Path, family: str, layout: SegmentLayout, substitute: bool = False
    ) -> tuple[dict[str, Any], torch.Tensor, dict[str, Any]]:
        policy = base_policy(family, stats)
        screen = Screen(layout, policy.config.input_features, substitute=substitute)
        preprocessor, _ = make_pre_post_processors(policy.config, dataset_stats=stats_of(stats))
        batch, frames = screen.before(everything(root, layout))
        before = preprocess(batch, preprocessor, layout)
        return *screen.after(before, frames), before

    def test_left_out_rows_are_neutral(self, bad: Path, points: Path, family: str) -> None:
        layout = LAYOUTS["futures"]
        rows, frames, before = self.rows(bad, points, family, layout)
        left_out = (frames != FINE).repeat(3)
        assert left_out.any()
        for key, value in floats(rows).items():
            assert value.isfinite().all(), key
            assert torch.equal(value[~left_out], before[key][~left_out])
        for key in ("observation.state", "action"):
            assert not rows[key][left_out].any()

    def test_what_overflows_in_the_preprocessor_is_found_too(self, points: Path, family: str, tmp_path: Path) -> None:
        layout = LAYOUTS["futures"]
        huge = spoiled(points, tmp_path / "huge", {("observation.state", 40): 3e38})
        rows, frames, before = self.rows(huge, points, family, layout)
        assert not before["observation.state"].isfinite().all(), "finite as recorded"
        assert (frames != FINE).nonzero().flatten().tolist() == [32, 36, 40]
        assert rows["observation.state"].isfinite().all()
        left_out = (frames != FINE).repeat(3)
        assert rows["action_is_pad"][left_out].all()
        assert rows[FUTURE_PAD][left_out].all()

    @pytest.mark.full
    def test_a_copy_of_a_good_sample_takes_the_place(self, bad: Path, points: Path, family: str) -> None:
        layout = LAYOUTS["no-future"]
        rows, frames, _ = self.rows(bad, points, family, layout, substitute=True)
        plain, _, _ = self.rows(bad, points, family, layout)
        donor = int((frames == FINE).nonzero()[0])
        size = len(frames)
        for segment in (frames != FINE).nonzero().flatten().tolist():
            for row in (segment, size + segment):
                for key, value in floats(rows).items():
                    assert torch.equal(value[row], plain[key][row - segment + donor]), key
                assert rows["action_is_pad"][row].all()
                assert rows["index"][row] == plain["index"][row], "it is still named by its own place"
        good = (frames == FINE).repeat(2)
        assert all(torch.equal(value[good], plain[key][good]) for key, value in floats(rows).items())
