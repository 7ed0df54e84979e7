"""The comparison with public tools counts what it claims to; no tool is run here."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import rivals
from ptr_hf.data.demonstrations import CLEAN, Truth, TruthRecord

KINDS = ("noise", CLEAN, "delay", CLEAN, "delay")
TRUTH = Truth(tuple(TruthRecord(episode, kind, "reach", "reach") for episode, kind in enumerate(KINDS)))


def test_each_kind_is_told_from_the_good_episodes_alone() -> None:
    # noise 3 is above both good ones (0 and 2); the delays 1 and 2 win 1 and 1.5 of their two pairs
    found = rivals.auc_by_kind(TRUTH, np.array([3.0, 0.0, 1.0, 2.0, 2.0]))
    assert found == pytest.approx({"all": 4.5 / 6, "noise": 1.0, "delay": 2.5 / 4})


def test_an_episode_without_a_score_gets_the_median_or_what_silence_means() -> None:
    scores = {0: 3.0, 1: 1.0, 2: float("nan"), 3: 2.0}
    assert rivals.filled(scores, 5, None).tolist() == [3.0, 1.0, 2.0, 2.0, 2.0]
    assert rivals.filled({0: 3.0}, 3, 0.0).tolist() == [3.0, 0.0, 0.0]


def test_findings_are_added_up_by_the_episodes_they_name(tmp_path: Path) -> None:
    finding = '{"severity": "%s", "confidence": %s, "locus": {"episodes": ["episode_000001"%s]}}'
    first, second = finding % ("HIGH", 0.5, ', "episode_000004"'), finding % ("LOW", 1.0, "")
    (tmp_path / "found").write_text(f'{{"clusters": [{{"findings": [{first}]}}, {{"findings": [{second}]}}]}}')
    assert rivals.read_findings(tmp_path / "found") == {"findings": {1: 4.0, 4: 2.0}}


def test_seconds_become_multiples_of_ours() -> None:
    rows: list[dict[str, object]] = [{"wall_seconds": 6.0, "processor_seconds": 1.0}]
    rivals.relative(rows, [{"wall_seconds": 2.0, "processor_seconds": 4.0}])
    assert rows == [{"wall_ratio": 3.0, "processor_ratio": 0.25}]
