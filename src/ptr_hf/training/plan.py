"""The plan of a run, shown before its first step: data, steps, weights, checkpoints and the disk they need, then the time."""

import logging
import math
import shutil
import time
from collections.abc import Sized
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import SaveStrategy

from ptr_hf.artifacts.peft import source_of
from ptr_hf.modeling_ptr import PTRPolicy
from ptr_hf.report.console import PlainConsole
from ptr_hf.report.text import visible
from ptr_hf.training.arguments import PTRTrainingArguments
from ptr_hf.training.checkpoint_files import checkpoints

if TYPE_CHECKING:
    from ptr_hf.training.trainer import PTRTrainer

MEASURED = 10
"""Steps after the first one whose time says how long the run takes."""

logger = logging.getLogger(__name__)


class RunPlan(TrainerCallback):
    """Shows the plan on the main process, and after a few steps how long the run will take.

    Nothing waits for the device: a GPU is at most a step behind.

    Args:
        trainer: whose run it is.
    """

    def __init__(self, trainer: "PTRTrainer") -> None:
        self._trainer = trainer
        self._first: tuple[int, float] | None = None
        self._told = True

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the plan."""
        self._first, self._told = None, args.disable_tqdm or not state.is_world_process_zero
        if not state.is_world_process_zero:
            return
        if not args.disable_tqdm:
            console = PlainConsole()
            for label, text in plan(self._trainer).items():
                console.print(f"{label:13}{text}", soft_wrap=True)
        warning = too_little_room(args, state, self._trainer.policy)
        if warning is not None:
            logger.warning("%s", warning)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say once how long the rest takes."""
        if self._told:
            return
        if self._first is None:
            self._first = state.global_step, time.perf_counter()
            return
        steps = state.global_step - self._first[0]
        left = state.max_steps - state.global_step
        if steps >= MEASURED:
            self._told = True
            each = (time.perf_counter() - self._first[1]) / steps
            if left:
                # above the progress bar
                tqdm.write(
                    f"{'time':13}{duration(each)} a step: about {duration(each * left)} for the {left:,} steps left"
                )


def plan(trainer: "PTRTrainer") -> dict[str, str]:
    """What a run is about to do, in words, by subject.

    Args:
        trainer: in its `on_train_begin`, when the run's length is known.

    Returns:
        lines by label: data, a step, the run, weights, checkpoints, time.
    """
    args, state, policy = trainer.args, trainer.state, trainer.policy
    data = trainer.training_data
    episodes, frames = sum(part.episodes or 0 for part in data), sum(part.frames or 0 for part in data)
    source = Path(data[0].source)
    named = (
        visible(source.name if source.is_dir() else str(data[0].source)) if len(data) == 1 else f"{len(data)} datasets"
    )
    chunks = policy.config.layout.segment_length
    batch = args.segments_per_step
    # of a stream nobody knows
    segments = len(trainer.train_dataset) if isinstance(trainer.train_dataset, Sized) else 0
    of = f" of {chunks} chunks" if chunks > 1 else ""
    kind = "segments" if chunks > 1 else "chunks"
    factors = [f"{args.train_batch_size} at a time"]
    if args.gradient_accumulation_steps > 1:
        factors.append(f"{args.gradient_accumulation_steps} accumulated")
    if args.world_size > 1:
        factors.append(f"{args.world_size} processes")
    epochs = f", {state.max_steps * batch / segments:.3g} epochs" if segments else ""
    begun = f"; it goes on after step {state.global_step:,}" if state.global_step else ""
    return {
        "data": f"{named}: {episodes:,} episodes, {frames:,} frames"
        + (f", {segments:,} {kind}{of}" if segments else ""),
        "a step": f"{batch:,} {kind}{of}" + (f" ({' x '.join(factors)})" if batch > args.train_batch_size else ""),
        "the run": f"{state.max_steps:,} steps{epochs}{begun}",
        "weights": _weights(policy),
        "checkpoints": _checkpoints(args, state, policy),
    } | ({"time": f"said after {MEASURED + 1} steps"} if state.max_steps - state.global_step > MEASURED + 1 else {})


def _weights(policy: PTRPolicy) -> str:
    record, objective = policy.config.weights_record, policy.objective
    if policy.frame_weights is not None and record:
        origin = "the inspection" if record["origin"] == "inspection" else f"the file {visible(record['file'])}"
        if not policy.frame_weights.move:
            return f"from {origin}: all are 1, so this is plain fine-tuning"
        return (
            f"from {origin}: {record['episodes_below']:.1%} of the episodes are flagged, and {record['moved']:.1%} of all weight "
            "is taken from them"
        )
    if objective is None:
        return "none: plain fine-tuning (SFT)"
    if objective.config.alpha == 0:
        return f"all are 1; a scorer trains beside the policy (preset {policy.config.preset})"
    return (
        f"from a scorer in the step (preset {policy.config.preset}), after {objective.warmup_steps:,} steps of warm-up"
    )


