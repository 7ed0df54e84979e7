"""One rank of test_feature_cache.py: a few steps from stored features; rank 1 looks when rank 0 has already written some."""

import json
import sys
import time
from pathlib import Path

import torch
from small_policies import ptr_policy

import ptr_hf.data.feature_store as feature_store
from ptr_hf import PTRTrainer, PTRTrainingArguments

torch.set_num_threads(1)
feature_store.FRAMES_PER_SHARD = 20
points, folder = Path(sys.argv[1]), Path(sys.argv[2])
args = PTRTrainingArguments(
    output_dir=str(folder / "run"),
    max_steps=3,
    per_device_train_batch_size=2,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
    ddp_backend="gloo",
    cache_features=str(folder / "cache"),
    cache_dtype="float32",
)
look = feature_store.FeatureStore.missing


def late(self: feature_store.FeatureStore) -> list[int]:
    while args.process_index and not list(self.folder.glob("*.json")):
        time.sleep(0.05)
    return look(self)


feature_store.FeatureStore.missing = late  # type: ignore[method-assign]
policy = ptr_policy("smolvla", points, {"freeze_vision_encoder": True, "train_expert_only": True}, preset="sft")
trainer = PTRTrainer(policy, args, str(points))
trainer.train()
losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
(folder / f"rank-{args.process_index}.json").write_text(json.dumps(losses))
