"""The page about scale: its formulas are what the code does, simulated ranks agree with one process, and it is up to date."""

import json
import threading
from pathlib import Path

import pytest
import torch

from benchmarks.scaling import benchmark, costs
from benchmarks.scaling.ranks import (
    Call,
    Setup,
    SimulatedRanks,
    candidate_equality,
    counted,
    gradient_difference,
    predicted,
    ring_bytes,
)

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "scaling.md"


def run(*arguments: str | Path) -> None:
    benchmark.main(["--check", "--output", str(ROOT / "results" / "scaling.json"), *map(str, arguments)])


@pytest.mark.parametrize(
    "setup",
    [
        Setup(2, 3, 2, micro_batches=2, target=9, state=0, action=7),
        Setup(5, 1, 3, detach=True),
        Setup(3, 2, 1, across=False),
        Setup(4, 2, 2, micro_batches=2, scorer=False),
        Setup(3, 2, 2, scorer=False, across=False),
    ],
    ids=str,
)
def test_the_formulas_are_the_collectives_of_the_code(setup: Setup) -> None:
    assert counted(setup) == predicted(setup)


@pytest.mark.parametrize("scorer", [True, False])
def test_eight_simulated_ranks_have_the_gradient_of_one_process(scorer: bool) -> None:
    assert 0 < gradient_difference(Setup(8, 2, 2, micro_batches=2, scorer=scorer)) < 1e-5


def test_without_the_other_ranks_rows_the_gradient_is_another() -> None:
    assert gradient_difference(Setup(4, 2, 2, across=False)) > 1e-2


def test_sixteen_simulated_ranks_have_the_candidates_of_one_process() -> None:
    found = candidate_equality(Setup(16, 2, 2, target=8), capacity=32, draws=8)
    assert found["bit_equal"] == {"index": True, "mask": True, "pool": True}
    assert found["largest_logit_difference"] < 1e-5


def test_a_rank_that_fails_does_not_leave_the_others_waiting() -> None:
    ranks = SimulatedRanks(3)

    def work() -> None:
        if ranks.get_rank() == 1:
            raise ArithmeticError
        ranks.all_reduce(torch.ones(2))

    with pytest.raises((ArithmeticError, threading.BrokenBarrierError)):
        ranks.run(work)


@pytest.mark.parametrize(("kind", "sent"), [("all-gather", 300.0), ("all-reduce", 150.0), ("reduce-scatter", 75.0)])
def test_what_a_rank_of_four_sends_in_a_ring(kind: str, sent: float) -> None:
    assert ring_bytes(Call(kind, 100), 4) == sent


def test_bytes_of_candidates_and_slots_are_as_the_formulas_say() -> None:
    few, many = costs.measure_candidates((1, 4), 2, rounds=1)
    assert few["time_to_one_rank"] == 1.0
    assert many["peak_bytes"] > many["pool"] > few["pool"]
    small, large = costs.measure_slots((300, 900), visited=64)
    assert (small["bytes"], large["bytes"]) == (300 * 44, 900 * 44)
    # only the visited slots are touched
    assert large["remember_peak_bytes"] == small["remember_peak_bytes"] > 0


@pytest.mark.full
def test_a_larger_dataset_costs_what_the_page_extrapolates(tmp_path: Path) -> None:
    found = costs.measure_dataset(tmp_path, (4, 40), 50)
    assert found["frames"] == 40 * 50
    assert found["per_episode"]["EpisodeTable"] == 25
    assert found["per_frame"]["order of an epoch"] == 4
    assert found["per_frame"]["check_dataset"] < 1


def test_the_committed_page_and_figures_agree() -> None:
    run("--page", PAGE)
    found = json.loads((ROOT / "results" / "scaling.json").read_text())
    assert [row["ranks"] for row in found["equality"]] == list(benchmark.RANKS)
    assert all(all(row["bit_equal"].values()) for row in found["equality"])
    assert all(row["counted"] == row["formula"] for row in found["traffic"])
    assert (ROOT / "docs" / "images" / "scaling.png").stat().st_size > 20_000


def test_an_outdated_page_fails_the_check(tmp_path: Path) -> None:
    page = tmp_path / "scaling.md"
    page.write_text(PAGE.read_text().replace("bit-equal", "nearly equal"))
    with pytest.raises(SystemExit, match="not up to date"):
        run("--page", page)
    assert "nearly equal" in page.read_text()
