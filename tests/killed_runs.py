"""Training runs in processes of their own, which a test may kill, starve of disk space and start again.

Importing everything takes longer than a run, so one process does it once and forks the others. As a script this file is that
process: it reads orders from stdin, one JSON object a line, and answers each with a line. `Runs` is the other end.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ptr_hf.training.checkpoint_files import PARTIAL, checkpoints

PATIENCE = 600
"""Seconds after which a process that should have done something is taken for stuck."""
SETTINGS: dict[str, Any] = {
    "preset": "ptr",
    "max_steps": 60,
    "per_device_train_batch_size": 4,
    "segment_length": 2,
    "queue_size": 64,
    "queue_negatives": 8,
    "num_belief_tokens": 2,
    "scorer_warmup_steps": 2,
    "controller_interval": 2,
    "logging_steps": 4,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 0,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "in_memory": True,
}
BEST: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 3,
    "per_device_eval_batch_size": 112,
    "metric_for_best_model": "grade",
    "greater_is_better": True,
    "load_best_model_at_end": True,
}
"""Settings for a run with the evaluations of `Grades`."""


class Run:
    """The processes of one run, one a rank, and what they have printed so far."""

    def __init__(
        self, runs: "Runs", pids: Sequence[int], reader: threading.Thread, text: list[str], step: Path
    ) -> None:
        self._runs, self.pids, self._reader, self._text, self._step = runs, list(pids), reader, text, step

    @property
    def step(self) -> int:
        """The last optimiser step that the main process has taken, 0 before the first."""
        return int(self._step.read_text() or 0) if self._step.is_file() else 0

    def until(self, reached: Callable[["Run"], bool]) -> None:
        """Wait for something that the run does."""
        stuck = time.monotonic() + PATIENCE
        while not reached(self):
            if time.monotonic() > stuck:
                raise TimeoutError(f"The run came to step {self.step} and no further: {''.join(self._text)}")
            time.sleep(0.001)

    @contextmanager
    def stopped(self, rank: int) -> Iterator[None]:
        """Let a rank stand still for the block, in which the others may wait for it."""
        os.kill(self.pids[rank], signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pids[rank], signal.SIGCONT)

    def kill(self, ranks: Sequence[int]) -> None:
        """SIGKILL, in this order."""
        for rank in ranks:
            os.kill(self.pids[rank], signal.SIGKILL)

    @property
    def text(self) -> str:
        """What was printed so far."""
        return "".join(self._text)

    def ended(self) -> str:
        """Wait until no rank is left that could print, and return all that was printed: for ranks without their launcher."""
        self._reader.join(PATIENCE)
        if self._reader.is_alive():
            raise TimeoutError(f"A rank is left at step {self.step}.")
        return "".join(self._text)

    def wait(self) -> tuple[list[int], str]:
        """Exit codes (minus the signal that ended a process) and all that was printed."""
        codes = self._runs.ask({"do": "wait", "pids": self.pids})
        self._reader.join(PATIENCE)
        return codes, "".join(self._text)


class Runs:
    """Starts runs of `PTRTrainer` on a dataset, in processes forked from one that has imported everything."""

    def __init__(self, points: Path, folder: Path) -> None:
        self._points, self._folder = points, folder
        self._started = 0
        path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true"}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, order: dict[str, Any]) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, folder: Path, ranks: int = 1, resume: str | None = None, **options: Any) -> Run:
        """Start a run.

        Args:
            folder: its output_dir.
            ranks: number of processes.
            resume: `resume_from_checkpoint`.
            options: `settings`, changes of SETTINGS; `launcher`, True for ranks that are started as torchrun does, by a process
                that stands first in `pids`; the others are those of `train`.
        """
        self._started += 1
        name = self._folder / f"run-{self._started}"
        fifo, step = name.with_suffix(".fifo"), name.with_suffix(".step")
        os.mkfifo(fifo)
        text: list[str] = []
        # a pipe, because what is printed must not count as a file of the run
        reader = threading.Thread(target=_read, args=(fifo, text), daemon=True)
        reader.start()
        order = {"folder": str(folder), "resume": resume, "fifo": str(fifo), "step": str(step), **options}
        pids = self.ask({"do": "start", "ranks": ranks, "points": str(self._points), **order})
        return Run(self, pids, reader, text, step)

    def finish(self, folder: Path, ranks: int = 1, resume: str | None = None, **options: Any) -> str:
        """Run to the end; what was printed."""
        codes, text = self.start(folder, ranks, resume, **options).wait()
        assert codes == [0] * ranks, text
        return text

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(PATIENCE)


def kill_again_and_again(
    runs: Runs, folder: Path, ranks: int, kills: int, seed: int, steps: int = SETTINGS["max_steps"]
) -> list[dict[str, Any]]:
    """Start a run and kill it, as often as asked, each time somewhat later; then let it end.

    Half of the kills wait for a checkpoint that is being written, the others for a step or the start; all then wait a
    little longer, by chance.

    Returns:
        of every kill its kind, the step, whether a partial checkpoint was left, and which ranks were killed first.
    """
    random_ = random.Random(seed)
    happened = []
    moments = sorted(random_.sample(range(1, steps - 10), kills))
    settings = {"max_steps": steps}
    for number, step in enumerate(moments):
        kind = ("saving", "stepping", "saving", "starting" if number % 8 == 3 else "stepping")[number % 4]
        run = runs.start(folder, ranks, "last" if checkpoints(folder) else None, settings=settings)
        if kind == "saving":
            run.until(lambda _, due=step: any(number >= due for number in _partial_steps(folder)))
            time.sleep(random_.uniform(0, 0.03))
        elif kind == "stepping":
            run.until(lambda run, due=step: run.step >= due)
            time.sleep(random_.uniform(0, 0.1))
        else:
            time.sleep(random_.uniform(0, 1))
        # the others notice that one is gone, or are killed as well
        first = random_.sample(range(ranks), random_.randint(1, ranks))
        run.kill(first)
        codes, text = run.wait()
        assert all(codes[rank] == -signal.SIGKILL for rank in first), f"the run ended before it was killed: {text}"
        assert all(codes), f"a process went on without the one that was killed: {codes}"
        happened.append({"kind": kind, "step": run.step, "killed": first, "partial": sorted(_partial_steps(folder))})
    print(f"seed {seed}, {ranks} process(es), killed: {json.dumps(happened)}")
    runs.finish(folder, ranks, "last" if checkpoints(folder) else None, settings=settings)
    return happened


def _read(fifo: Path, text: list[str]) -> None:
    with fifo.open() as lines:
        text.extend(lines)


def _partial_steps(folder: Path) -> list[int]:
    return [int(path.name.split("-")[1].removesuffix(PARTIAL)) for path in folder.glob(f".checkpoint-*{PARTIAL}")]


# ---- the process that forks ------------------------------------------------------------------------------------------


def serve() -> None:
    """Answer orders until stdin ends; nothing of torch.distributed or Accelerate exists before the fork."""
    import small_policies
    import torch

    import ptr_hf  # noqa: F401  imported once for all

    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        if order.pop("do") == "wait":
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in order["pids"]]
            print(json.dumps(codes), flush=True)
            continue
        points = Path(order.pop("points"))
        # built before the fork, so that every process has the same folder for its tokenizer
        policy = small_policies.base_policy("smolvla", points)
        print(json.dumps(_start(partial(train, policy, points), **order)), flush=True)


def _start(train: Callable[..., None], *, ranks: int, fifo: str, launcher: bool = False, **options: Any) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def rank_of_run(rank: int) -> None:
        _become(rank, ranks, port, fifo)
        train(**options)

    def start_all() -> list[int]:
        return [_forked(partial(rank_of_run, rank)) for rank in range(ranks)]

    if not launcher:
        return start_all()
    reading, writing = os.pipe()

    def launch() -> None:
        os.environ["TORCHELASTIC_RUN_ID"] = "none"
        pids = start_all()
        os.write(writing, json.dumps([os.getpid(), *pids]).encode())
        for pid in pids:
            os.waitpid(pid, 0)

    _forked(launch)
    pids: list[int] = json.loads(os.read(reading, 1000))
    os.close(reading)
    os.close(writing)
    return pids


def _forked(work: Callable[[], None]) -> int:
    """The process that does it and ends."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    return pid


