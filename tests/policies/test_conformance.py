"""What every adapter must do, on every policy of `policy_families.FAMILIES`."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from family import ACTION_DIM, CHUNK, Family
from lerobot.policies.pretrained import PreTrainedPolicy
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ptr_hf.policies import AdapterBase, PolicyTrace, make_adapter
from ptr_hf.policies.base import features_key, view_key

Batch = dict[str, Any]
Recorder = Callable[[str, object], None]
BELIEF_TOKENS = 3


def seeded(call: Callable[[], Any], seed: int = 7) -> Any:
    torch.manual_seed(seed)
    return call()


def belief_for(adapter: AdapterBase, rows: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return scale * torch.randn(rows, BELIEF_TOKENS, adapter.context_dim, generator=generator)


def gradients(policy: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def assert_same_gradients(policy: nn.Module, reference: dict[str, Tensor], **tolerance: float) -> None:
    found = gradients(policy)
    assert found.keys() == reference.keys()
    for name, gradient in reference.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def calls_of(module: nn.Module, run: Callable[[], Any]) -> int:
    """How often a module is called while `run` runs."""
    count = 0

    def tick(*_: Any) -> None:
        nonlocal count
        count += 1

    handle = module.register_forward_pre_hook(tick)
    try:
        run()
    finally:
        handle.remove()
    return count


def assert_untouched(policy: nn.Module) -> None:
    for name, module in policy.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        # LeRobot's own evo1 and groot ask transformers for hidden states, which it captures by hooks that stay
        assert not [hook for hook in hooks if not hook.__module__.startswith("transformers.")], name
        patched = {key for key, value in vars(module).items() if callable(value) and hasattr(type(module), key)}
        assert not patched, f"{name}: {patched}"


def test_trace_has_the_promised_shapes(policy: PreTrainedPolicy, batch: Batch, family: Family) -> None:
    adapter = make_adapter(policy)
    trace = adapter.trace(batch)
    rows = batch["action"].shape[0]
    assert trace.loss.shape == (rows,)
    assert trace.context.shape[::2] == (rows, adapter.context_dim)
    assert trace.action_tokens.shape == (rows, adapter.action_steps, adapter.action_dim)
    assert adapter.action_steps == family.action_tokens
    assert trace.action_hidden.shape == (rows, family.action_tokens, adapter.hidden_dim)
    assert adapter.chunk_size == CHUNK
    assert torch.equal(trace.action_mask, family.action_mask(batch))
    assert trace.context_mask.any(1).all()
    for value in vars(trace).values():
        assert value.dtype in (torch.float32, torch.bool)
        assert torch.isfinite(value).all()


def test_trace_without_belief_is_the_base_loss_and_gradient(
    policy: PreTrainedPolicy, batch: Batch, family: Family
) -> None:
    if not family.masks_padding:
        batch["action_is_pad"] = torch.zeros_like(batch["action_is_pad"])
    expected = seeded(lambda: policy.forward(copy.deepcopy(batch))[0])
    state_after_base = torch.get_rng_state()
    expected.backward()
    reference = {name: gradient.clone() for name, gradient in gradients(policy).items()}
    policy.zero_grad()
    loss = seeded(lambda: make_adapter(policy).trace(batch)).loss.mean()
    assert torch.equal(torch.get_rng_state(), state_after_base), "tracing draws other random numbers than training does"
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert_same_gradients(policy, reference, rtol=1e-4, atol=1e-6)


def test_trace_is_one_forward_of_the_base_policy(policy: PreTrainedPolicy, batch: Batch, family: Family) -> None:
    adapter = make_adapter(policy)
    calls = 0
    core = policy.get_submodule(family.core)
    original = core.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    core.forward = counted
    adapter.trace(batch, belief_for(adapter, 4))
    assert calls == 1
    if family.tower is not None:
        tower = policy.get_submodule(family.tower)
        policy.eval()
        base_calls = calls_of(tower, lambda: policy.forward(copy.deepcopy(batch)))
        assert calls_of(tower, lambda: adapter.trace(batch)) == base_calls


def test_trace_reads_no_scalar_back_and_leaves_the_batch_alone(
    policy: PreTrainedPolicy, batch: Batch, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(policy)
    before = copy.deepcopy(batch)
    with monkeypatch.context() as patch:
        if not family.waits:
            patch.setattr(torch.Tensor, "item", lambda _: pytest.fail("trace waits for the device"))
        adapter.trace(batch, belief_for(adapter, 4))
    adapter.rollout(batch)
    assert batch.keys() == before.keys()
    for key, value in before.items():
        same = torch.equal(batch[key], value) if isinstance(value, Tensor) else batch[key] == value
        assert same, key


@pytest.mark.capability("belief")
def test_belief_changes_the_trace_and_gets_gradients_row_by_row(
    policy: PreTrainedPolicy, batch: Batch, family: Family
) -> None:
    adapter = make_adapter(policy)
    belief = belief_for(adapter, 4).requires_grad_()
    plain, traced = seeded(lambda: adapter.trace(batch)), seeded(lambda: adapter.trace(batch, belief))
    assert traced.context.shape == plain.context.shape, "belief positions must not be part of the context"
    assert torch.allclose(traced.context, plain.context) != family.context_reads_belief
    assert not torch.allclose(traced.loss, plain.loss)
    traced.loss[0].backward()
    assert belief.grad is not None
    assert (belief.grad[0].abs().sum(-1) > 0).all()
    assert not belief.grad[1:].any(), "a row's belief reaches another row"


def test_context_gradient_reaches_the_backbone(policy: PreTrainedPolicy, batch: Batch, family: Family) -> None:
    adapter = make_adapter(policy)
    trace = adapter.trace(batch)
    (trace.context.square().mean() + trace.action_tokens.square().mean()).backward()
    assert any(gradient.abs().sum() > 0 for gradient in gradients(policy).values())


@pytest.mark.capability("belief")
@pytest.mark.parametrize("per_token", [False, True])
def test_masked_belief_is_no_belief(policy: PreTrainedPolicy, batch: Batch, per_token: bool) -> None:
    adapter = make_adapter(policy)
    policy.eval()
    belief = belief_for(adapter, 4, scale=5.0)
    readable = torch.tensor([False, True, False, True])
    mask = readable[:, None].expand(4, BELIEF_TOKENS) if per_token else readable
    plain, full = seeded(lambda: adapter.trace(batch)), seeded(lambda: adapter.trace(batch, belief))
    mixed = seeded(lambda: adapter.trace(batch, belief, mask))
    for trace in (plain, full, mixed):  # what a padded context position holds is nobody's business
        trace.context = trace.context * trace.context_mask.unsqueeze(-1)
    for name in ("loss", "context", "action_hidden"):
        found, without, within = (getattr(trace, name) for trace in (mixed, plain, full))
        torch.testing.assert_close(found[~readable], without[~readable], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(found[readable], within[readable], rtol=1e-4, atol=2e-5)


@pytest.mark.capability("belief")
def test_belief_steers_sampling(policy: PreTrainedPolicy, batch: Batch, family: Family) -> None:
    adapter = make_adapter(policy)
    observation = {key: value for key, value in batch.items() if not key.startswith("action")}
    belief = belief_for(adapter, 4)
    modes = [module.training for module in policy.modules()]
    plain = seeded(lambda: adapter.rollout(observation))
    steered = seeded(lambda: adapter.rollout(observation, belief))
    assert [module.training for module in policy.modules()] == modes
    reference = copy.deepcopy(policy).eval()
    own = seeded(lambda: family.predict(reference, copy.deepcopy(observation)))
    torch.testing.assert_close(plain.actions, own, rtol=0, atol=0)
    assert (steered.actions - plain.actions).abs().max() > 1e-5
    with adapter.belief_scope(belief):
        policy.eval()
        scoped = seeded(lambda: family.predict(policy, copy.deepcopy(observation)))
    torch.testing.assert_close(scoped, steered.actions, rtol=0, atol=0)
    with adapter.belief_scope(belief, torch.zeros(4, dtype=torch.bool)):
        hidden = seeded(lambda: family.predict(policy, copy.deepcopy(observation)))
    torch.testing.assert_close(hidden, plain.actions, rtol=1e-4, atol=1e-5)
    executed = CHUNK + 1 - family.observation_steps
    assert steered.actions.shape == (4, executed, ACTION_DIM)
    assert steered.action_tokens.shape == (4, family.action_tokens, adapter.action_dim)
    assert steered.action_hidden.shape == (4, family.action_tokens, adapter.hidden_dim)
    assert steered.action_mask.all() or family.writes_tokens


def test_rollout_tokens_are_the_training_tokens_of_the_same_chunk(
    policy: PreTrainedPolicy, batch: Batch, family: Family
) -> None:
    if family.writes_tokens:
        return  # checked in the family's own tests: its trace reads tokens, not actions
    adapter = make_adapter(policy)
    rollout = adapter.rollout(batch)
    before = family.observation_steps - 1  # steps of the predicted chunk that lie before now, and are not executed
    action = torch.cat([batch["action"][:, :before, :ACTION_DIM], rollout.actions], dim=1)
    trace = adapter.trace({**batch, "action": action})
    torch.testing.assert_close(rollout.action_tokens[:, before:], trace.action_tokens[:, before:], rtol=1e-5, atol=1e-5)


def test_nothing_is_left_on_the_policy(policy: PreTrainedPolicy, batch: Batch, family: Family) -> None:
    adapter = make_adapter(policy)
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    belief = belief_for(adapter, 4)
    adapter.trace(batch, belief, torch.ones(4, dtype=torch.bool))
    adapter.trace(batch, views=adapter.encode_views(batch))
    adapter.rollout(batch, belief)
    adapter.build_tower(1)
    with pytest.raises(RuntimeError, match="scope is already open"), adapter.belief_scope(belief):
        adapter.trace(batch, belief)
    with pytest.raises(RuntimeError), adapter.belief_scope(belief[:1]):
        policy.forward(copy.deepcopy(batch))
    assert_untouched(policy)
    after = policy.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    if family.pickles:
        pickle.loads(pickle.dumps(adapter))


def test_copies_are_independent(policy: PreTrainedPolicy, batch: Batch) -> None:
    adapter = make_adapter(policy)
    expected = seeded(lambda: adapter.trace(batch)).loss.detach()
    twin = copy.deepcopy(adapter)
    assert twin.policy is not policy
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(seeded(lambda: twin.trace(batch)).loss, expected, rtol=0, atol=0)
    assert not torch.allclose(seeded(lambda: adapter.trace(batch)).loss, expected)


@pytest.mark.capability("bf16 autocast")
def test_bf16_autocast(policy: PreTrainedPolicy, batch: Batch, family: Family) -> None:
    if not family.masks_padding:
        batch["action_is_pad"] = torch.zeros_like(batch["action_is_pad"])
    adapter = make_adapter(policy)
    belief = belief_for(adapter, 4).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = seeded(lambda: policy.forward(copy.deepcopy(batch))[0])
        plain = seeded(lambda: adapter.trace(batch))
        trace = adapter.trace(batch, belief, views=adapter.encode_views(batch))
    torch.testing.assert_close(plain.loss.mean(), expected.float(), rtol=1e-3, atol=1e-3)
    assert {value.dtype for value in vars(trace).values()} == {torch.float32, torch.bool}
    (trace.loss.mean() + trace.context.mean()).backward()
    assert belief.grad is not None
    assert torch.isfinite(belief.grad).all()
    assert belief.grad.abs().sum() > 0


@pytest.mark.capability("PEFT")
def test_peft(policy: PreTrainedPolicy, batch: Batch, family: Family) -> None:
    early = make_adapter(policy)
    expected = seeded(lambda: early.trace(batch))
    if not family.masks_padding:
        batch["action_is_pad"] = torch.zeros_like(batch["action_is_pad"])
        expected = seeded(lambda: early.trace(batch))
    wrapped = get_peft_model(policy, LoraConfig(r=2, target_modules=family.lora))
    adapter = make_adapter(wrapped)
    assert adapter.policy is wrapped
    trace = seeded(lambda: adapter.trace(batch, belief=None))
    torch.testing.assert_close(trace.loss, expected.loss, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:  # what starts at zero
                parameter.normal_(std=0.5)
    trace = seeded(lambda: adapter.trace(batch))
    assert not torch.allclose(trace.loss, expected.loss)
    adapted = not torch.allclose(trace.action_tokens, expected.action_tokens)
    assert adapted == family.adapts_projector, "A_t must see the adapted projector"
    torch.testing.assert_close(
        trace.loss.mean(),
        seeded(lambda: wrapped.get_base_model().forward(copy.deepcopy(batch))[0]),
        rtol=1e-5,
        atol=1e-6,
    )
    torch.testing.assert_close(seeded(lambda: early.trace(batch)).loss, trace.loss, rtol=0, atol=0)
    belief = belief_for(adapter, 4).requires_grad_()
    adapter.trace(batch, belief).loss.mean().backward()
    trained = {name for name, p in wrapped.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained
    assert all("lora_" in name for name in trained)
    assert belief.grad is not None
    assert adapter.tower_is_frozen()
    adapter.rollout(batch, belief.detach())
    assert_untouched(wrapped)


@pytest.mark.capability("tower reuse")
def test_views_equal_no_views_with_the_tower_run_once(policy: PreTrainedPolicy, batch: Batch, family: Family) -> None:
    adapter = make_adapter(policy)
    chunks = [family.batch(policy, rows=2, seed=seed) for seed in (1, 2)]
    for chunk in chunks:  # instructions of one segment are one text, so both chunks have one prefix length
        chunk |= {key: chunks[0][key] for key in chunk if "language" in key}
    segment = {
        key: torch.cat([chunk[key] for chunk in chunks])
        for key, value in chunks[0].items()
        if isinstance(value, Tensor)
    }

    def losses(with_views: bool) -> list[PolicyTrace]:
        torch.manual_seed(5)
        views = adapter.encode_views(segment) if with_views else None
        traces = []
        for index, chunk in enumerate(chunks):
            torch.manual_seed(index)
            rows = None if views is None else views.rows(slice(2 * index, 2 * index + 2))
            kept = chunk if views is None else {k: v for k, v in chunk.items() if k not in family.cameras}
            traces.append(adapter.trace(kept, views=rows))
        return traces

    expected = losses(with_views=False)
    sum(trace.loss.mean() for trace in expected).backward()
    reference = {name: gradient.clone() for name, gradient in gradients(policy).items()}
    policy.zero_grad()
    found = losses(with_views=True)
    sum(trace.loss.mean() for trace in found).backward()
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left.loss, right.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(left.context, right.context, rtol=1e-4, atol=1e-5)
    assert_same_gradients(policy, reference, rtol=1e-3, atol=1e-5)
    if family.tower is not None:
        tower = policy.get_submodule(family.tower)
        cameras = len(family.cameras) + family.settings.get("empty_cameras", 0)
        assert calls_of(tower, lambda: losses(with_views=True)) == cameras
        views = adapter.encode_views(segment)
        picked = views.rows(torch.tensor([3, 0]))
        for key, value in views.features.items():
            assert torch.equal(picked.features[key], value[[3, 0]])
        with pytest.raises(ValueError, match="4 rows and the batch 2"):
            adapter.trace(chunks[0], views=views)


@pytest.mark.full
@pytest.mark.capability("stored features")
def test_features_in_the_place_of_pictures(
    policy: PreTrainedPolicy, batch: Batch, family: Family, record_property: Recorder
) -> None:
    """Trace and LeRobot's own loss are the same, bit for bit, and the tower does not run."""
    adapter = make_adapter(policy)
    if not adapter.reads_features or not family.cameras:
        record_property("works", False)
        return
    policy.requires_grad_(False).eval()
    views = adapter.encode_views(batch, 1)
    stored = {key: value for key, value in batch.items() if key not in family.cameras}
    for key in set(family.cameras) & views.features.keys():
        stored |= {features_key(key): views.features[key], view_key(key): views.tower[key].mean(dim=1)}
    found, expected = (seeded(lambda given=given: adapter.trace(given)) for given in (stored, batch))
    assert torch.equal(found.loss, expected.loss)
    # what a padded context position holds is nobody's business
    assert torch.equal(found.context[found.context_mask], expected.context[expected.context_mask])
    kept = adapter.encode_views(stored, 1)
    for key, value in kept.tower.items():
        torch.testing.assert_close(value[:, 0], views.tower[key].mean(dim=1), rtol=0, atol=0)

    def own_loss(given: Batch) -> Tensor:
        with adapter.features_scope(given) as inputs:
            return policy(inputs)[0]

    assert torch.equal(seeded(lambda: own_loss(stored)), seeded(lambda: own_loss(batch)))
    assert family.tower is not None
    assert calls_of(policy.get_submodule(family.tower), lambda: own_loss(stored)) == 0


