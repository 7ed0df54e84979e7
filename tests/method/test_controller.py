import pytest
import torch
from builders import property_test
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ptr_hf.method import AdaptiveScaleController

statistics = st.tuples(st.floats(0, 1), st.floats(-5, 8), st.floats(-4, 5), st.floats(0, 1))
windows = st.lists(statistics, min_size=1, max_size=60)


def by_hand(sequence, decay=0.98, temperature=0.12, beta=1.5):
    """Section 4.5 in plain Python."""
    averages, ratio = None, 0.0
    for values in sequence:
        averages = (
            values if averages is None else [decay * a + (1 - decay) * v for a, v in zip(averages, values, strict=True)]
        )
        accuracy, margin = averages[0], averages[1]
        factor = 1.01 if accuracy < 0.05 else 0.995 if accuracy > 0.35 and margin > 0.10 else 1.0
        temperature = min(max(temperature * factor, 0.03), 0.20)
        beta = min(max(beta * factor, 0.5), 3.0)
        ratio = 0.5 * min(max((accuracy - 0.10) / (0.50 - 0.10), 0.0), 1.0)
    return temperature, beta, ratio, averages


@property_test
@given(sequence=windows, decay=st.sampled_from([0.0, 0.5, 0.98]))
def test_follows_the_rules_of_the_paper(sequence, decay):
    controller = AdaptiveScaleController(decay=decay)
    for values in sequence:
        controller.update(*values)
    temperature, beta, ratio, averages = by_hand(sequence, decay)
    assert controller.temperature.item() == pytest.approx(temperature, abs=1e-12)
    assert controller.beta.item() == pytest.approx(beta, abs=1e-12)
    assert controller.hard_negative_ratio.item() == pytest.approx(ratio, abs=1e-12)
    held = [controller.accuracy, controller.margin, controller.score, controller.valid_ratio]
    assert [value.item() for value in held] == pytest.approx(averages, abs=1e-12)
    assert controller.updates == len(sequence)


@property_test
@given(sequence=windows)
def test_stays_within_its_bounds(sequence):
    controller = AdaptiveScaleController(0.1, 1.0, 0.0, (0.098, 0.103), (0.97, 1.03), 0.3)
    for values in sequence:
        controller.update(*values)
        assert 0.098 <= controller.temperature <= 0.103
        assert 0.97 <= controller.beta <= 1.03
        assert 0.0 <= controller.hard_negative_ratio <= 0.3


@pytest.mark.parametrize(
    ("accuracy", "margin", "factor"),
    [(0.0, 1.0, 1.01), (0.05, 1.0, 1.0), (0.2, 1.0, 1.0), (0.35, 1.0, 1.0), (0.9, 0.05, 1.0), (0.9, 0.5, 0.995)],
)
def test_one_update_of_each_rule(accuracy, margin, factor):
    controller = AdaptiveScaleController()
    controller.update(accuracy, margin, 0.0, 1.0)
    assert controller.temperature.item() == pytest.approx(0.12 * factor, abs=1e-12)
    assert controller.beta.item() == pytest.approx(1.5 * factor, abs=1e-12)


def test_runs_to_either_bound_and_no_further():
    controller = AdaptiveScaleController()
    for _ in range(1000):
        controller.update(0.9, 5.0, 3.0, 1.0)
    assert controller.temperature == 0.03
    assert controller.beta == 0.5
    assert controller.hard_negative_ratio == 0.5
    for _ in range(1000):
        controller.update(0.0, -5.0, 0.0, 1.0)
    assert controller.temperature == 0.20
    assert controller.beta == 3.0
    assert controller.hard_negative_ratio == 0.0


def test_disabled_averages_and_leaves_the_scales():
    controller = AdaptiveScaleController(enabled=False)
    controller.update(0.9, 5.0, 3.0, 1.0)
    controller.update(0.9, 5.0, 3.0, 1.0)
    assert (controller.temperature, controller.beta, controller.hard_negative_ratio) == (0.12, 1.5, 0.0)
    assert controller.accuracy.item() == pytest.approx(0.9)


def test_a_window_without_targets_changes_nothing():
    controller = AdaptiveScaleController()
    controller.update(0.9, 5.0, 3.0, 1.0)
    before = {name: value.clone() for name, value in controller.state_dict().items()}
    controller.update(torch.tensor(torch.nan), torch.nan, torch.nan, 0.0)
    assert all(torch.equal(value, before[name]) for name, value in controller.state_dict().items())


@property_test
@given(sequence=windows)
def test_tensors_and_floats_and_a_reload_give_the_same_numbers(sequence):
    floats, tensors = AdaptiveScaleController(), AdaptiveScaleController()
    for position, values in enumerate(sequence):
        if position == len(sequence) // 2:
            reloaded = AdaptiveScaleController(temperature=0.2, beta=3.0)
            reloaded.load_state_dict(tensors.state_dict())
            tensors = reloaded
        floats.update(*values)
        tensors.update(*(torch.tensor(value, dtype=torch.float64) for value in values))
    assert all(torch.equal(value, tensors.state_dict()[name]) for name, value in floats.state_dict().items())


def test_keeps_its_precision_under_casts():
    controller = nn.ModuleList([AdaptiveScaleController()]).to(torch.bfloat16)[0]
    assert {value.dtype for value in controller.state_dict().values()} == {torch.float64, torch.int64}


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.5},
        {"beta": 0.1},
        {"decay": 1.0},
        {"hard_negative_ratio_max": 1.5},
        {"ratio_accuracy_range": (0.5, 0.5)},
    ],
)
def test_refuses_settings_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AdaptiveScaleController(**options)
