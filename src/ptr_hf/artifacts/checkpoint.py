"""Artifacts: one folder (or Hub repo) that holds the base policy in LeRobot's own layout and PTR's files beside it.

    config.json, model.safetensors                base policy: plain LeRobot loads them when there are no belief tokens
    policy_{pre,post}processor*                   its processors
    ptr_config.json                               PTRConfig
    ptr_scorer.safetensors                        scorer, belief, moving average (if not shared), queue, controller
    adapter_config.json, adapter_model.safetensors  with PEFT: the adapter in place of model.safetensors (see peft.py)

Nothing that is read can execute: JSON and safetensors only, every key and every shape checked.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import draccus
import httpx
from huggingface_hub import file_exists, snapshot_download, try_to_load_from_cache
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from huggingface_hub.errors import OfflineModeIsEnabled
from lerobot.configs import PreTrainedConfig
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from ptr_hf.artifacts.checks import (
    PTR_SCORER_NAME,
    check_artifact,
    check_processors,
    check_tensors,
    compare_tensors,
)
from ptr_hf.artifacts.peft import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    load_adapted_base,
    load_adapter,
    merged,
    save_adapter,
    source_of,
)
from ptr_hf.artifacts.sources import named_source
from ptr_hf.configuration_ptr import PTR_CONFIG_NAME, RETIRED, PTRConfig
from ptr_hf.constants import BASE_PREFIX
from ptr_hf.files.base_source import check_base
from ptr_hf.files.foreign_code import no_foreign_code
from ptr_hf.files.hub_access import asking_the_hub
from ptr_hf.files.reading import read_header
from ptr_hf.files.regular import regular_file
from ptr_hf.policies.base import unwrap

HUB_KWARGS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
LOADED_PROCESSORS = ("policy_*processor*.json", "policy_*processor*.safetensors")
LOADED = (
    *(CONFIG_NAME, PTR_CONFIG_NAME, ADAPTER_CONFIG_NAME, "*.safetensors.index.json"),
    *(SAFETENSORS_SINGLE_FILE, ADAPTER_WEIGHTS_NAME, PTR_SCORER_NAME),
    *LOADED_PROCESSORS,
)
"""What is fetched of a repo: the files that loading reads, and no other however large."""


def is_ptr_folder(path: str | Path) -> bool:
    """Whether a local folder holds a PTR checkpoint.

    Raises:
        ValueError: its configuration is no regular file of that folder.
    """
    return regular_file(path, PTR_CONFIG_NAME) is not None


def is_ptr_source(source: str | Path, revision: str | None = None) -> bool:
    """Whether a folder or a Hub repo holds a PTR checkpoint.

    Raises:
        ValueError: there is no such folder and no repo could have that name, the Hub cannot be asked and the cache does not
            know, or its configuration is no regular file.
    """
    if Path(source).is_dir():
        return is_ptr_folder(source)
    with asking_the_hub("policy", source):
        try:
            return file_exists(str(source), PTR_CONFIG_NAME, revision=revision)
        except (OfflineModeIsEnabled, httpx.TransportError):
            cached = {
                name: isinstance(try_to_load_from_cache(str(source), name, revision=revision), str)
                for name in (PTR_CONFIG_NAME, CONFIG_NAME)
            }
            if not any(cached.values()):
                raise
            return cached[PTR_CONFIG_NAME]


def widest_vector(model: str | Path | PreTrainedConfig | nn.Module, revision: str | None = None) -> int | None:
    """The longest action and state that a policy takes, where it pads every robot's to one width; None where it does not."""
    if isinstance(model, str | Path):
        check_base(model, revision)
        config: Any = PreTrainedConfig.from_pretrained(model, revision=revision)
    elif isinstance(model, PreTrainedConfig):
        config = model
    else:
        config = getattr(unwrap(model), "config", None)
    if isinstance(config, PTRConfig):
        config = config.base_config
    known = vars(config) if isinstance(config, PreTrainedConfig) else {}
    widths = [known[name] for name in ("max_action_dim", "max_state_dim") if name in known]
    return min(widths, default=None)