@pytest.mark.capability("tower reuse")
def test_truncated_tower_equals_the_layer_states(policy: PreTrainedPolicy, batch: Batch, family: Family) -> None:
    policy.requires_grad_(False).eval()
    adapter = make_adapter(policy)
    assert adapter.tower_is_frozen()
    for layer in range(1, adapter.num_tower_layers() + 1):
        copied, shared = adapter.build_tower(layer), adapter.build_tower(layer, share=True)
        views = adapter.encode_views(batch, layer)
        assert tuple(views.tower) == adapter.target_keys()
        for key in adapter.target_keys():
            image = batch[key] if family.observation_steps == 1 else batch[key][:, -1]
            tokens = adapter.encode_image(copied, key, image)
            assert tokens.shape[-1] == adapter.target_dim(layer)
            torch.testing.assert_close(tokens, views.tower[key], rtol=0, atol=0)
            torch.testing.assert_close(adapter.encode_image(shared, key, image), tokens, rtol=0, atol=0)
            assert not tokens.requires_grad
        live = dict(adapter.tower_parameters(layer))
        assert live.keys() == copied.state_dict().keys()
        for name, value in copied.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, live[name])
            assert value.data_ptr() != live[name].data_ptr()
            assert shared.state_dict()[name].data_ptr() == live[name].data_ptr()
        assert not copied.training
        assert not any(parameter.requires_grad for parameter in copied.parameters())
    for layer in (0, adapter.num_tower_layers() + 1):
        with pytest.raises(ValueError, match="target_layer must be between"):
            adapter.build_tower(layer)


