"""What `benchmark.py` beside this file measures with: policies, paired steps and whole training runs."""

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from subprocess import run
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.scripts import lerobot_train
from lerobot.utils.import_utils import get_safe_default_video_backend
from torch.utils.data import DataLoader
from transformers import AutoConfig, LlamaConfig, TrainerCallback
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

from ptr_hf import PTRConfig, PTRPolicy, PTRTrainer, PTRTrainingArguments
from ptr_hf.data.datasets import dataset_metadata, open_dataset
from ptr_hf.data.segments import Segment, split_segment
from ptr_hf.method.objective import PTRObjective
from ptr_hf.policies.base import features_key
from ptr_hf.policies.tiny import tiny_act, tiny_smolvla, write_tiny_vlm
from ptr_hf.processor_ptr import preprocess
from ptr_hf.scores.given import FrameWeights

POLICIES = ("act", "smolvla", "smolvla_frozen", "smolvla_500m")
FROZEN = ("smolvla_frozen", "smolvla_500m")
"""Those of which only the action expert trains, as SmolVLA does by default."""
MAX_GRAD_NORM = 10.0


@dataclass(frozen=True)
class Case:
    """A policy and the shape of PTR's step on it.

    Attributes:
        policy: one of `POLICIES`.
        segments: B, segments per step.
        segment_length: T, chunks per segment.
        belief_tokens: M.
    """

    policy: str
    segments: int
    segment_length: int
    belief_tokens: int

    @property
    def chunks(self) -> int:
        """Chunk rows per step, PTR's and SFT's."""
        return self.segments * self.segment_length

    @property
    def label(self) -> str:
        return f"{self.policy}, T={self.segment_length}, M={self.belief_tokens}, {self.chunks} chunks"


# ---- policies ------------------------------------------------------------------------------------------------------


def build_policy(
    name: str, meta: LeRobotDatasetMetadata, folder: Path, seed: int, device: str = "cpu"
) -> PreTrainedPolicy:
    """A policy with random weights; `smolvla_500m` has the sizes and the frozen parts of the released SmolVLA.

    Raises:
        ValueError: there is no policy of that name.
    """
    texts = list(meta.tasks.index)
    if name == "act":
        return tiny_act(meta.features, seed=seed, device=device)
    if name in ("smolvla", "smolvla_frozen"):
        vlm = write_tiny_vlm(folder / "tiny_vlm", texts=texts)
        frozen: dict[str, Any] = dict.fromkeys(("freeze_vision_encoder", "train_expert_only"), name == "smolvla_frozen")
        return tiny_smolvla(meta.features, vlm, **frozen, seed=seed, device=device)
    if name == "smolvla_500m":
        return tiny_smolvla(
            meta.features,
            write_real_vlm(folder / "vlm_500m", texts),
            chunk_size=50,
            num_steps=10,
            num_vlm_layers=16,
            freeze_vision_encoder=True,
            train_expert_only=True,
            seed=seed,
            device=device,
        )
    raise ValueError(f"There is no policy {name!r} in this benchmark; choose from {', '.join(POLICIES)}.")


def write_real_vlm(folder: Path, texts: Sequence[str]) -> Path:
    """SmolVLM2-500M's sizes (those of its published config.json) around a byte-level tokenizer, without weights."""
    write_tiny_vlm(folder, image_size=512, patch_size=16, scale_factor=4, texts=texts)
    config = AutoConfig.from_pretrained(folder)
    config.text_config = LlamaConfig(
        vocab_size=49_280,
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
        head_dim=64,
        max_position_embeddings=8192,
        pad_token_id=config.text_config.pad_token_id,
        bos_token_id=config.text_config.bos_token_id,
        eos_token_id=config.text_config.eos_token_id,
    )
    config.vision_config = SmolVLMVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=512,
        patch_size=16,
    )
    config.save_pretrained(folder)
    return folder


# ---- paired steps --------------------------------------------------------------------------------------------------


Step = Callable[[], tuple[float, float]]
"""A training step of one side; returns its CPU time and its wall time in seconds."""


def paired_steps(case: Case, dataset: Path, pairs: int, seed: int, progress: Callable[[], Any]) -> dict[str, Any]:
    """SFT and PTR steps by turns on the same policy, optimiser and chunks, so that the machine's noise meets both."""
    sides = step_sides(case, dataset, seed)
    if case.belief_tokens:
        sides.pop("offline")  # it is the same without
    result: dict[str, Any] = asdict(case) | {"chunks": case.chunks, "pairs": pairs}
    with timed_parts() as spent:

        def after_round() -> None:
            if not rounds:
                spent.update(dict.fromkeys(spent, 0.0))
            rounds.append(None)
            progress()

        rounds: list[None] = []
        result |= by_turns(sides, pairs, after_round)
    parts = {name: seconds / pairs / result["sft_cpu_s"] for name, seconds in spent.items()}
    return result | {
        "parts": parts | {"backward, optimiser, queue": result["ratio_cpu"]["median"] - sum(parts.values())}
    }


