"""What a launch really starts, what is refused, and FSDP2 beside DDP: real launchers, real processes on gloo."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import Tensor

from ptr_hf import PTRTrainingArguments
from ptr_hf.report.dynamics import DYNAMICS_FILE
from ptr_hf.training.launch import check_launch, is_launcher, launch_arguments, processes_asked_for

TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "recipes" / "accelerate"
LAUNCH = [str(Path(sys.executable).with_name("accelerate")), "launch"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
REFUSED = r"ValueError: 2 processes were asked for but this one would train alone"


def config(name: str) -> ClusterConfig:
    return ClusterConfig.from_yaml_file(str(CONFIGS / f"{name}.yaml"))


def start(folder: Path, launch: list[str], *options: str, points: str = "none") -> subprocess.Popen[str]:
    """`launched_rank.py` under a launcher; it runs on while the test starts the next one."""
    folder.mkdir()
    command = [*launch, str(TESTS / "launched_rank.py"), str(folder), points, *options]
    outer = {name: value for name, value in ENVIRONMENT.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    own = outer | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"} if folder.name == "cluster" else outer
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=own)


class TestConfigurations:
    """Each file is what Accelerate reads, asks for what its name says, and names itself in its command."""

    def test_that_there_are_no_others(self) -> None:
        assert sorted(path.stem for path in CONFIGS.iterdir()) == [
            "cpu",
            "eight_gpus",
            "fsdp2",
            "multi_node",
            "one_gpu",
        ]

    @pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
    def test_the_command_in_it(self, path: Path) -> None:
        commands = [line for line in path.read_text().splitlines() if line.startswith("# accelerate launch ")]
        assert len(commands) == 1
        assert f"--config_file recipes/accelerate/{path.name} " in commands[0]
        assert " recipes/train_ptr.py " in commands[0]

    def test_one_gpu(self) -> None:
        one = config("one_gpu")
        assert (one.distributed_type, one.num_processes, one.gpu_ids) == (DistributedType.NO, 1, "0")

    def test_eight_gpus(self) -> None:
        eight = config("eight_gpus")
        assert (eight.distributed_type, eight.num_processes, eight.num_machines) == (DistributedType.MULTI_GPU, 8, 1)

    def test_multi_node(self) -> None:
        nodes = config("multi_node")
        assert (nodes.distributed_type, nodes.num_processes, nodes.num_machines) == (DistributedType.MULTI_GPU, 16, 2)
        assert nodes.main_process_port
        command = (CONFIGS / "multi_node.yaml").read_text()
        assert "--machine_rank 0 --main_process_ip " in command

    def test_fsdp2(self) -> None:
        sharded = config("fsdp2")
        assert (sharded.distributed_type, sharded.num_processes) == (DistributedType.FSDP, 8)
        assert sharded.fsdp_config == {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "NO_WRAP",
            "fsdp_state_dict_type": "FULL_STATE_DICT",
            "fsdp_cpu_ram_efficient_loading": False,
        }

    def test_cpu(self) -> None:
        cpu = config("cpu")
        assert (cpu.num_processes, cpu.use_cpu) == (2, True)
        assert " --use_cpu true " in (CONFIGS / "cpu.yaml").read_text()


CPU = [*LAUNCH, "--config_file", str(CONFIGS / "cpu.yaml"), "--main_process_port", "0"]


def launched(folder: Path, points: str) -> list[dict[str, int]]:
    """What the two ranks have to say."""
    run = start(folder, CPU, "--use_cpu", points=points)
    output, _ = run.communicate()
    assert run.returncode == 0, output[-3000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.full
def test_that_the_cpu_configuration_starts_two_processes(tmp_path: Path) -> None:
    assert launched(tmp_path / "two", "none") == [{"processes": 2, "steps": 0}] * 2


@pytest.mark.full
def test_that_the_cpu_configuration_starts_two_processes_that_agree(points: Path, tmp_path: Path) -> None:
    assert launched(tmp_path / "two", str(points)) == [{"processes": 2, "steps": 2}] * 2
    states = [load_file(tmp_path / "two" / f"rank-{rank}.safetensors") for rank in range(2)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_that_batches_that_one_process_reads_for_all_are_refused(tmp_path: Path) -> None:
    args = PTRTrainingArguments(str(tmp_path), use_cpu=True, accelerator_config={"dispatch_batches": True})
    with pytest.raises(ValueError, match="every process reads its own segments"):
        check_launch(args)


@pytest.mark.full
def test_a_launch_that_starts_one_process_for_two(tmp_path: Path) -> None:
    """Refused by what the launcher was asked for; a cluster's MASTER_ADDR around one process that was meant is none of that."""
    two = start(tmp_path / "two", [*LAUNCH, "--cpu", "--num_processes", "2"])
    one = start(tmp_path / "cluster", [*LAUNCH, "--cpu", "--num_processes", "1"])
    outputs = [run.communicate()[0] for run in (two, one)]
    assert two.returncode == 1
    assert (
        f"{REFUSED}. On CPUs start with `accelerate launch --multi_gpu --num_processes 2 launched_rank.py" in outputs[0]
    )
    assert one.returncode == 0, outputs[1][-3000:]