def test_a_training_tower_is_not_shared(policy: PreTrainedPolicy, batch: Batch) -> None:
    adapter = make_adapter(policy)
    if adapter.tower_is_frozen():
        assert adapter.encode_views(batch, 1).tower
        return
    with pytest.raises(ValueError, match="frozen"):
        adapter.encode_views(batch, 1)


def test_future_frames_cannot_reach_the_policy(policy: PreTrainedPolicy, batch: Batch, family: Family) -> None:
    adapter = make_adapter(policy)
    expected = seeded(lambda: adapter.trace(batch))
    futures = {f"future.{key}": torch.rand_like(batch[key]) for key in (*family.cameras, *family.reads)}
    futures |= {f"{key}_is_pad": torch.ones(4, 2, dtype=torch.bool) for key in family.cameras}
    found = seeded(lambda: adapter.trace({**batch, **futures}))
    for name in vars(expected):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    frames = family.observation_steps + 1
    for key in (*family.cameras, *family.reads):
        own = batch[key] if family.observation_steps > 1 else batch[key].unsqueeze(1)
        stacked = {**batch, key: torch.cat([own, torch.rand_like(own[:, :1])], dim=1)}
        with pytest.raises(ValueError, match=f"{key}.*{frames} frames"):
            adapter.trace(stacked)


