"""One rank of test_weights_over_ranks.py: one step of PTRTrainer with weights from a file, and its parameters afterwards."""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from small_policies import base_policy

from ptr_hf import PTRTrainer, PTRTrainingArguments

torch.set_num_threads(1)
points, folder, ranks = Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ.get("WORLD_SIZE", "1"))
args = PTRTrainingArguments(
    output_dir=str(folder / f"run-{ranks}"),
    weights=str(folder / "weights.csv"),
    max_steps=1,
    per_device_train_batch_size=8 // ranks,
    learning_rate=1.0,
    warmup_steps=0,
    lr_scheduler_type="constant",
    weight_decay=0.0,
    max_grad_norm=0.0,
    optim="sgd",
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
    **({"ddp_backend": "gloo"} if ranks > 1 else {}),
)
trainer = PTRTrainer(base_policy("act", points, dropout=0.0, use_vae=False), args, train_dataset=points)
trainer.train()
state = {name: value.detach().clone().contiguous() for name, value in trainer.policy.base.named_parameters()}
save_file(state, folder / f"rank-{args.process_index}-of-{ranks}.safetensors")
