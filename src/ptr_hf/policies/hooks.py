"""Hooks and patches that exist only inside a `with` block, so that nothing is ever left on a policy."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a module's call."""


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
    """Capture the tensor a module returns, the first of several."""
    capture = Capture(keep)
    handle = module.register_forward_hook(
        lambda _module, _args, output: capture.offer(output[0] if isinstance(output, tuple) else output)
    )
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
def edited_call(module: nn.Module, edit: Callable[[tuple[Any, ...], dict[str, Any]], Call]) -> Iterator[None]:
    """Rewrite the arguments of every call of a module."""
    handle = module.register_forward_pre_hook(lambda _module, args, kwargs: edit(args, kwargs), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def recorded_calls(module: nn.Module, read: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[list[Any]]:
    """What `read` takes from the arguments of each call of a module."""
    calls: list[Any] = []

    def record(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        calls.append(read(args, kwargs))
        return args, kwargs

    with edited_call(module, record):
        yield calls


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
def recorded_results(owner: nn.Module, name: str) -> Iterator[list[Any]]:
    """What a method of one module instance returns, call after call."""
    results: list[Any] = []
    original = getattr(owner, name)

    def method(*args: Any, **kwargs: Any) -> Any:
        results.append(original(*args, **kwargs))
        return results[-1]

    with patched(owner, name, method):
        yield results


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