@pytest.mark.capability("action_is_pad")
def test_padded_steps_do_not_count(policy: PreTrainedPolicy, batch: Batch, family: Family) -> None:
    adapter = make_adapter(policy)
    pad = batch["action_is_pad"].clone()
    pad[0], pad[1] = True, False
    action = batch["action"].clone()
    policy.eval()  # a VAE encodes even padded actions into its latent's input, which it masks
    first = seeded(lambda: adapter.trace({**batch, "action_is_pad": pad}))
    action[:, :CHUNK][pad] += 100.0
    second = seeded(lambda: adapter.trace({**batch, "action": action, "action_is_pad": pad}))
    assert torch.equal(first.action_mask, family.action_mask({**batch, "action_is_pad": pad}))
    assert first.loss[0] == 0
    assert second.loss[0] == 0
    if family.regression:  # a flow head mixes all steps of the noised chunk, a regression head sees none of them
        torch.testing.assert_close(second.loss, first.loss)
    unpadded = {key: value for key, value in batch.items() if key != "action_is_pad"}
    explicit = {**batch, "action_is_pad": torch.zeros_like(pad)}
    torch.testing.assert_close(
        seeded(lambda: adapter.trace(unpadded)).loss, seeded(lambda: adapter.trace(explicit)).loss, rtol=0, atol=0
    )


