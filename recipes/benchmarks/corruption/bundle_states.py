"""Makes what `train_ptr.py` runs on without arguments: demonstrations on Meta-World states, and a policy pretrained on others.

    python recipes/benchmarks/corruption/bundle_states.py --workspace outputs/corruption/state

Both are of the corruption benchmark's track on states (docs/corruption.md): condition *combined*, seed 0, 30 demonstrations of
each of the eight tasks, beside the truth; and the policy that its runs start from. Recording and pretraining take 20 minutes on
one core and are kept in the workspace.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the package `benchmarks` lies
from benchmarks.corruption.conditions import load_recordings, write_condition
from benchmarks.corruption.run import SETTINGS, prepare
from ptr_hf.data.demonstrations import BUNDLED, SPLITS
from ptr_hf.policies.bundled import BUNDLED_POLICY

PER_TASK, SEED = 30, 0


def bundle(workspace: Path, output: Path) -> None:
    """Write the dataset, its truth and the policy into `output`; no file of them names the workspace."""
    prepare(SETTINGS["state"], workspace)
    dataset = output / SPLITS["states"]
    recordings = load_recordings(workspace / "recordings_train")
    write_condition(dataset, "state", "combined", SEED, recordings, per_task=PER_TASK, overwrite=True)
    policy = output / BUNDLED_POLICY.name
    shutil.copytree(workspace / "vlm", policy / "vlm", dirs_exist_ok=True, copy_function=shutil.copyfile)
    shutil.copyfile(workspace / "pretrained" / "model.safetensors", policy / "model.safetensors")
    config = json.loads((workspace / "pretrained" / "config.json").read_text()) | {"vlm_model_name": "vlm"}
    (policy / "config.json").write_text(json.dumps(config, indent=4) + "\n")
    for folder in (dataset, policy):
        for file in folder.rglob("*"):
            if file.is_file():
                file.chmod(0o644)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workspace", type=Path, required=True, help="Folder of the recordings and the pretrained policy."
    )
    parser.add_argument(
        "--output", type=Path, default=BUNDLED, help="Where dataset and policy go. Default: the package."
    )
    arguments = parser.parse_args()
    bundle(arguments.workspace, arguments.output)