@pytest.mark.full
@pytest.mark.parametrize(
    "options",
    [
        CPU[2:],
        ["--cpu", "--num_processes", "1"],
    ],
    ids=["two processes", "one process"],
)
def test_ranks_whose_launcher_is_killed(points: Path, tmp_path: Path, options: list[str]) -> None:
    """The output ends, so none of them is left; the first to notice says why, the other may find its connection gone."""
    run = start(tmp_path / "run", [*LAUNCH, *options], "--use_cpu", "--long", points=str(points))
    while not (tmp_path / "run" / "run" / DYNAMICS_FILE).is_file():
        assert run.poll() is None, run.communicate()[0][-3000:]
        time.sleep(0.1)
    run.kill()
    output, _ = run.communicate()
    assert f"The launcher of this run (process {run.pid}) was killed: rank " in output


@pytest.mark.parametrize(
    ("command", "is_one"),
    [
        ("/usr/bin/python3 /opt/bin/torchrun --nproc_per_node 2 train.py", True),
        ("python -u -m torch.distributed.run --nproc_per_node 2 train.py", True),
        ("/opt/bin/python3.12 /opt/bin/accelerate launch train.py", True),
        ("deepspeed train.py", True),
        ("bash -c torchrun train.py", False),
        ("python train.py torchrun", False),
        ("slurmstepd: [4711.0]", False),
        ("/sbin/init", False),
        ("", False),
    ],
)
def test_which_parent_is_a_launcher(command: str, is_one: bool) -> None:
    assert is_launcher(command.split()) is is_one


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        ("python accelerate launch --cpu --num_processes 2 train.py --num_processes 7", 2),
        ("python accelerate-launch --cpu --num-processes=3 train.py", 3),
        ("python -m accelerate.commands.launch --config_file two.yaml train.py", 2),
        ("accelerate launch --config_file two.yaml --num_processes 1 train.py", 1),
        ("accelerate launch --cpu train.py", 1),
        ("accelerate launch --cpu --num_machines 4 train.py", 4),
    ],
)
def test_what_a_launcher_was_asked_for(tmp_path: Path, written: str, asked: int) -> None:
    (tmp_path / "two.yaml").write_text('distributed_type: "NO"\nnum_processes: 2\nuse_cpu: true\n')
    arguments = launch_arguments(written.split())
    assert arguments is not None
    assert processes_asked_for(arguments, tmp_path) == asked


@pytest.mark.parametrize("command", ["python train.py", "accelerate config", "bash train.sh launch"])
def test_what_is_no_launcher(command: str) -> None:
    assert launch_arguments(command.split()) is None


