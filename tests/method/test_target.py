import pytest
import torch
from builders import property_test, seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ptr_hf.method import ConsequenceEncoder, consequence_embedding


def make_tower(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 6, 3))


def tower_source(tower: nn.Module) -> list[tuple[str, torch.Tensor]]:
    buffers = [(name, value) for name, value in tower.named_buffers() if value.is_floating_point()]
    return [*tower.named_parameters(), *buffers]


@property_test
@given(seed=st.integers(0, 10_000), batch=st.integers(1, 4), cameras=st.integers(1, 3), dim=st.integers(1, 6))
def test_embedding_is_the_normalised_mean_of_the_cameras_present(seed, batch, cameras, dim):
    source = seeded(seed)
    features = [torch.randn(batch, 1 + camera, dim, generator=source, dtype=torch.float64) for camera in range(cameras)]
    present = torch.rand(batch, cameras, generator=source) < 0.6
    embedding = consequence_embedding(features, present)
    for row in range(batch):
        means = [features[camera][row].mean(0) for camera in range(cameras) if present[row, camera]]
        if means:
            mean = torch.stack(means).mean(0)
            torch.testing.assert_close(embedding[row], mean / mean.norm().clamp(min=1e-6), rtol=0, atol=1e-9)
            assert embedding[row].norm() <= 1 + 1e-9
        else:
            assert (embedding[row] == 0).all()


def test_all_cameras_present_is_no_mask():
    features = [torch.randn(2, 3, 5), torch.randn(2, 7, 5)]
    torch.testing.assert_close(
        consequence_embedding(features), consequence_embedding(features, torch.ones(2, 2).bool()), rtol=0, atol=1e-6
    )


def test_an_absent_camera_may_hold_anything():
    features = [torch.randn(1, 3, 5), torch.full((1, 3, 5), torch.nan)]
    present = torch.tensor([[True, False]])
    torch.testing.assert_close(consequence_embedding(features, present), consequence_embedding(features[:1]))


def test_embedding_is_a_constant_in_float32():
    features = torch.randn(2, 3, 5, dtype=torch.bfloat16, requires_grad=True)
    embedding = consequence_embedding([features])
    assert embedding.dtype == torch.float32
    assert not embedding.requires_grad


def test_embedding_refuses_missing_cameras():
    with pytest.raises(ValueError, match="at least one camera"):
        consequence_embedding([])
    with pytest.raises(ValueError, match="2 columns for 1 cameras"):
        consequence_embedding([torch.randn(1, 3, 5)], torch.ones(1, 2).bool())


@property_test
@given(decay=st.floats(0.0, 0.9999), updates=st.integers(1, 6))
def test_the_average_follows_its_closed_form(decay, updates):
    start, policy = make_tower(0), make_tower(1)
    expected = {name: value.double().clone() for name, value in start.state_dict().items()}
    encoder = ConsequenceEncoder(make_tower(0), decay)
    for _ in range(updates):
        encoder.update(tower_source(policy))
    assert encoder.tower is not None
    for name, value in encoder.tower.state_dict().items():
        if value.is_floating_point():
            kept = decay**updates
            closed = kept * expected[name] + (1 - kept) * policy.state_dict()[name].double()
            torch.testing.assert_close(value.double(), closed, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("decay", "seed"), [(0.999, 1), (1.0, 2)])
def test_an_average_that_has_arrived_or_is_frozen_stays_exactly(decay, seed):
    encoder, policy = ConsequenceEncoder(make_tower(1), decay), make_tower(seed)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    for _ in range(20):
        encoder.update(tower_source(policy))
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()])
def test_stays_float32_under_any_cast_and_still_moves(cast):
    encoder = cast(nn.ModuleDict({"targets": ConsequenceEncoder(make_tower(0))}))["targets"]
    assert {value.dtype for value in encoder.state_dict().values()} == {torch.float32, torch.int64}
    policy = make_tower(1).to(torch.bfloat16)
    before = encoder.tower[0].weight.clone()
    for _ in range(10):
        encoder.update(tower_source(policy))
    moved = (encoder.tower[0].weight - before) / (policy[0].weight.float() - before)
    torch.testing.assert_close(moved.median(), torch.tensor(1 - 0.999**10), rtol=1e-3, atol=0)


def test_the_tower_is_frozen_and_never_trains():
    encoder = ConsequenceEncoder(make_tower()).train()
    assert encoder.training
    assert encoder.tower is not None
    assert not any(module.training for module in encoder.tower.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_integer_buffers_are_copied_when_given():
    encoder, policy = ConsequenceEncoder(make_tower()), make_tower(1)
    policy(torch.randn(2, 3, 8, 8))
    encoder.update(policy.state_dict().items())
    assert encoder.state_dict()["tower.1.num_batches_tracked"] == 1


def test_names_and_shapes_are_strict():
    encoder, source = ConsequenceEncoder(make_tower()), dict(tower_source(make_tower(1)))
    with pytest.raises(ValueError, match=r"missing \['4.bias'\]"):
        encoder.update((name, value) for name, value in source.items() if name != "4.bias")
    with pytest.raises(ValueError, match=r"unknown \['extra'\]"):
        encoder.update([*source.items(), ("extra", torch.zeros(1))])
    with pytest.raises(ValueError, match=r"'4.bias' has shape \(1,\)"):
        encoder.update((source | {"4.bias": torch.zeros(1)}).items())
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        ConsequenceEncoder(make_tower(), decay=1.1)


def test_a_shared_tower_copies_nothing():
    encoder = ConsequenceEncoder(None)
    assert encoder.shared
    assert not encoder.state_dict()
    encoder.update(tower_source(make_tower()))
    features = [torch.randn(2, 3, 5)]
    torch.testing.assert_close(encoder.embed(features), consequence_embedding(features))


def test_state_dict_round_trip():
    encoder = ConsequenceEncoder(make_tower(0))
    encoder.update(tower_source(make_tower(1)))
    other = ConsequenceEncoder(make_tower(2))
    other.load_state_dict(encoder.state_dict())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in encoder.state_dict().items())
