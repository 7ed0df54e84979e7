"""What a PTR checkpoint must be before anything of it is built: complete, undamaged, of one piece, and unable to run code.

    check_artifact(folder)              files, names, JSON, headers, processors
    check_tensors(config, artifact, build)  every tensor's name and shape against the policy, which is built without memory for it
    check_processors(folder)            the processors alone, before LeRobot imports what their files name

docs/artifacts.md lists the files of a checkpoint, who writes and reads each, and what is checked.
"""

import copy
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from lerobot.policies.factory import get_policy_class
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from torch.nn.modules import module as torch_module

from ptr_hf.artifacts.adapter_config import check_adapter
from ptr_hf.artifacts.config_checks import check_values, read_config
from ptr_hf.artifacts.peft import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from ptr_hf.artifacts.processor_checks import check_processors
from ptr_hf.configuration_ptr import PTR_CONFIG_NAME, PTRConfig
from ptr_hf.files.foreign_code import no_foreign_code
from ptr_hf.files.reading import StoredFile, missing, printable, read_header, read_json
from ptr_hf.files.regular import quoted, regular_file
from ptr_hf.pathway.build import DataSizes

PTR_SCORER_NAME = "ptr_scorer.safetensors"
TOWER_PREFIX = "target_encoder.tower."
NAMED = 3
INITIAL_WEIGHTS: dict[str, Any] = {"load_vlm_weights": False, "pretrained_backbone_weights": None}
"""Fields that say where a new policy's weights come from, and their value for a policy whose weights are stored."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ArtifactInfo:
    """A checkpoint folder that `check_artifact` has found sound.

    Attributes:
        folder: of the checkpoint.
        config: of its `ptr_config.json`; `base_path` is on record there, the base's configuration is complete without it.
        adapter_alone: whether a PEFT adapter stands in place of the base policy's weights.
        files: the headers of its safetensors files, by file name.
        trusted: Hub ids or folders, named by the checkpoint, whose own code may run.
    """

    folder: Path
    config: PTRConfig
    adapter_alone: bool
    files: dict[str, StoredFile]
    trusted: tuple[str, ...] = ()

    @property
    def sizes(self) -> DataSizes:
        """Of the data whose verdicts are stored."""
        return DataSizes.stored({name: tensor.shape for name, tensor in self.files[PTR_SCORER_NAME].tensors.items()})


def check_artifact(folder: str | Path, trusted: Collection[str] = ()) -> ArtifactInfo:
    """Check a PTR checkpoint's files; no tensor is allocated, no file that can run code is opened.

    Args:
        folder: written by `PTRPolicy.save_pretrained`, or a Hub snapshot.
        trusted: Hub ids or folders, named by the checkpoint, whose own code may run.

    Raises:
        FileNotFoundError: a file of the checkpoint is missing.
        ValueError: a file is damaged, too large, names what lies elsewhere or what could run code, or is of another kind.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: give one that PTRPolicy.save_pretrained has written.")
    weights = (SAFETENSORS_SINGLE_FILE, ADAPTER_WEIGHTS_NAME, PTR_SCORER_NAME)
    stored = [name for name in weights if regular_file(folder, name) is not None]
    adapter_alone = ADAPTER_WEIGHTS_NAME in stored and SAFETENSORS_SINGLE_FILE not in stored
    base = (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME) if adapter_alone else (SAFETENSORS_SINGLE_FILE,)
    for name in (PTR_CONFIG_NAME, *base, PTR_SCORER_NAME):
        if regular_file(folder, name) is None:
            raise FileNotFoundError(
                f"{folder} is no PTR checkpoint: {missing(folder, name)} A folder written by PTRPolicy.save_pretrained has it; "
                "a plain LeRobot policy goes into PTRConfig(base_path=...)."
            )
    config = read_config(folder)
    check_values(config, folder, trusted)
    _check_lerobots_config(config, folder)
    adapter_config = regular_file(folder, ADAPTER_CONFIG_NAME)
    if adapter_config is not None:
        check_adapter(read_json(adapter_config), str(adapter_config))
    files = {name: read_header(folder / name) for name in stored}
    check_processors(folder, trusted)
    return ArtifactInfo(folder, config, adapter_alone, files, tuple(trusted))


def _check_lerobots_config(config: PTRConfig, folder: Path) -> None:
    path = regular_file(folder, CONFIG_NAME)
    if path is not None:
        kind = read_json(path).get("type")
        if kind not in ("ptr", config.base_config.type):
            raise ValueError(
                f"{path} is of the type {quoted(kind)}, but {PTR_CONFIG_NAME} beside it has a base policy of the type "
                f"{config.base_config.type!r}: the files are of two checkpoints."
            )


type Expected = tuple[dict[str, dict[str, Tensor]], list[set[str]]]

# ---- tensors -------------------------------------------------------------------------------------------------------