PARTS = {
    "views": (PTRPolicy, "_encode_views"),
    "forward": (PTRPolicy, "_trace"),
    "targets": (PTRPolicy, "_targets"),
    "candidates, scorer": (PTRObjective, "forward"),
}
"""What an online step does before its backward, and the methods that do it."""


@contextmanager
def timed_parts() -> Iterator[dict[str, float]]:
    """While open, the CPU time in seconds that each of `PARTS` has taken."""
    spent = dict.fromkeys(PARTS, 0.0)

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                spent[name] += time.process_time() - start

        return call

    with ExitStack() as scope:
        for name, (owner, method) in PARTS.items():
            scope.enter_context(patch.object(owner, method, timed(name, getattr(owner, method))))
        yield spent


def by_turns(sides: dict[str, Step], pairs: int, progress: Callable[[], Any]) -> dict[str, Any]:
    """The times of the sides' steps and their ratios to SFT's; the first round does not count.

    It allocates memory and the optimiser's state.
    """
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for pair in range(pairs + 1):
        for side in list(sides) if pair % 2 == 0 else list(sides)[::-1]:
            times[side].append(sides[side]())
        progress()
    result: dict[str, Any] = {}
    for clock, name in enumerate(("cpu", "wall")):
        taken = {side: [values[clock] for values in own[1:]] for side, own in times.items()}
        result |= {f"{side}_{name}_s": statistics.median(own) for side, own in taken.items()}
        for side in taken.keys() - {"sft"}:
            ratios = [after / before for before, after in zip(taken["sft"], taken[side], strict=True)]
            result[f"ratio_{name}" if side == "ptr" else f"{side}_ratio_{name}"] = spread(ratios)
    return result