def test_missing_inputs_are_named(policy: PreTrainedPolicy, batch: Batch, family: Family) -> None:
    adapter = make_adapter(policy)
    for key in (*family.reads, *family.targets):
        with pytest.raises(ValueError, match=f"'{key}'.*preprocessor"):
            adapter.trace({k: v for k, v in batch.items() if k != key})
    if family.cameras:
        blind = {key: value for key, value in batch.items() if key not in family.cameras}
        for call in (adapter.trace, adapter.rollout, adapter.encode_views):
            with pytest.raises(ValueError, match=f"'{family.cameras[0]}'.*rename_map"):
                call(blind)
    tower = adapter.build_tower(1)
    with pytest.raises(ValueError, match="unknown"):
        adapter.encode_image(tower, "observation.images.unknown", batch[adapter.target_keys()[0]])


@pytest.mark.capability("bf16 weights")
def test_bf16_weights(policy: PreTrainedPolicy, batch: Batch, family: Family, record_property: Recorder) -> None:
    if family.half is None:
        record_property("works", False)
        return
    family.half(policy)
    assert torch.bfloat16 in {parameter.dtype for parameter in policy.parameters()}
    adapter = make_adapter(policy)
    belief = belief_for(adapter, 4).requires_grad_()
    trace = adapter.trace(batch, belief, views=adapter.encode_views(batch))
    assert {value.dtype for value in vars(trace).values()} == {torch.float32, torch.bool}
    (trace.loss.mean() + trace.context.mean() + trace.action_tokens.mean()).backward()
    assert belief.grad is not None
    assert torch.isfinite(belief.grad).all()
    assert belief.grad.abs().sum() > 0
    assert all(torch.isfinite(gradient).all() for gradient in gradients(policy).values())
    assert torch.isfinite(adapter.rollout(batch, belief.detach()).actions).all()
    tower = adapter.build_tower(1)
    assert {value.dtype for value in tower.parameters()} <= {torch.float32}


