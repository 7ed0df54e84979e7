"""Hooks and patches that exist only inside a `with` block, so that nothing is ever left on a policy."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from jaxtyping import Bool, Float
from peft import PeftModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ptr_hf.policies.protocol import ACTION_DIM_PAD, Batch, PolicyTrace


class Capture:
    """One tensor seen by a hook.

    Gradient checkpointing fires hooks again during backward and denoising fires them once per step: `keep` says which
    call counts.
    """

    def __init__(self, keep: str = "first") -> None:
        self._keep = keep
        self._value: Tensor | None = None

    def offer(self, value: Tensor) -> None:
        """Take the value of one call."""
        if self._value is None or self._keep == "last":
            self._value = value

    @property
    def value(self) -> Tensor:
        """The captured tensor.

        Raises:
            RuntimeError: the hooked module was not called.
        """
        if self._value is None:
            raise RuntimeError(
                "A module that PTR reads was not called during the policy's forward: this LeRobot version lays the "
                "policy out differently from the one that ptr_hf supports; install lerobot>=0.6.1,<0.7."
            )
        return self._value


@contextmanager
def captured_output(module: nn.Module, keep: str = "first") -> Iterator[Capture]:
    """Capture the tensor a module returns."""
    capture = Capture(keep)
    handle = module.register_forward_hook(lambda _module, _args, output: capture.offer(output))
    try:
        yield capture
    finally:
        handle.remove()


@contextmanager
def captured_input(module: nn.Module, keep: str = "first") -> Iterator[Capture]:
    """Capture the first positional argument of a module."""
    capture = Capture(keep)
    handle = module.register_forward_pre_hook(lambda _module, args: capture.offer(args[0]))
    try:
        yield capture
    finally:
        handle.remove()


class captured_result(TorchFunctionMode):
    """Capture what a torch function returns to whoever calls it inside the block, the first time.

    For what a policy computes and reduces within one method, where no module can be hooked.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self._function, self._capture = function, Capture()

    @property
    def value(self) -> Tensor:
        """The captured result."""
        return self._capture.value

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run every torch function as it is."""
        result = func(*args, **(kwargs or {}))
        if func is self._function:
            self._capture.offer(result)
        return result


@contextmanager
def edited_call(
    module: nn.Module, edit: Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
) -> Iterator[None]:
    """Rewrite the arguments of every call of a module."""
    handle = module.register_forward_pre_hook(lambda _module, args, kwargs: edit(args, kwargs), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def patched(owner: nn.Module, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Shadow a method of one module instance."""
    shadowed = name in vars(owner)
    previous = vars(owner).get(name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        delattr(owner, name)
        if shadowed:
            setattr(owner, name, previous)


@contextmanager
def preserved_modes(root: nn.Module, *, training: bool | None = None) -> Iterator[None]:
    """Put every module's train/eval mode back afterwards; `training` sets one mode for the block."""
    modes = [(module, module.training) for module in root.modules()]
    if training is not None:
        root.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class AdapterBase:
    """The policy behind an adapter, and the guard that keeps two beliefs from being injected at once."""

    preprocesses_rows = False
    masks_action_dims = False

    def __init__(self, policy: nn.Module) -> None:
        self.policy = policy
        self._belief_open = False

    @property
    def base(self) -> Any:
        """The LeRobot policy itself, looked up anew because PEFT may have wrapped it."""
        return unwrap(self.policy)

    def trace(self, batch: Batch) -> PolicyTrace:
        """Each family's own; see `PolicyAdapter.trace`."""
        raise NotImplementedError

    def losses(self, batch: Batch) -> Float[Tensor, " batch"]:
        """The loss of `trace`, where nothing else of it is read; see `PolicyAdapter.losses`."""
        return self.trace(batch).loss

    def arrange(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Most preprocessors return rows; see `PolicyAdapter.arrange`."""
        return batch

    def observe(self, batch: dict[str, Any]) -> None:
        """A policy that reads one observation keeps none; see `PolicyAdapter.observe`."""

    def gradient_checkpointing_enable(self) -> None:
        """Most policies have no such switch; see `PolicyAdapter.gradient_checkpointing_enable`."""
        raise ValueError(
            f"The {self.base.name} policy of LeRobot has no gradient checkpointing: leave it out, and use smaller batches with "
            "gradient_accumulation_steps where memory is short."
        )

    def compilable(self) -> Iterable[nn.Module]:
        """No module of a policy can be compiled unless its adapter says so; see `PolicyAdapter.compilable`."""
        return ()

    @contextmanager
    def action_scope(self, batch: dict[str, Any]) -> Iterator[None]:
        """Unused action dimensions are kept from the model; see `PolicyAdapter.action_scope`."""
        self.check_action_dims(batch)
        unused = batch.get(ACTION_DIM_PAD)
        with nullcontext() if unused is None else self._masked_chunks(unused):
            yield

    def check_action_dims(self, batch: dict[str, Any]) -> None:
        """Refuse a batch with unused action dimensions where they would be learned like any other."""
        if ACTION_DIM_PAD in batch and not self.masks_action_dims:
            from ptr_hf.policies.registry import policies_with_action_masks

            raise ValueError(
                f"The batch has {ACTION_DIM_PAD!r}, but the {self.base.name} policy cannot leave single action dimensions out: "
                f"use one of {', '.join(policies_with_action_masks())}, or train on robots with one and the same action."
            )

    def _masked_chunks(self, unused: Bool[Tensor, "batch dims"]) -> AbstractContextManager[None]:
        """While open, every chunk that the model reads has zeros in the unused dimensions; a head may read none."""
        return nullcontext()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Refuse a belief scope inside another."""
        if self._belief_open:
            raise RuntimeError(
                "A belief scope is already open on this policy: close it first, or pass the belief to trace/rollout "
                "instead of opening a scope around them."
            )
        self._belief_open = True
        try:
            yield
        finally:
            self._belief_open = False


def unwrap(policy: nn.Module) -> Any:
    """The LeRobot policy inside a `PeftModel`, or the policy itself."""
    return policy.get_base_model() if isinstance(policy, PeftModel) else policy


def frozen_copy(tower: nn.Module) -> nn.Module:
    """A float32 copy in eval mode that requires no gradient: what the EMA starts from."""
    return copy.deepcopy(tower).float().requires_grad_(False).eval()
