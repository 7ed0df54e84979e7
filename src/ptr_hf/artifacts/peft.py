"""LeRobot policies under PEFT: wrapped as LeRobot wraps them, stored in PEFT's own files.

    adapter_config.json            method, target modules, and the base policy's source and revision
    adapter_model.safetensors      the adapter alone

A plain LeRobot loads such a folder too: it reads the base policy from its source and puts the adapter on top.
"""

import copy
from pathlib import Path
from typing import Any

from lerobot.policies.factory import get_policy_class
from lerobot.policies.pretrained import PreTrainedPolicy
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from ptr_hf.configuration_ptr import PTRConfig
from ptr_hf.files.base_source import check_base
from ptr_hf.files.foreign_code import no_foreign_code
from ptr_hf.policies.base import unwrap

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"


def wrap_with_peft(
    policy: nn.Module, peft_config: PeftConfig | None = None, overrides: dict[str, Any] | None = None
) -> PeftModel:
    """Freeze a LeRobot policy and put a trainable adapter on it, by LeRobot's `wrap_with_peft`.

    Args:
        policy: a policy whose `config.pretrained_path` says where its weights come from.
        peft_config: a PEFT configuration; None takes the policy's own target modules with LoRA.
        overrides: fields on top of either, e.g. {"r": 8}; None values are left out.

    Raises:
        ValueError: the policy is wrapped already, has no known source, or names no target modules of its own.
    """
    if isinstance(policy, PeftModel):
        raise ValueError("The policy has a PEFT adapter already: leave peft_config out, or give the policy without it.")
    assert isinstance(policy, PreTrainedPolicy)
    if not policy.config.pretrained_path:
        raise ValueError(
            "An adapter is stored without its base policy, so the base needs a source to be loaded from again: give the model as "
            "a Hub id or a folder, or set policy.config.pretrained_path to it."
        )
    # LeRobot annotates the policy; PEFT returns its own model around it
    wrapped: Any = policy.wrap_with_peft(peft_config, overrides)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def source_of(model: PeftModel) -> str | None:
    """Hub id or folder of the base policy's weights, or None for one that exists only in memory."""
    path = unwrap(model).config.pretrained_path
    return None if path is None else str(path)


def merged(model: Any, in_place: bool = False) -> Any:
    """A policy with its adapter folded into its weights; one without an adapter as it is.

    Args:
        model: a policy, or a PEFT model around one.
        in_place: change the policy that the adapter is on, instead of a copy.
    """
    if not isinstance(model, PeftModel):
        return model
    policy: Any = (model if in_place else copy.deepcopy(model)).merge_and_unload()
    policy.config.use_peft = False
    return policy


def save_adapter(model: PeftModel, folder: Path, revision: str | None = None) -> None:
    """Write an adapter's two files.

    Args:
        model: the policy with its adapter.
        folder: an existing folder.
        revision: of the base policy at its source.
    """
    config = model.peft_config[model.active_adapter]
    config.base_model_name_or_path, config.revision = source_of(model), revision
    config.save_pretrained(str(folder))
    tensors = {name: value.detach().contiguous() for name, value in get_peft_model_state_dict(model).items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS_NAME)


@no_foreign_code()
def load_adapted_base(config: PTRConfig, folder: Path) -> PeftModel:
    """The base policy from its source, with an adapter of the stored shape on it (`load_adapter` fills it).

    Raises:
        ValueError: the adapter's configuration names no base policy.
    """
    peft_config = PeftConfig.from_pretrained(str(folder))
    source = peft_config.base_model_name_or_path
    if not source:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG_NAME} names no base policy, and there is no model.safetensors beside it: set "
            "base_model_name_or_path to the Hub id or folder of the policy that the adapter was trained on."
        )
    base_config = config.base_config
    # the checkpoint's own configuration stands in place of the source's
    check_base(source, peft_config.revision, trusted=list(vars(base_config).values()))
    base_config.use_peft = False
    base = get_policy_class(base_config.type).from_pretrained(source, config=base_config, revision=peft_config.revision)
    base.config.pretrained_path, base.config.use_peft = Path(source), True
    peft_config.inference_mode = False
    return get_peft_model(base, peft_config)


def load_adapter(model: PeftModel, path: Path) -> None:
    """Fill an adapter, strictly.

    Raises:
        ValueError: the file holds other tensors than the adapter.
    """
    tensors = load_file(path)
    own = get_peft_model_state_dict(model)
    if {name: value.shape for name, value in tensors.items()} != {name: value.shape for name, value in own.items()}:
        raise ValueError(f"{path} holds another PEFT adapter than this policy has.")
    set_peft_model_state_dict(model, tensors)
