"""Sharded training. FSDP2: the policy as one unit whose parameters, gradients and optimiser states are spread over the ranks.

LeRobot's policies call projections of their layers directly, past the layers' own forward, so that only the whole policy can
be a unit: every rank holds all parameters during a step, and its share of everything between steps. Queue, controller and
memory are buffers, which are replicated.
"""

import copy
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule

from ptr_hf.artifacts.checkpoint import load_weights
from ptr_hf.method.chunks import ObjectiveOutput, Weighing
from ptr_hf.modeling_ptr import PTRPolicy

CONFIG = "recipes/accelerate/fsdp2.yaml"


def prepare_sharding(accelerator: Accelerator, policy: PTRPolicy) -> None:
    """Make ready for FSDP2 where the launch asks for it; nothing to do otherwise.

    Raises:
        ValueError: it was asked for in a way that would be ignored, fail or change the gradients.
    """
    if not accelerator.is_fsdp2:
        if accelerator.distributed_type == DistributedType.FSDP or parse_flag_from_env("ACCELERATE_USE_FSDP"):
            raise ValueError(
                "FSDP was asked for, but this is not FSDP2 on GPUs: version 1 is not supported, and without GPUs Accelerate "
                f"ignores it. Start with `accelerate launch --config_file {CONFIG} ...`, or without FSDP."
            )
        return
    plugin = accelerator.state.fsdp_plugin
    if isinstance(policy.base, PeftModel):
        raise ValueError("PEFT under FSDP cannot be saved: an adapter is small, so train it without FSDP.")
    settings = {
        "fsdp_auto_wrap_policy must be NO_WRAP (layers are called past their own forward)": plugin.auto_wrap_policy
        is None,
        "fsdp_state_dict_type must be FULL_STATE_DICT (a checkpoint is one policy)": "FULL"
        in str(plugin.state_dict_type),
        "fsdp_cpu_ram_efficient_loading must be false (buffers are not sharded)": not plugin.cpu_ram_efficient_loading,
        "fsdp_activation_checkpointing must be false (use gradient_checkpointing)": not plugin.activation_checkpointing,
        "mixed_precision must be bf16 or no": accelerator.mixed_precision != "fp16",
    }
    wrong = [sentence for sentence, right in settings.items() if not right]
    if wrong:
        raise ValueError(f"FSDP2 is set up as PTR cannot run it: {'; '.join(wrong)}. {CONFIG} has it right.")
    # autocast lowers the policy alone; FSDP's own policy would lower the scorer and the moving average too
    plugin.mixed_precision_policy = None
    _show_outputs()


@cache
def _show_outputs() -> None:
    """Let FSDP find the tensors in a forward's output: from them it starts the reduction of a backward pass."""
    # a second of imports that no other run needs, here and below
    from torch.export import register_dataclass

    for output in (ObjectiveOutput, Weighing):
        register_dataclass(output)


@torch.no_grad()
def share_weights(accelerator: Accelerator, policy: PTRPolicy) -> None:
    """Give all ranks rank 0's tensors before they are sharded: unlike DDP, FSDP2 does not."""
    if accelerator.is_fsdp2 and not isinstance(policy, FSDPModule):
        for value in policy.state_dict().values():
            dist.broadcast(value, src=0)


def restore_weights(policy: PTRPolicy, folder: Path) -> None:
    """`load_weights`, also into a policy that is sharded: rank 0 reads and checks the files and sends what they hold.

    Raises:
        FileNotFoundError, ValueError: as `load_weights`, on the rank that reads.
    """
    if not isinstance(policy, FSDPModule):
        load_weights(policy, folder)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    whole = {}
    if dist.get_rank() == 0:
        config = copy.deepcopy(policy.config)
        config.device = "cpu"
        whole = PTRPolicy.from_pretrained(folder, config=config).state_dict()
    set_model_state_dict(policy, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
