"""What is particular to pi0-FAST."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families_pi0_fast import TOKENS, build_pi0_fast
from family import CHUNK, TOP, WRIST, Family
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from torch import Tensor

from ptr_hf.policies import PolicyTrace, make_adapter
from ptr_hf.policies.hooks import captured_output

Batch = dict[str, Any]
WRITTEN, REAL = "action.tokens", "action.token_mask"


@pytest.fixture
def make() -> Callable[..., tuple[PI0FastPolicy, Batch]]:
    def build(cameras: tuple[str, ...] = (TOP,), **settings: Any) -> tuple[PI0FastPolicy, Batch]:
        family = Family("pi0_fast", build_pi0_fast, cameras, settings=settings)
        policy = family.policy().train()
        return policy, family.batch(policy)

    return build


def gradients(policy: PI0FastPolicy, traced: PolicyTrace) -> dict[str, Tensor]:
    policy.zero_grad()
    terms = (traced.loss, traced.context, traced.action_hidden, traced.action_tokens)
    sum(term.mean() for term in terms).backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def test_loss_is_each_rows_mean_over_its_own_tokens(make: Callable[..., Any]) -> None:
    policy, batch = make()
    real = torch.tensor([20, 50, 90, 70])
    batch[REAL] = torch.arange(TOKENS) < real[:, None]
    batch["action_is_pad"] = torch.arange(CHUNK) >= torch.tensor([CHUNK, 2, 1, 0])[:, None]
    with captured_output(policy.model.paligemma_with_expert.paligemma.lm_head) as logits:
        found = make_adapter(policy).trace(batch)
    chances = logits.value.log_softmax(-1)
    expected = [
        -sum(chances[row, token - 1, batch[WRITTEN][row, token]] for token in range(1, length)) / (length - 1)
        for row, length in enumerate(real.tolist())
    ]
    expected[3] = torch.zeros(())  # a chunk of padding alone has no loss
    torch.testing.assert_close(found.loss, torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert found.action_mask.sum(1).tolist() == [20, 50, 90, 0]
    del batch["action_is_pad"]
    per_row = make_adapter(policy).trace(batch).loss
    own = policy.forward(copy.deepcopy(batch))[0]
    torch.testing.assert_close((per_row * (real - 1)).sum() / (real - 1).sum(), own, rtol=1e-5, atol=1e-6)


def test_no_action_token_reaches_the_context(make: Callable[..., Any]) -> None:
    policy, batch = make()
    adapter, belief = make_adapter(policy), torch.randn(4, 2, 32)
    first = adapter.trace(batch, belief)
    second = adapter.trace({**batch, WRITTEN: batch[WRITTEN].flip(0)}, belief)
    readable = first.context_mask  # padded instruction tokens hold nothing anyone reads
    assert torch.equal(second.context[readable], first.context[readable])
    assert not torch.allclose(second.action_hidden, first.action_hidden)
    later = batch[WRITTEN].clone()
    later[:, 40:] = later[:, 40:].flip(0)
    third = adapter.trace({**batch, WRITTEN: later}, belief)
    torch.testing.assert_close(third.action_hidden[:, :40], first.action_hidden[:, :40], rtol=0, atol=0)
    assert torch.equal(first.action_tokens, policy.model.paligemma_with_expert.embed_language_tokens(batch[WRITTEN]))


@pytest.mark.parametrize("with_belief", [False, True])
def test_a_written_chunk_is_read_as_training_reads_it(make: Callable[..., Any], with_belief: bool) -> None:
    policy, batch = make()
    policy.eval()
    adapter = make_adapter(policy)
    belief = torch.randn(4, 2, 32) if with_belief else None
    rollout = adapter.rollout(batch, belief)
    policy.config.use_kv_cache = False
    plain = adapter.rollout(batch, belief)
    for name, value in vars(rollout).items():
        torch.testing.assert_close(getattr(plain, name), value, rtol=1e-4, atol=1e-4, msg=name)
    steps = policy.config.max_decoding_steps
    assert not rollout.action_tokens[:, steps:].any()
    assert not rollout.action_mask[:, steps:].any()
    embedding = policy.model.paligemma_with_expert.paligemma.model.language_model.embed_tokens
    table = embedding(torch.arange(embedding.num_embeddings))
    tokens = torch.cdist(rollout.action_tokens[:, :steps], table.expand(4, -1, -1)).argmin(-1)
    assert (tokens[:, 0] == policy._paligemma_tokenizer.bos_token_id).all()
    # LeRobot's sampling reads the begin token with the instruction: so must this trace
    prompt = {
        **batch,
        "observation.language.tokens": torch.cat([batch["observation.language.tokens"], tokens[:, :1]], 1),
        "observation.language.attention_mask": torch.nn.functional.pad(
            batch["observation.language.attention_mask"], (0, 1), value=True
        ),
        WRITTEN: tokens[:, 1:],
        REAL: torch.ones(4, steps - 1, dtype=torch.bool),
    }
    trace = adapter.trace(prompt, belief)
    torch.testing.assert_close(trace.action_tokens, rollout.action_tokens[:, 1:steps])
    torch.testing.assert_close(trace.action_hidden, rollout.action_hidden[:, 1:steps], rtol=1e-3, atol=1e-3)


def test_a_written_chunk_ends_with_its_end_token(make: Callable[..., Any]) -> None:
    policy, _ = make()
    end = policy._paligemma_tokenizer.convert_tokens_to_ids("|")
    written = torch.tensor([[7, end, 9, end, 0], [7, 8, 9, 10, end]])
    tokens, mask = make_adapter(policy)._read_tokens(written, 5)
    begin = policy._paligemma_tokenizer.bos_token_id
    assert tokens.tolist() == [[begin, 7, end, 9, end], [begin, 7, 8, 9, 10]]
    assert mask.tolist() == [[True, True, True, False, False], [True] * 5]


def test_a_camera_that_a_row_lacks_is_hidden(make: Callable[..., Any]) -> None:
    policy, batch = make(cameras=(TOP, WRIST))
    policy.eval()
    batch[f"{WRIST}_padding_mask"] = torch.tensor([True, False, True, True])
    other = {**batch, WRIST: batch[WRIST].clone()}
    other[WRIST][:2] = 1 - other[WRIST][:2]
    adapter = make_adapter(policy)
    first, second = adapter.trace(batch), adapter.trace(other)
    assert not torch.allclose(second.loss[0], first.loss[0])
    torch.testing.assert_close(second.loss[1:], first.loss[1:], rtol=0, atol=0)
    shown, changed = adapter.rollout(batch).action_hidden, adapter.rollout(other).action_hidden
    torch.testing.assert_close(changed[1:], shown[1:])
    assert not torch.allclose(changed[0], shown[0])


@pytest.mark.parametrize("with_views", [False, True])
def test_gradient_checkpointing_changes_nothing(make: Callable[..., Any], with_views: bool) -> None:
    policy, batch = make()
    belief = torch.randn(4, 2, 32)

    def run() -> tuple[PolicyTrace, dict[str, Tensor]]:
        views = make_adapter(policy).encode_views(batch) if with_views else None
        traced = make_adapter(policy).trace(batch, belief=belief, views=views)
        return traced, gradients(policy, traced)

    plain, expected = run()
    policy.model.gradient_checkpointing_enable()
    found, recomputed = run()
    for name, value in vars(plain).items():
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-5, atol=1e-6)
    assert recomputed.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_bf16_weights(make: Callable[..., Any]) -> None:
    policy, batch = make(dtype="bfloat16")
    adapter = make_adapter(policy)
    belief = torch.randn(4, 2, adapter.context_dim, requires_grad=True)
    found = adapter.trace(batch, belief=belief, views=adapter.encode_views(batch))
    assert {value.dtype for value in vars(found).values()} == {torch.float32, torch.bool}
    assert all(torch.isfinite(gradient).all() for gradient in gradients(policy, found).values())
    assert belief.grad is not None
    assert belief.grad.abs().sum() > 0
    del batch["action_is_pad"]
    own = policy.forward(copy.deepcopy(batch))[0]
    torch.testing.assert_close(adapter.trace(batch).loss.mean(), own, rtol=1e-3, atol=1e-3)
    assert torch.isfinite(adapter.rollout(batch, belief.detach()).action_hidden).all()


def test_peft_needs_targets_of_its_own(make: Callable[..., Any]) -> None:
    policy, batch = make()
    policy.config.pretrained_path = "a/checkpoint"
    expected = make_adapter(policy).trace(batch).loss.detach()
    with pytest.raises(ValueError, match="target_modules"):
        policy.wrap_with_peft(peft_cli_overrides={"method_type": "lora", "r": 2})
    wrapped = policy.wrap_with_peft(
        peft_cli_overrides={"method_type": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]}
    )
    torch.testing.assert_close(make_adapter(wrapped).trace(batch).loss, expected, rtol=1e-5, atol=1e-6)


def test_a_compiled_forward_is_refused(make: Callable[..., Any]) -> None:
    policy, _ = make()
    policy.config.compile_model = True
    with pytest.raises(ValueError, match="compiled pi0_fast forward: set compile_model=False"):
        make_adapter(policy)