@no_foreign_code()
def expected_tensors(config: PTRConfig, artifact: ArtifactInfo, build: Callable[..., Any]) -> Expected | None:
    """Every tensor of the policy that a configuration describes, from the policy built on the meta device (no memory).

    Args:
        config: of the policy; the artifact's own, or with the user's changes.
        artifact: the checkpoint; bounds how large the policy can be, and holds the adapter's configuration.
        build: makes the policy from `config`, `base_policy` and `sizes`: the class `PTRPolicy`.

    Returns:
        name -> tensor on the meta device, by file name; and groups of names in the base that are one tensor, of which one may
        be stored for all. None where LeRobot cannot build the base policy without memory (multi_task_dit, evo1, groot and
        vla_jepa load a pretrained backbone as they are built); then only the strict check at loading remains.

    Raises:
        ValueError: the configuration describes no policy, or one that is far larger than what is stored.
    """
    config = copy.deepcopy(config)
    config.base_path = None
    base_config = config.base_config
    for name, value in INITIAL_WEIGHTS.items():
        if name in vars(base_config):
            vars(base_config)[name] = value
    base_config.use_peft = False
    # LeRobot's configurations know no meta device until they are made
    config.device = base_config.device = "meta"
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), _bounded(artifact):
            base: Any = get_policy_class(base_config.type)(base_config)
            if artifact.adapter_alone:
                peft_config = PeftConfig.from_pretrained(str(artifact.folder))
                base = get_peft_model(base, peft_config)
            policy = build(config, base_policy=base, sizes=artifact.sizes)
    except OSError:
        # a backbone's configuration could not be fetched: no fault of the checkpoint
        raise
    # LeRobot, PEFT and torch raise whatever an impossible size makes them stumble over
    except Exception as error:
        if isinstance(error, RuntimeError | NotImplementedError) and "meta" in str(error):
            logger.info("%s: the base policy cannot be built without memory, so shapes are checked as it loads.", error)
            return None
        raise ValueError(
            f"{artifact.folder} describes a policy that cannot be built ({PTR_CONFIG_NAME}): {printable(error)}"
        ) from error
    name = ADAPTER_WEIGHTS_NAME if artifact.adapter_alone else SAFETENSORS_SINGLE_FILE
    own = get_peft_model_state_dict(base) if artifact.adapter_alone else base.state_dict()
    names: dict[int, set[str]] = {}
    for tensor_name, parameter in base.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(tensor_name)
    tied = [group for group in names.values() if len(group) > 1]
    return {name: dict(own), PTR_SCORER_NAME: policy.side_state_dict()}, tied


@contextmanager
def _bounded(artifact: ArtifactInfo) -> Iterator[None]:
    """Stop the building of a policy whose layers are far more, or far larger, than those that are stored.

    Python code would otherwise run for a number of layers that a file of a few bytes can ask for.
    """
    stored = [tensor for file in artifact.files.values() for tensor in file.tensors.values()]
    # a policy may be built whole and cut afterwards; an adapter's base policy is not stored with it
    count = 100_000 if artifact.adapter_alone else 1000 + 16 * len(stored)
    size = 2**33 if artifact.adapter_alone else max(2**20, 16 * max((tensor.size for tensor in stored), default=0))
    built = 0

    def check(module: torch.nn.Module, name: str, parameter: Tensor | None) -> None:
        nonlocal built
        built += 1
        if built > count or (parameter is not None and parameter.numel() > size):
            raise ValueError(
                f"it asks for far more than is stored (a {type(module).__name__} with {name} of the shape "
                f"{None if parameter is None else tuple(parameter.shape)})"
            )

    handles = (
        torch_module.register_module_parameter_registration_hook(check),
        torch_module.register_module_buffer_registration_hook(check),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_tensors(config: PTRConfig, artifact: ArtifactInfo, build: Callable[..., Any]) -> bool:
    """Compare every stored tensor with the policy that a configuration describes, before any is allocated.

    Args:
        config: of the policy to be built; its `device` plays no part.
        artifact: of the checkpoint to be loaded into it.
        build: as in `expected_tensors`.

    Returns:
        False where LeRobot cannot build this base policy without memory, so that nothing was compared.

    Raises:
        ValueError: tensors are missing, unknown, of another shape or another kind; the first three are named. Or the
            configuration itself is refused, as by `check_artifact`.
    """
    check_values(config, artifact.folder, artifact.trusted)
    expected = expected_tensors(config, artifact, build)
    if expected is None:
        return False
    files, tied = expected
    for name, own in files.items():
        compare_tensors(artifact.files[name], own, tied)
    return True


def compare_tensors(file: StoredFile, own: Mapping[str, Tensor], tied: Sequence[set[str]] = ()) -> None:
    """Refuse a file whose tensors are not those of a policy.

    Args:
        file: its header.
        own: the policy's tensors by name.
        tied: groups of names that are one tensor.

    Raises:
        ValueError: tensors are missing, unknown, of another shape or another kind; the first three are named.
    """
    stored = file.tensors
    if file.metadata.get("shared_tower") == "True":
        # the moving average of a tower that was frozen starts at the policy's own
        own = {name: value for name, value in own.items() if not name.startswith(TOWER_PREFIX)}
    covered = {name for group in tied if group & stored.keys() for name in group}
    absent, unknown = sorted(own.keys() - stored.keys() - covered), sorted(stored.keys() - own.keys())
    if absent or unknown:
        raise ValueError(
            f"{file.path} lacks {_first(absent)} and has unknown {_first(unknown)}: it belongs to another configuration."
        )
    differing = []
    for name in sorted(own.keys() & stored.keys()):
        if stored[name].shape != tuple(own[name].shape):
            differing.append(f"{name} has shape {stored[name].shape}, this policy needs {tuple(own[name].shape)}")
        elif stored[name].is_floating != own[name].is_floating_point():
            differing.append(f"{name} has the type {stored[name].dtype}, this policy needs {own[name].dtype}")
    if differing:
        more = f"; and {len(differing) - NAMED} more" if len(differing) > NAMED else ""
        raise ValueError(f"{file.path}: {'; '.join(differing[:NAMED])}{more}.")


def _first(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"[{', '.join(map(quoted, names[:NAMED]))}]{more}"
