"""What a training step costs on a GPU, unattended and within ten minutes on an H100 or H200.

    python recipes/benchmarks/speed/gpu.py                        # results/speed_gpu.json
    python recipes/benchmarks/speed/gpu.py --tiny true --device cpu --output out.json     # whether it runs at all

SmolVLA at its released size with random weights, bfloat16: SFT as `lerobot-train` steps, offline weights, SFT from stored
features, online PTR without and with belief tokens; whether a step waits for the device; whether a run resumes bit for bit.
"""

import json
import logging
import platform
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the package `benchmarks` lies
from benchmarks.speed.probes import Case, Step, build_policy, by_turns, step_sides
from ptr_hf import PTRTrainer, PTRTrainingArguments
from ptr_hf.data.datasets import dataset_metadata
from ptr_hf.data.demonstrations import bundled_demonstrations

SYNCS = (
    *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"),
    *("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "Memcpy DtoH (Device -> Pageable)"),
)
"""Events of a trace that make the processor wait for the device."""
TRACED = 2
"""Steps in a trace."""


@dataclass
class GPUArguments:
    """The steps of SmolVLA on one GPU."""

    output: Path = field(default=Path("results/speed_gpu.json"), metadata={"help": "Where the result goes."})
    device: str = field(default="cuda", metadata={"help": "cuda, or cpu to see that it runs."})
    tiny: bool = field(default=False, metadata={"help": "A tiny SmolVLA and a batch of 4."})
    pairs: int = field(default=10, metadata={"help": "Rounds in which every kind of step is timed."})
    seed: int = field(default=0, metadata={"help": "Of weights and samples."})


def measure(case: Case, arguments: GPUArguments) -> dict[str, Any]:
    """Times, peak memory and waits of every kind of step on the same chunks."""
    sides = step_sides(case, bundled_demonstrations(), arguments.seed, arguments.device, bf16=True)
    with tqdm(total=arguments.pairs + 1, desc=case.label, unit="round") as bar:
        result = asdict(case) | {"chunks": case.chunks} | by_turns(sides, arguments.pairs, bar.update)
    for side, step in sides.items():
        result |= {
            f"{side}_samples_per_s": case.chunks / result[f"{side}_wall_s"],
            f"{side}_peak_mib": peak_memory(step, arguments.device),
            f"{side}_waits_per_step": waits(step, arguments.device),
        }
    return result


def peak_memory(step: Step, device: str) -> float | None:
    """The device's peak memory in a step, in MiB; weights and optimiser of all kinds of step are in it."""
    if device == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 2**20


def waits(step: Step, device: str) -> dict[str, float]:
    """Events by which a step waits for the device, from a trace; the clock's own two waits are taken out."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device != "cpu" else [])]
    with profile(activities=kinds) as trace:
        for _ in range(TRACED):
            step()
    counts = Counter(event.name for event in trace.events() if event.name in SYNCS)
    if device != "cpu":
        # step_sides waits twice, and the profiler once at its end
        counts["cudaDeviceSynchronize"] = max(0, counts["cudaDeviceSynchronize"] - 2 * TRACED - 1)
    return {name: counts[name] / TRACED for name in SYNCS if counts[name]}


def resumed(arguments: GPUArguments) -> dict[str, Any]:
    """How far the weights of a resumed run of a tiny SmolVLA lie from those of one that was not interrupted."""
    dataset, runs = bundled_demonstrations(), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, resume in (("whole", None), ("resumed", "whole/checkpoint-2")):
            policy = build_policy(
                "smolvla", dataset_metadata(dataset), Path(folder) / name, arguments.seed, arguments.device
            )
            args = PTRTrainingArguments(
                output_dir=str(Path(folder) / name),
                preset="ptr",
                segment_length=2,
                num_belief_tokens=2,
                per_device_train_batch_size=2,
                max_steps=4,
                save_steps=2,
                report_to="none",
                disable_tqdm=True,
                use_cpu=arguments.device == "cpu",
                seed=arguments.seed,
            )
            trainer = PTRTrainer(policy, args, dataset)
            trainer.train(resume_from_checkpoint=resume and str(Path(folder) / resume))
            runs[name] = {key: value.detach().cpu().double() for key, value in trainer.model.state_dict().items()}
    largest = max(float((runs["whole"][key] - runs["resumed"][key]).abs().max()) for key in runs["whole"])
    return {"bit_for_bit": largest == 0, "largest_difference": largest, "steps": 4, "resumed_after": 2}


def main() -> None:
    """Measure and save after every case."""
    (arguments,) = HfArgumentParser(GPUArguments, description=__doc__.partition("\n")[0]).parse_args_into_dataclasses()
    if arguments.device != "cpu" and not torch.cuda.is_available():
        sys.exit("There is no GPU here; `--tiny true --device cpu` shows whether the script runs.")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    result: dict[str, Any] = {
        "command": " ".join(["python", "recipes/benchmarks/speed/gpu.py", *sys.argv[1:]]),
        "device": platform.machine() if arguments.device == "cpu" else torch.cuda.get_device_name(),
        "precision": "bfloat16 autocast",
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda}
        | {name: version(name) for name in ("lerobot_policy_ptr", "lerobot", "torch", "transformers")},
        "steps": [],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    name, batches = ("smolvla_frozen", (4,)) if arguments.tiny else ("smolvla_500m", (8, 32, 64))
    for batch in batches:
        for tokens in (0, 4):
            result["steps"].append(measure(Case(name, batch // 4, 4, tokens), arguments))
            arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    result["resume"] = resumed(arguments)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