@pytest.mark.capability("gradient checkpointing")
def test_gradient_checkpointing(
    policy: PreTrainedPolicy, batch: Batch, family: Family, record_property: Recorder
) -> None:
    adapter = make_adapter(policy)
    if not family.checkpoints:
        record_property("works", False)
        with pytest.raises(ValueError, match="gradient checkpointing"):
            adapter.gradient_checkpointing_enable()
        return
    belief = belief_for(adapter, 4)

    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def run() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        tokens = belief.clone().requires_grad_()
        policy.zero_grad()
        trace = seeded(lambda: adapter.trace(batch, tokens))
        (trace.loss.mean() + trace.context.square().mean() + trace.action_hidden.square().mean()).backward()
        assert tokens.grad is not None
        return trace.loss, tokens.grad, {name: gradient.clone() for name, gradient in gradients(policy).items()}

    handle = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        loss, belief_gradient, reference = run()
        once, calls = calls, 0
        adapter.gradient_checkpointing_enable()
        again, again_gradient, _ = run()
    finally:
        handle.remove()
    assert calls > once or "checkpointed" in family.name, "nothing was computed again in backward"
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again_gradient, belief_gradient, rtol=1e-4, atol=1e-6)
    assert_same_gradients(policy, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.capability("torch.compile")
def test_compiled_regions(policy: PreTrainedPolicy, batch: Batch, family: Family, record_property: Recorder) -> None:
    adapter = make_adapter(policy)
    modules = list(adapter.compilable())
    if not family.compiles:
        record_property("works", False)
        assert not modules
        return
    keys = list(policy.state_dict())
    belief = belief_for(adapter, 4)

    def run() -> tuple[PolicyTrace, dict[str, Tensor]]:
        policy.zero_grad()
        trace = seeded(lambda: adapter.trace(batch, belief, views=adapter.encode_views(batch)))
        trace.loss.mean().backward()
        return trace, {name: gradient.clone() for name, gradient in gradients(policy).items()}

    expected, reference = run()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for module in modules:
        module.compile(backend="aot_eager")
    found, _ = run()
    compiled = torch._dynamo.utils.counters["frames"]["ok"]
    assert compiled > 0, "nothing was compiled"
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.context, expected.context, rtol=1e-4, atol=1e-5)
    assert_same_gradients(policy, reference, rtol=1e-3, atol=1e-5)
    run()
    assert torch._dynamo.utils.counters["frames"]["ok"] == compiled, "a second step compiles anew"
    assert list(policy.state_dict()) == keys
