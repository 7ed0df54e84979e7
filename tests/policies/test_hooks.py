"""Hooks and patches end with their scope, whatever happens inside."""

import pytest
import torch
from torch import nn

from ptr_hf.policies.hooks import captured_input, captured_output, patched, preserved_modes


@pytest.mark.parametrize(("keep", "expected"), [("first", 0.0), ("last", 2.0)])
def test_capture_keeps_the_call_that_counts(keep: str, expected: float) -> None:
    module = nn.Identity()
    with captured_output(module, keep) as output, captured_input(module, keep) as given:
        for value in range(3):
            module(torch.tensor(float(value)))
    module(torch.tensor(9.0))
    assert output.value == given.value == expected


def test_a_module_that_was_not_called_is_reported() -> None:
    with captured_output(nn.Identity()) as capture:
        pass
    with pytest.raises(RuntimeError, match=r"lerobot>=0\.6\.1"):
        _ = capture.value


def test_patch_restores_what_it_shadowed_after_an_error() -> None:
    module = nn.Linear(2, 2)
    own = module.forward = lambda x: x + 1  # type: ignore[method-assign]
    for name, before in (("forward", own), ("extra_repr", None)):
        with pytest.raises(ZeroDivisionError), patched(module, name, lambda *_: 1 / 0):
            getattr(module, name)(torch.zeros(2))
        assert vars(module).get(name) is before


def test_modes_come_back_module_by_module() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout())).train()
    model[1][0].eval()
    before = [module.training for module in model.modules()]
    with preserved_modes(model, training=False):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