def _checkpoints(args: PTRTrainingArguments, state: TrainerState, policy: PTRPolicy) -> str:
    size = checkpoint_bytes(policy, args)
    free = free_bytes(args.output_dir)
    room = "" if free is None else f"; {gigabytes(free)} are free there"
    where = f" in {visible(str(args.output_dir))}"
    number = saves(args, state)
    if number == 0:
        weights = checkpoint_bytes(policy, args, weights_only=True)
        return f"none on the way; the policy at the end, about {gigabytes(weights)},{where}{room}"
    every = f"every {state.save_steps:,} steps" if SaveStrategy(args.save_strategy) == SaveStrategy.STEPS else ""
    every = every or f"by save_strategy={SaveStrategy(args.save_strategy).value}"
    count = "" if number is None else f"{number:,}, "
    kept = f"the last {args.save_total_limit} are kept" if args.save_total_limit else "all are kept"
    return f"{count}{every}; {kept}, about {gigabytes(size)} each,{where}{room}"


def saves(args: PTRTrainingArguments, state: TrainerState) -> int | None:
    """How many checkpoints a run will still write; None where its evaluations decide."""
    strategy = SaveStrategy(args.save_strategy)
    if strategy == SaveStrategy.NO:
        return 0
    if strategy == SaveStrategy.STEPS:
        return math.ceil(state.max_steps / state.save_steps) - state.global_step // state.save_steps
    if strategy == SaveStrategy.EPOCH:
        return state.num_train_epochs - math.floor(state.epoch or 0)
    return None


def checkpoint_bytes(policy: PTRPolicy, args: PTRTrainingArguments, weights_only: bool = False) -> int:
    """The size of a checkpoint, estimated: weights, and what AdamW keeps of every parameter that is trained.

    Args:
        policy: in training.
        args: `save_only_model` leaves the optimiser out.
        weights_only: of the policy as `save_model` writes it.

    Returns:
        bytes.
    """
    base = policy.base
    adapter = isinstance(base, PeftModel) and source_of(base) is not None
    stored = [own for own in base.parameters() if own.requires_grad or not adapter]
    stored += [] if adapter else list(base.buffers())
    weights = sum(own.numel() * own.element_size() for own in (*stored, *policy.side_state_dict().values()))
    if weights_only or args.save_only_model:
        return weights
    return weights + 2 * sum(own.numel() * own.element_size() for own in policy.parameters() if own.requires_grad)


def too_little_room(args: PTRTrainingArguments, state: TrainerState, policy: PTRPolicy) -> str | None:
    """The sentence where the disk cannot hold what a run will write; None where it can, or does not say.

    Args:
        args: of the run.
        state: of the run, its length known.
        policy: in training.
    """
    number, limit, output = saves(args, state), args.save_total_limit, Path(args.output_dir)
    number = 1 if number is None else number
    # the oldest is deleted once the newest is complete
    most = min(number, limit + 1) if limit else number
    new = max(0, most - len(checkpoints(output)))
    need = new * checkpoint_bytes(policy, args) + checkpoint_bytes(policy, args, weights_only=True)
    free = free_bytes(output)
    if free is None or need <= free:
        return None
    what = f"the policy and {most} checkpoints at a time" if most else "the policy"
    remedy = "make room, lower save_total_limit, or give save_only_model=True" if most else "make room"
    return (
        f"{output} has {gigabytes(free)} of free disk, but this run will write about {gigabytes(need)} there ({what}): {remedy}. "
        "It goes on, and reports what it cannot write."
    )


def free_bytes(folder: str | Path) -> int | None:
    """The free space of the disk where a folder is, or would be; None where that disk does not say."""
    with suppress(OSError, StopIteration):
        place = Path(folder).absolute()
        return shutil.disk_usage(next(own for own in (place, *place.parents) if own.exists())).free
    return None


def gigabytes(size: float) -> str:
    """A number of bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{max(size / 1e6, 0.1):.1f} MB"


def duration(seconds: float) -> str:
    """A time for people: '0.042 s', '40 s', '12 min', '3 h 20 min', '2 d 4 h'."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    days, of_day = divmod(hours, 24)
    if days:
        return f"{days} d {of_day} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