def save_policy(policy: Any, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write a `PTRPolicy`'s files (not its processors) into an existing folder.

    With belief tokens, or with several robots, `config.json` names the type `ptr`, since the base policy alone would miss
    them; without, it is the base policy's own. Of a policy under PEFT the adapter alone is stored, as PEFT and LeRobot do;
    where the base has no source to be loaded from again, `model.safetensors` holds it with the adapter merged.

    Args:
        policy: a `PTRPolicy`.
        folder: where to write.
        state_dict: gathered by the caller where parameters are sharded; by default the policy's own.
    """
    base = unwrap(policy.base)
    adapter_alone = False
    if isinstance(policy.base, PeftModel):
        if state_dict is not None:
            raise ValueError("A sharded PEFT model cannot be saved; train it without FSDP, or merge the adapter first.")
        save_adapter(policy.base, folder, policy.config.base_revision)
        adapter_alone = source_of(policy.base) is not None
        if not adapter_alone:
            base = merged(policy.base)
    policy.config.base = draccus.encode(base.config, PreTrainedConfig)
    shown = policy.config if policy.config.needs_ptr_hf else base.config
    for name, config in ((PTR_CONFIG_NAME, policy.config), (CONFIG_NAME, shown)):
        content = _recorded(draccus.encode(config, PreTrainedConfig))
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    if state_dict is None:
        if not adapter_alone:
            save_model(base, str(folder / SAFETENSORS_SINGLE_FILE))
        side = policy.side_state_dict()
    else:
        base_state = {
            name.removeprefix(BASE_PREFIX): value for name, value in state_dict.items() if name.startswith(BASE_PREFIX)
        }
        save_file(_contiguous(base_state), folder / SAFETENSORS_SINGLE_FILE)
        side = {name: value for name, value in state_dict.items() if not name.startswith(BASE_PREFIX)}
    shared = policy.target_encoder is not None and policy.target_encoder.shared
    save_file(_contiguous(side), folder / PTR_SCORER_NAME, metadata={"shared_tower": str(shared)})


@no_foreign_code()
def load_policy(
    policy_class: type,
    source: str | Path,
    *,
    config: PreTrainedConfig | None = None,
    merge_adapter: bool = False,
    trusted_sources: Collection[str] = (),
    **hub_kwargs: Any,
) -> Any:
    """Build a `PTRPolicy` from a folder or a Hub repo and load every tensor strictly.

    Args:
        policy_class: `PTRPolicy`.
        source: folder or Hub id.
        config: replaces the saved configuration.
        merge_adapter: fold a PEFT adapter into the base policy's weights instead of keeping it trainable.
        trusted_sources: repos whose code LeRobot's processors may load, beyond the ones that LeRobot names itself.
        hub_kwargs: see `PTRPolicy.from_pretrained`.

    Raises:
        FileNotFoundError: the folder lacks one of the checkpoint's files.
        ValueError: a file is damaged, or its tensors are not this policy's.
    """
    folder = resolve_folder(source, **hub_kwargs)
    artifact = check_artifact(folder, trusted_sources)
    saved = artifact.config
    if isinstance(config, PTRConfig):
        # LeRobot parsed the same file with the user's overrides; where the base came from stays as saved.
        config.base = config.base or saved.base
        saved = config
    else:
        saved.device = config.device if config is not None else saved.device
    saved.base_path, provenance = None, saved.base_path
    check_tensors(saved, artifact, policy_class)
    base = load_adapted_base(saved, folder) if artifact.adapter_alone else None
    policy = policy_class(saved, base_policy=base, sizes=artifact.sizes)
    saved.base_path = provenance
    load_weights(policy, folder, trusted_sources)
    if merge_adapter:
        policy.merge_adapter()
    saved.pretrained_path, saved.pretrained_revision = Path(source), hub_kwargs.get("revision")
    policy.eval()
    return policy


def load_weights(policy: Any, folder: Path, trusted: Collection[str] = ()) -> None:
    """Load base policy and side pathway from a checkpoint folder into a policy of the same shapes.

    A policy that is wrapped by PEFT already has its base weights and takes the adapter.

    Args:
        policy: a `PTRPolicy`.
        folder: of the checkpoint.
        trusted: Hub ids or folders, named by the checkpoint, whose own code may run.

    Raises:
        FileNotFoundError, ValueError: as `load_policy`.
    """
    check_artifact(folder, trusted)
    adapted = isinstance(policy.base, PeftModel)
    for name in (ADAPTER_WEIGHTS_NAME if adapted else SAFETENSORS_SINGLE_FILE, PTR_SCORER_NAME):
        path = regular_file(folder, name)
        if path is None:
            raise FileNotFoundError(f"The checkpoint in {folder} lacks {name}, which this policy needs.")
        try:
            if name == PTR_SCORER_NAME:
                _load_side(policy, path)
            elif adapted:
                load_adapter(policy.base, path)
            else:
                load_model(policy.base, str(path), strict=True)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged or belongs to another policy: {error}") from error


def resolve_folder(source: str | Path, patterns: Sequence[str] = LOADED, **hub_kwargs: Any) -> Path:
    """The local folder itself, or a snapshot of the Hub repo.

    Raises:
        ValueError: there is no such folder, and the repo cannot be had from the Hub.
    """
    if Path(source).is_dir():
        return Path(source)
    known = {name: value for name, value in hub_kwargs.items() if name in HUB_KWARGS}
    with asking_the_hub("policy", source):
        return Path(snapshot_download(str(source), allow_patterns=list(patterns), **known))


def resolve_processors(source: str | Path, revision: str | None = None, trusted: Collection[str] = ()) -> Path:
    """A folder with a policy's processors, checked before LeRobot imports what their files name.

    Raises:
        ValueError: a processor would run code that is neither LeRobot's nor already imported.
    """
    folder = resolve_folder(source, (CONFIG_NAME, *LOADED_PROCESSORS), revision=revision)
    check_processors(folder, trusted)
    return folder


def _load_side(policy: Any, path: Path) -> None:
    file, average = read_header(path), policy.target_encoder
    compare_tensors(file, policy.side_state_dict())
    policy.load_state_dict(load_file(path, device=str(next(policy.parameters()).device)), strict=False)
    # Targets came from the policy's own frozen tower; a policy that trains it starts the moving average there.
    if average is not None and not average.shared and file.metadata.get("shared_tower") == "True":
        average.tower.load_state_dict(dict(policy.adapter.tower_parameters(policy.target_layer)), strict=True)


def _recorded(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose records of where weights came from name Hub ids and, of local folders, the last part alone."""
    base = config.get("base", {})
    for content, key in ((config, "base_path"), (base, "pretrained_path")):
        if content.get(key):
            content[key] = named_source(content[key]).name
    if config.get("weights"):
        config["weights"] = Path(config["weights"]).name
    return {name: value for name, value in config.items() if name not in RETIRED} | {"pretrained_path": None}


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in tensors.items()}