def _become(rank: int, ranks: int, port: int, fifo: str) -> None:
    output = os.open(fifo, os.O_WRONLY)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(output)
    if ranks > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in places.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"})


def train(
    policy: Any,
    points: Path,
    *,
    folder: str,
    resume: str | None,
    step: str,
    settings: dict[str, Any] | None = None,
    limits: dict[str, int] | None = None,
    limited_rank: int = 0,
    disk: int = 0,
    copy_to: str = "",
    seen: str = "",
    grades: dict[str, float] | None = None,
) -> None:
    """One rank of a run.

    Args:
        policy: to train.
        points: its dataset.
        folder: output_dir.
        resume: `resume_from_checkpoint`.
        step: file that follows the steps of the main process.
        settings: changes of SETTINGS.
        limits: from which step on no file can have more bytes than that (-1: as many as it likes), on `limited_rank`.
        disk: bytes of a small disk that is mounted on `folder` and is made full at every save from the second on.
        copy_to: where the small disk's files are copied in the end.
        grades: of the evaluations after these steps, which there are none of otherwise.
        seen: the beginning of files that list, a line each forward pass, which rows of the dataset this rank has seen.
    """
    from starved_runs import FileLimits, FullDisk, Grades, Steps, mount_small_disk

    from ptr_hf import PTRTrainer, PTRTrainingArguments

    if disk:
        mount_small_disk(folder, disk)
    args = PTRTrainingArguments(output_dir=folder, **{**SETTINGS, **(settings or {})})
    grades_ = {int(at): grade for at, grade in (grades or {}).items()}
    callbacks: list[Any] = [Steps(Path(step)), Grades(grades_)]
    if limits and args.process_index == limited_rank:
        callbacks.append(FileLimits({int(at): limit for at, limit in limits.items()}))
    if disk:
        callbacks.append(FullDisk(Path(folder)))
    evaluated = points if grades else None
    trainer = PTRTrainer(policy, args, train_dataset=points, eval_dataset=evaluated, callbacks=callbacks)
    if seen:

        def note(_module: Any, inputs: tuple[dict[str, Any], ...]) -> None:
            with Path(f"{seen}-{args.process_index}").open("a") as rows:
                rows.write(json.dumps(inputs[0]["index"].tolist()) + "\n")

        trainer.policy.register_forward_pre_hook(note)
    try:
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
    finally:
        if disk:
            subprocess.run(["cp", "-a", folder, copy_to], check=True)


if __name__ == "__main__":
    serve()
