"""The pretrained policy that is shipped with the package: a tiny SmolVLA on Meta-World states, for two CPU cores."""

import shutil
from pathlib import Path

from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class
from lerobot.policies.pretrained import PreTrainedPolicy

# the policy's type, which LeRobot knows once it is imported
from ptr_hf.policies import configuration_smolvla_state  # noqa: F401

BUNDLED_POLICY = Path(__file__).parents[1] / "data" / "bundled" / "metaworld_policy"
VLM_FOLDER = "tiny_vlm"


def bundled_policy(folder: str | Path, device: str = "cpu") -> PreTrainedPolicy:
    """The policy, fine-tuned on clean demonstrations of the benchmark's eight tasks whose goals lie elsewhere.

    A checkpoint of it names its tokenizer by path, so that one is copied to where the checkpoints will lie.

    Args:
        folder: where the tokenizer and the sizes of its VLM are copied to, in a subfolder.
        device: where the policy lives.

    Raises:
        FileNotFoundError: the installation lacks the policy.
    """
    if not (BUNDLED_POLICY / "model.safetensors").is_file():
        raise FileNotFoundError(f"The bundled policy {BUNDLED_POLICY.name} is missing; reinstall the package.")
    vlm = Path(folder) / VLM_FOLDER
    shutil.copytree(BUNDLED_POLICY / "vlm", vlm, dirs_exist_ok=True, copy_function=shutil.copyfile)
    config = PreTrainedConfig.from_pretrained(BUNDLED_POLICY)
    vars(config).update(vlm_model_name=str(vlm.resolve()), device=device)
    return get_policy_class(config.type).from_pretrained(BUNDLED_POLICY, config=config)
