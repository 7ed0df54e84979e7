"""Detection and shares against cases worked out by hand."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ptr_hf.report.chunk_scores import ChunkScores, read_scores, write_scores
from ptr_hf.report.dynamics import Dynamics
from ptr_hf.report.evaluation import detection, effective_sample_share, episode_weights, summary_table, weight_shares

# (episode, task, weight, target_valid): episode means are 3, 2, 1 (clean) and 2, 0.5 (corrupted).
ROWS = [
    (0, "pick", 2.0, True),
    (0, "pick", 4.0, True),
    (0, "pick", 1.0, False),
    (1, "pick", 2.0, True),
    (2, "place", 1.0, True),
    (3, "place", 1.0, True),
    (3, "place", 3.0, True),
    (4, "place", 0.5, True),
    (4, "place", 1.0, False),
    (5, "place", 1.0, False),
]
TRUTH = {0: "clean", 1: "clean", 2: "clean", 3: "noise", 4: "cut", 5: "cut"}


@pytest.fixture
def small() -> ChunkScores:
    episode, task, weight, valid = (np.array(column) for column in zip(*ROWS, strict=True))
    return ChunkScores(
        index=np.arange(10),
        episode_index=episode,
        frame_index=np.zeros(10, dtype=np.int64),
        task=task.astype(object),
        source=np.full(10, "lab", dtype=object),
        target_valid=valid,
        score=np.log(weight),
        weight=weight,
        loss=np.ones(10),
    )


def test_episode_weights_are_means_over_chunks_with_a_future(small: ChunkScores) -> None:
    means = episode_weights(small)
    assert {index: value for (_, index), value in means.items() if index < 5} == {
        0: 3.0,
        1: 2.0,
        2: 1.0,
        3: 2.0,
        4: 0.5,
    }
    assert math.isnan(means["lab", 5])


def test_episode_auc_by_hand(small: ChunkScores) -> None:
    # Pairs corrupted < clean: 2 against 3, 2, 1 gives 1 + 1/2 + 0; 0.5 against all gives 3.
    assert detection(small, TRUTH).auc == pytest.approx(4.5 / 6.0)
    assert detection(small, TRUTH, kind="noise").auc == pytest.approx(1.5 / 3.0)
    assert detection(small, TRUTH, kind="cut").auc == 1.0
    assert detection(small, TRUTH)[1:3] == (2, 3)


def test_an_episode_with_two_corruptions_counts_for_both(small: ChunkScores) -> None:
    truth = TRUTH | {3: "noise+cut"}
    assert detection(small, truth, kind="noise").auc == pytest.approx(1.5 / 3.0)
    assert detection(small, truth, kind="cut").auc == detection(small, truth).auc == pytest.approx(4.5 / 6.0)


def test_chunk_auc_by_hand(small: ChunkScores) -> None:
    # Clean chunks 2, 4, 2, 1; corrupted 1 (3.5 wins), 3 (1 win), 0.5 (4 wins).
    assert detection(small, TRUTH, level="chunk").auc == pytest.approx(8.5 / 12.0)
    assert detection(small, TRUTH, "chunk")[1:3] == (3, 4)


def test_weights_that_are_all_alike_detect_nothing_and_inverted_ones_less(small: ChunkScores) -> None:
    assert detection(replace(small, weight=np.ones(10)), TRUTH).auc == 0.5
    assert detection(replace(small, weight=1.0 / small.weight), TRUTH, kind="cut").auc == 0.0


def test_a_missing_class_gives_nan_and_says_which(small: ChunkScores) -> None:
    for found, absent in (
        (detection(small, dict.fromkeys(range(6), "clean")), "no corrupted episode"),
        (detection(small, dict.fromkeys(range(6), "noise"), "chunk"), "no clean chunk"),
        (detection(small, TRUTH, kind="wrong_instruction"), "no wrong_instruction episode"),
    ):
        assert math.isnan(found.auc)
        assert absent in found.reason


def test_unclear_truths_are_refused(small: ChunkScores) -> None:
    with pytest.raises(ValueError, match=r"1 of the scored episodes \(the first is 5\)"):
        detection(small, dict.fromkeys(range(5), "clean"))
    two_sources = replace(small, source=np.array(["a"] * 5 + ["b"] * 5, dtype=object), episode_index=np.arange(10) % 5)
    with pytest.raises(ValueError, match="ambiguous"):
        detection(two_sources, TRUTH)


def test_non_finite_weights_judge_nothing(small: ChunkScores) -> None:
    weight = small.weight.copy()
    weight[1] = np.nan
    assert episode_weights(replace(small, weight=weight))["lab", 0] == 2.0


def test_shares_by_hand(small: ChunkScores) -> None:
    pick, place = weight_shares(small)
    assert (pick.name, pick.episodes, pick.chunks, pick.mean_weight) == ("pick", 2, 4, pytest.approx(8.0 / 3.0))
    assert (place.episodes, place.chunks, place.mean_weight) == (4, 6, pytest.approx(5.5 / 4.0))
    assert (pick.chunk_share, pick.weight_share) == (0.4, pytest.approx(9.0 / 16.5))
    assert place.weight_share == pytest.approx(7.5 / 16.5)
    (source,) = weight_shares(small, by="source")
    assert (source.name, source.episodes, source.weight_share) == ("lab", 6, pytest.approx(1.0))


def test_shares_stay_within_the_bound_of_eq_30(scores: ChunkScores) -> None:
    shares = weight_shares(scores)
    assert sum(share.weight_share for share in shares) == pytest.approx(1.0)
    assert all(1.0 / 16.0 <= share.weight_share / share.chunk_share <= 16.0 for share in shares)


def test_effective_sample_share_by_hand(small: ChunkScores) -> None:
    # Weights 2, 4, 2, 1, 1, 3, 0.5: 13.5² / (7 · 35.25).
    assert effective_sample_share(small) == pytest.approx(13.5**2 / (7 * 35.25))
    assert effective_sample_share(replace(small, weight=np.full(10, 3.0))) == pytest.approx(1.0)
    assert math.isnan(effective_sample_share(replace(small, target_valid=np.zeros(10, dtype=bool))))


def test_scores_round_trip(tmp_path: Path, scores: ChunkScores) -> None:
    read = read_scores(write_scores(scores, tmp_path / "ptr_scores.parquet"))
    assert read.to_table() == scores.to_table()
    assert read.task.tolist() == scores.task.tolist()
    assert len(read) == 600


def test_score_tables_are_checked(scores: ChunkScores) -> None:
    table = scores.to_table()
    numbered = table.set_column(3, "task", pa.array(np.zeros(600, dtype=np.int64)))
    assert set(ChunkScores.from_table(numbered).task) == {"0"}
    with pytest.raises(ValueError, match="missing are"):
        ChunkScores.from_table(table.drop_columns("weight"))
    holes = table.set_column(1, "episode_index", pa.array([None, *range(599)], type=pa.int64()))
    with pytest.raises(ValueError, match=r"'episode_index'.*1 empty"):
        ChunkScores.from_table(holes)


def test_summary_sets_sft_first_and_results_on_top(dynamics: Dynamics) -> None:
    table = summary_table(dynamics, {"ptr": {"success rate": 0.91}, "sft": {"success rate": 0.854, "trials": 500}})
    assert table.runs == ("sft", "ptr")
    assert table.rows[0] == ("success rate", "", (0.854, 0.91))
    assert table.rows[1].values[0] == 500.0
    assert math.isnan(table.rows[1].values[1])
    assert table.rows[2] == ("training steps", "", (6000.0, 6000.0))
    by_label = {row.label: row.values for row in table.rows}
    assert by_label["identification accuracy"][1] == pytest.approx(np.mean(dynamics.column("accuracy", "ptr")[-30:]))
    assert math.isnan(by_label["identification accuracy"][0])
    with pytest.raises(ValueError, match="'act'"):
        summary_table(dynamics, {"act": {}})