def step_sides(case: Case, dataset: Path, seed: int, device: str = "cpu", bf16: bool = False) -> dict[str, Step]:
    """Steps of several kinds on the same policy, optimiser and chunks.

    "sft" is the base policy's own forward on the chunks as plain rows, as `lerobot-train` calls it. "ptr" is
    `PTRPolicy.forward` on the segments, with the objective, the metrics and `update()`; "offline" reads weights that were known
    before. Where the tower is frozen and its features can be stored, "cached" is SFT's step from these. With belief tokens,
    "by_chunk" is SFT's step one chunk of a segment after the other, as the belief asks for. All run backward, clipping and
    AdamW; loading and preprocessing lie outside.
    """
    torch.manual_seed(seed)
    meta = dataset_metadata(dataset)
    with tempfile.TemporaryDirectory() as folder:
        base = build_policy(case.policy, meta, Path(folder), seed, device)
        policy, segments = _policy_and_batch(
            case, dataset, seed, base, preset="ptr", num_belief_tokens=case.belief_tokens
        )
        offline, weighed = _policy_and_batch(case, dataset, seed, base, preset="ptr_offline")
    offline.set_weights(FrameWeights.of_array(np.random.default_rng(seed).uniform(0.5, 1.5, meta.total_frames)))
    segment = split_segment(segments, policy.config.layout)
    chunks = segment.chunks
    optimizer = torch.optim.AdamW([value for value in policy.parameters() if value.requires_grad], lr=1e-5)

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    def step(
        model: Callable[[Any], Any], batch: dict[str, Any] | Segment, after: Callable[[], Any]
    ) -> tuple[float, float]:
        wait()
        start = time.process_time(), time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss, _ = model(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        after()
        wait()
        return time.process_time() - start[0], time.perf_counter() - start[1]

    def by_chunk(batch: Segment) -> Any:
        return torch.stack([policy.base(batch.chunk(number))[0] for number in range(batch.length)]).mean(), {}

    def from_features(batch: dict[str, Any]) -> Any:
        with policy.adapter.features_scope(batch) as given:
            return policy.base(given)

    sides: dict[str, Step] = {
        "sft": partial(step, policy.base, chunks, lambda: None),
        "ptr": partial(step, policy, segments, policy.update),
        "offline": partial(step, offline, weighed, offline.update),
    }
    if case.belief_tokens:
        sides["by_chunk"] = partial(step, by_chunk, segment, lambda: None)
    if policy.adapter.reads_features and policy.adapter.tower_is_frozen():
        sides["cached"] = partial(step, from_features, _with_features(policy, chunks), lambda: None)
    return sides


@torch.no_grad()
def _with_features(policy: PTRPolicy, chunks: dict[str, Any]) -> dict[str, Any]:
    """A batch that holds what the tower makes of its pictures in their place."""
    views = policy.adapter.encode_views(chunks)
    kept = {key: value for key, value in chunks.items() if key not in views.features}
    return kept | {features_key(key): value for key, value in views.features.items() if key in chunks}


def _policy_and_batch(
    case: Case, dataset: Path, seed: int, base: PreTrainedPolicy, **settings: Any
) -> tuple[PTRPolicy, dict[str, Any]]:
    """PTR around a policy, and a preprocessed batch of segments for it on its device."""
    device = base.config.device
    config = PTRConfig(device=device, segment_length=case.segment_length, **settings)
    policy = PTRPolicy(config, base_policy=base).train()
    preprocessor, _ = make_pre_post_processors(policy.config.base_config, dataset_stats=dataset_metadata(dataset).stats)
    opened = open_dataset(dataset, policy.config.layout)
    generator = torch.Generator().manual_seed(seed)
    loader: DataLoader = DataLoader(opened, batch_size=case.segments, shuffle=True, generator=generator)
    return policy, preprocess(next(iter(loader)), preprocessor, policy.config.layout)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return {"low": low, "median": median, "high": high}


# ---- whole runs ----------------------------------------------------------------------------------------------------

PRESETS = {"offline": "ptr_offline", "ptr": "ptr"}
"""Of the runners that are not plain fine-tuning."""


def training_run(
    runner: str,
    case: Case,
    dataset: Path,
    steps: int,
    skip: int,
    threads: int,
    seed: int,
    episodes: Sequence[int] | None = None,
) -> dict[str, float]:
    """One training run in a process of its own; the figures leave out its first `skip` steps.

    Args:
        runner: "lerobot-train" (the plain base policy in LeRobot's own loop); or `PTRTrainer` with "sft", "cached" (SFT from
            stored features), "offline" (the default, weights from an inspection) or "ptr". Features and weights are computed
            before the first step.
        case: gives the policy and the number of chunks per step, the same for every runner.
        dataset: folder of the demonstrations.
        steps: optimiser steps.
        skip: steps at the start that do not count.
        threads: of torch.
        seed: of weights and order.
        episodes: to train on; None takes all.

    Returns:
        chunk samples per CPU-second and per second, data loading included, and the peak memory in MiB above that of the
        imports.
    """
    request = asdict(case) | {"runner": runner, "dataset": str(dataset), "steps": steps, "skip": skip, "seed": seed}
    request["episodes"] = None if episodes is None else list(episodes)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with tempfile.TemporaryDirectory() as folder:
        request["folder"] = folder
        done = run(
            [sys.executable, __file__, json.dumps(request)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        result = Path(folder) / "result.json"
        if not result.is_file():
            raise RuntimeError(f"The {runner} run of {case.label} failed:\n{done.stderr[-2000:]}")
        return json.loads(result.read_text())


def _run_requested(request: dict[str, Any]) -> None:
    """The process of `training_run`."""
    folder, runner, seed = Path(request["folder"]), request["runner"], request["seed"]
    steps, dataset = request["steps"], Path(request["dataset"])
    case = Case(*(request[name] for name in Case.__dataclass_fields__))
    meta = dataset_metadata(dataset)
    imports = peak_memory()
    marks: list[tuple[float, float]] = []

    def mark() -> None:
        marks.append((time.process_time(), time.perf_counter()))

    if runner == "lerobot-train":
        config = TrainPipelineConfig(
            dataset=DatasetConfig(
                repo_id=dataset.name,
                root=str(dataset),
                video_backend=get_safe_default_video_backend(),
                episodes=request["episodes"],
            ),
            policy=build_policy(case.policy, meta, folder, seed).config,
            output_dir=folder / "lerobot",
            batch_size=case.chunks,
            steps=steps,
            num_workers=0,
            log_freq=max(1, steps // 4),
            env_eval_freq=0,
            save_checkpoint=False,
            seed=seed,
        )
        update_policy = lerobot_train.update_policy

        def marked(*args: Any, **kwargs: Any) -> Any:
            result = update_policy(*args, **kwargs)
            mark()
            return result

        with patch.object(lerobot_train, "update_policy", marked):
            lerobot_train.train(config)
    else:
        online = runner == "ptr"
        shape: dict[str, Any] = {"num_belief_tokens": case.belief_tokens} if online else {}
        length = case.segment_length if online else 1
        if runner == "cached":
            shape["cache_features"] = str(folder / "features")
        args = PTRTrainingArguments(
            output_dir=str(folder / runner),
            preset=PRESETS.get(runner, "sft"),
            segment_length=length,
            **shape,
            per_device_train_batch_size=case.chunks // length,
            max_steps=steps,
            logging_steps=max(1, steps // 4),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
        )
        policy = build_policy(case.policy, meta, folder, seed)
        data = LeRobotDataset(
            dataset.name, dataset, request["episodes"], video_backend=get_safe_default_video_backend()
        )
        PTRTrainer(policy, args, data, callbacks=[_Mark(mark)]).train()
    (first_cpu, first_wall), (last_cpu, last_wall) = marks[request["skip"] - 1], marks[-1]
    samples = case.chunks * (len(marks) - request["skip"])
    result = {
        "samples_per_cpu_s": samples / (last_cpu - first_cpu),
        "samples_per_s": samples / (last_wall - first_wall),
        "peak_mib": peak_memory() - imports,
    }
    (folder / "result.json").write_text(json.dumps(result))


class _Mark(TrainerCallback):
    def __init__(self, mark: Callable[[], None]) -> None:
        self._mark = mark

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """After the step and `PTRPolicy.update()`."""
        self._mark()


def peak_memory() -> float:
    """Largest resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Unlike ru_maxrss, this one does not start from the parent's peak.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


if __name__ == "__main__":
    _run_requested(json.loads(sys.argv[1]))
