"""Two real gloo processes on the loopback interface against one process holding the union batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import make_samples
from distributed_step import STEPS, TERMS, run
from safetensors.torch import load_file
from torch import Tensor

# test_exact_distribution.py compares whole runs of one, two and four processes
pytestmark = pytest.mark.full
RANKS = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """What one process computed, and what each of two did."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("distributed_step.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), str(RANKS), str(rank)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    run(folder)
    try:
        for process in processes:
            _, errors = process.communicate()
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    return load_file(folder / "1-0.safetensors"), [load_file(folder / f"2-{rank}.safetensors") for rank in range(RANKS)]


@pytest.mark.parametrize("term", TERMS)
def test_gradients_and_losses_equal_those_of_the_union_batch(results, term):
    alone, ranks = results
    for step in range(STEPS):
        names = [name for name in alone if name.startswith(f"{term}.{step}.grad.")]
        assert names
        gradient = torch.cat([alone[name].flatten() for name in names])
        for rank in ranks:
            difference = torch.cat([rank[name].flatten() for name in names]) - gradient
            assert difference.norm() <= 1e-5 * gradient.norm()
        total = sum(rank[f"{term}.{step}.loss"] for rank in ranks)
        torch.testing.assert_close(total, alone[f"{term}.{step}.loss"], rtol=1e-5, atol=1e-6)
        assert gradient.norm() > (1e-4 if term == "tokenizer" else 1e-3)


@pytest.mark.parametrize("term", TERMS)
def test_queue_controller_and_step_are_the_same_on_every_rank_and_alone(results, term):
    alone, ranks = results
    names = [name for name in alone if name.startswith(f"{term}.state.")]
    assert f"{term}.state.queue.targets" in names
    for name in names:
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], alone[name], rtol=1e-5, atol=1e-5)
    assert alone[f"{term}.state.queue.pushed"] == 6 * STEPS - 1
    assert alone[f"{term}.state.controller.updates"] == 1


def test_gather_puts_rows_in_their_global_places_with_types_and_values(results):
    _, ranks = results
    expected = make_samples(8, seed=7, valid=torch.arange(8) % 3 > 0)
    for rank in ranks:
        for name, value in vars(expected).items():
            assert torch.equal(rank[f"gathered.{name}"], value)
            assert rank[f"gathered.{name}"].dtype == value.dtype
    # two chunks of four segments, two segments a rank
    assert [rank["own"].tolist() for rank in ranks] == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_a_local_denominator_would_be_wrong(results):
    alone, ranks = results
    torch.testing.assert_close(sum(rank["global"] for rank in ranks), alone["global"])
    assert (sum(rank["local"] for rank in ranks) - alone["global"]).abs() > 0.5


def test_evaluation_on_one_rank_does_not_wait_for_the_other(results):
    alone, ranks = results
    torch.testing.assert_close(ranks[0]["evaluated"], alone["evaluated"])
