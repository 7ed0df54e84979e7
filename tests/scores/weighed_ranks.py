"""One rank of test_weighed_training.py: a few steps of PTRTrainer, and what its memory holds afterwards."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from small_policies import base_policy

from ptr_hf import PTRTrainer, PTRTrainingArguments

torch.set_num_threads(1)
points, folder = Path(sys.argv[1]), Path(sys.argv[2])
args = PTRTrainingArguments(
    output_dir=str(folder / "run"),
    preset="ptr_consequence_loss",
    max_steps=5,
    per_device_train_batch_size=2,
    segment_length=2,
    scorer_warmup_steps=2,
    score_refresh_steps=1,
    head_dim=16,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
    ddp_backend="gloo",
)
trainer = PTRTrainer(base_policy("smolvla", points), args, train_dataset=points)
chunks: list[int] = []
trainer.policy.register_forward_hook(lambda _module, _inputs, output: chunks.append(int(output[0].chunk_valid.sum())))
trainer.train()
state = {name: value.contiguous() for name, value in trainer.policy.side_state_dict().items()}
save_file({name: value.clone() for name, value in state.items()}, folder / f"rank-{args.process_index}.safetensors")
(folder / f"rank-{args.process_index}.json").write_text(json.dumps(sum(chunks)))
