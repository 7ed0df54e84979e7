"""What test_launch.py starts with Accelerate's launcher: a check of the launch, or two steps of PTRTrainer (`--long`: many)."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from ptr_hf import PTRTrainingArguments
from ptr_hf.training.launch import check_launch

folder = Path(sys.argv[1])
args = PTRTrainingArguments(
    preset="ptr",
    output_dir=str(folder / "run"),
    max_steps=10**6 if "--long" in sys.argv else 2,
    logging_steps=1,
    per_device_train_batch_size=2,
    segment_length=2,
    scorer_warmup_steps=0,
    head_dim=16,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu="--use_cpu" in sys.argv,
)
check_launch(args)
answer = {"processes": args.world_size, "steps": 0}
if sys.argv[2] != "none":
    from small_policies import base_policy

    from ptr_hf import PTRTrainer

    torch.set_num_threads(1)
    points = Path(sys.argv[2])
    trainer = PTRTrainer(base_policy("act", points), args, train_dataset=points)
    trainer.train()
    state = {name: value.clone().contiguous() for name, value in trainer.policy.state_dict().items()}
    save_file(state, folder / f"rank-{args.process_index}.safetensors")
    answer = {"processes": trainer.accelerator.num_processes, "steps": trainer.state.global_step}
(folder / f"rank-{args.process_index}.json").write_text(json.dumps(answer))