@pytest.fixture(scope="module")
def filled(points: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder that `launch_ranks.py` has filled with the cases that are named."""

    @cache
    def fill(*cases: str) -> Path:
        folder = tmp_path_factory.mktemp("ranks")
        command = [sys.executable, str(TESTS / "launch_ranks.py"), str(points), str(folder), *cases]
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return folder

    return fill


@pytest.fixture
def ranks(filled: Callable[..., Path]) -> Path:
    """With the refusals, and SmolVLA under DDP and FSDP2."""
    return filled("refusals", "smolvla")


@pytest.fixture
def ranks_of(filled: Callable[..., Path], ranks: Path, case: str) -> Path:
    """With the policy of a case under DDP and FSDP2."""
    return ranks if case.startswith("smolvla") else filled("act", "frozen")


def refusals(folder: Path) -> list[str]:
    return [(folder / f"refused-{rank}.txt").read_text() for rank in range(2)]


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"answer-{rank}.json").read_text()) for rank in range(2)]


def difference(first: Path, second: Path) -> float:
    """Largest relative difference of a tensor of two files that hold the same names."""
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys()
    assert len(one) > 40

    def relative(a: Tensor, b: Tensor) -> float:
        if torch.equal(a, b):
            return 0.0
        return float((a.double() - b.double()).norm() / b.double().norm()) if b.any() else math.inf

    return max(relative(one[name], other[name]) for name in one)


@pytest.mark.full
class TestRefusals:
    def test_ranks_that_were_not_started_alike(self, ranks: Path) -> None:
        first, second = refusals(ranks / "unlike")
        assert first == second
        assert "The 2 processes were not started alike." in first
        assert "learning_rate: 0.0001 on rank 0, 0.0002 on rank 1" in first
        assert "policy.base.dim_model: 32 on rank 0, 64 on rank 1" in first
        assert "number of parameters: " in first
        assert "(and 1 more)" in first
        # these may differ, and do
        assert "run_name" not in first

    @pytest.mark.parametrize(
        ("case", "sentence"),
        [
            ("uneven", "even_batches=False lets processes hold different numbers of segments"),
            ("alone", "2 processes were asked for but this one would train alone"),
            ("unsynchronised", "2 processes were started but Accelerate would not average their gradients"),
            ("fsdp on cpu", "without GPUs Accelerate ignores it"),
            ("nested fsdp", "fsdp_auto_wrap_policy must be NO_WRAP"),
        ],
    )
    def test_on_every_rank(self, ranks: Path, case: str, sentence: str) -> None:
        for message in refusals(ranks / case):
            assert sentence in message


@pytest.mark.full
class TestFSDP2:
    """On CPU, with Accelerate's limit to GPUs lifted: its code, PyTorch's FSDP2 and gloo are the real ones."""

    # two micro-batches are summed before FSDP reduces them and after DDP does
    @pytest.mark.parametrize(("case", "allowed"), [("act", 1e-6), ("smolvla", 0.0), ("frozen", 0.0)])
    def test_the_gradients_are_those_of_ddp(self, ranks_of: Path, case: str, allowed: float) -> None:
        sharded, copied = answers(ranks_of / f"{case}-fsdp"), answers(ranks_of / f"{case}-ddp")
        assert [(row["kind"], row["processes"]) for row in sharded] == [("FSDP", 2)] * 2
        assert [(row["kind"], row["processes"]) for row in copied] == [("MULTI_CPU", 2)] * 2
        assert sharded[0]["sharded"] > 100 > copied[0]["sharded"] == 0
        assert sharded[0]["losses"] == pytest.approx(copied[0]["losses"], rel=1e-5)
        for rank in range(2):
            name = f"gradients-{rank}.safetensors"
            assert difference(ranks_of / f"{case}-fsdp" / name, ranks_of / f"{case}-ddp" / name) <= allowed

    @pytest.mark.parametrize("case", ["act-fsdp", "smolvla-fsdp", "frozen-fsdp", "act-ddp"])
    def test_that_the_ranks_hold_the_same(self, ranks_of: Path, case: str) -> None:
        """Weights, moving average, queue, controller: though they started from different ones."""
        folder = ranks_of / case
        assert difference(folder / "state-0.safetensors", folder / "state-1.safetensors") == 0.0

    @pytest.mark.parametrize("case", ["act-fsdp", "smolvla-fsdp"])
    def test_resuming(self, ranks_of: Path, case: str) -> None:
        whole, resumed = ranks_of / case, ranks_of / f"{case}-resumed"
        assert difference(resumed / "state-0.safetensors", whole / "state-0.safetensors") == 0.0

    @pytest.mark.parametrize("case", ["act-fsdp", "smolvla-fsdp"])
    def test_that_a_checkpoint_is_a_policy(self, ranks_of: Path, case: str) -> None:
        folder = ranks_of / case
        assert difference(folder / "loaded.safetensors", folder / "state-0.safetensors") == 0.0
