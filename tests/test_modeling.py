"""`PTRPolicy`: plain post-training bit for bit, one pass where one is enough, and a belief that is carried."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.policies.act.modeling_act import ACTPolicy
from peft import LoraConfig, get_peft_model
from small_policies import (
    CHUNK,
    FAMILIES,
    base_policy,
    frames_of,
    gradients,
    observation,
    ptr_policy,
    settings_id,
    tensors_equal,
    train_batch,
)
from torch import Tensor, nn

from ptr_hf import PTRConfig, PTRPolicy
from ptr_hf.data.segments import FUTURE_PAD, split_segment
from ptr_hf.method import consequence_embedding, masked_mean

ANCHORS = [0, 12, 33, 60]
ONE_FAMILY = ("smolvla", pytest.param("act", marks=pytest.mark.full))
"""For what does not depend on the family: the default run takes one."""
TOWER_ENTRY = {"act": "model.backbone.conv1", "smolvla": "model.vlm_with_expert.vlm.model.vision_model.embeddings"}
LORA = {"act": r".*(action_head|linear1)", "smolvla": r".*(action_in_proj|action_out_proj|lm_expert.*[qv]_proj)"}


def policy_and_batch(points: Path, family: str, **settings: Any) -> tuple[PTRPolicy, dict[str, Any]]:
    settings = {"segment_length": 3, "num_belief_tokens": 0, "scorer_warmup_steps": 0, **settings}
    policy = ptr_policy(family, points, **settings)
    return policy, train_batch(policy, points, ANCHORS)


def frozen_policy(points: Path, family: str, **settings: Any) -> PTRPolicy:
    """A policy whose vision tower does not train, so that the consequence encoder shares it."""
    base = base_policy(family, points, **({"freeze_vision_encoder": True} if family == "smolvla" else {}))
    if family == "act":
        base.model.backbone.requires_grad_(False)
    settings = {"device": "cpu", "preset": "ptr", "segment_length": 3, "num_belief_tokens": 0, **settings}
    policy = PTRPolicy(PTRConfig(**settings), base_policy=base).train()
    assert policy.target_encoder.shared
    return policy


@contextmanager
def rows_seen(module: nn.Module) -> Iterator[list[int]]:
    """Rows of each call of a module."""
    rows: list[int] = []
    handle = module.register_forward_hook(lambda _module, _args, output: rows.append(len(output)))
    yield rows
    handle.remove()


def step(policy: PTRPolicy, batch: dict[str, Any], optimizer: torch.optim.Optimizer | None = None) -> float:
    loss, _ = policy(batch)
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    policy.update()
    return loss.item()


class TestPlainPostTraining:
    """The control every claim stands on: alpha = 0 is LeRobot's own fine-tuning."""

    @pytest.mark.parametrize(
        ("family", "settings"),
        [pytest.param("act", {"use_vae": True}, marks=pytest.mark.full), ("smolvla", {})],
        ids=settings_id,
    )
    def test_sft_equals_the_base_policy_alone_bit_for_bit(
        self, points: Path, family: str, settings: dict[str, Any]
    ) -> None:
        ours, alone = (
            ptr_policy(family, points, settings, preset="sft"),
            base_policy(family, points, **settings).train(),
        )
        batches = [train_batch(ours, points, [n, 31 + n, 55 + n]) for n in range(5)]
        losses: list[list[float]] = []
        for module, groups in ((ours, ours.get_optim_params()), (alone, alone.get_optim_params())):
            optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.01)
            losses.append([])
            for n in range(20):
                torch.manual_seed(n)
                loss, _ = module(batches[n % 5])
                loss.backward()
                nn.utils.clip_grad_norm_(module.parameters(), 10.0)
                optimizer.step()
                optimizer.zero_grad()
                if module is ours:
                    ours.update()
                losses[-1].append(loss.item())
        assert losses[0] == losses[1]
        assert losses[0][-1] != losses[0][0]
        assert tensors_equal(ours.base.state_dict(), alone.state_dict())
        assert not ours.side_state_dict()

    @pytest.mark.parametrize("family", ONE_FAMILY)
    def test_alpha_0_beside_a_detached_scorer_gives_the_gradients_of_sft(self, points: Path, family: str) -> None:
        policy, batch = policy_and_batch(points, family, alpha=0.0, detach_scorer_inputs=True)
        segment = split_segment(batch, policy.config.layout)
        assert not segment.chunks["action_is_pad"].any()
        torch.manual_seed(0)
        policy(batch)[0].backward()
        alone = base_policy(family, points).train()
        torch.manual_seed(0)
        loss, _ = alone(segment.chunks)
        loss.backward()
        ours, expected = gradients(policy.base), gradients(alone)
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6, msg=name)
        assert any(value.abs().max() > 0 for value in gradients(policy.objective.scorer).values())

    def test_scoring_leaves_the_random_stream_to_the_policy(self, points: Path) -> None:
        policy, batch = policy_and_batch(points, "smolvla")
        step(policy, batch)
        torch.manual_seed(0)
        policy.compute(batch)
        after = torch.rand(1)
        torch.manual_seed(0)
        policy.adapter.trace(split_segment(batch, policy.config.layout).chunks)
        assert torch.equal(torch.rand(1), after)


class TestOnePass:
    @pytest.mark.parametrize("belief", [0, 2])
    @pytest.mark.parametrize("family", ONE_FAMILY)
    def test_the_tower_sees_every_view_once(self, points: Path, family: str, belief: int) -> None:
        policy, batch = policy_and_batch(points, family, num_belief_tokens=belief)
        own = policy.base.get_submodule(TOWER_ENTRY[family])
        average = policy.target_encoder.tower.get_submodule(TOWER_ENTRY[family].rsplit(".", 1)[1])
        with rows_seen(own) as policy_rows, rows_seen(average) as target_rows:
            policy.compute(batch)
        assert (policy_rows, target_rows) == ([12], [12])

    @pytest.mark.parametrize(("offset", "unseen"), [(CHUNK, 4), (2 * CHUNK, 8), (CHUNK + 1, 12)])
    @pytest.mark.parametrize("family", ONE_FAMILY)
    def test_a_frozen_tower_encodes_only_unseen_views_for_targets(
        self, points: Path, family: str, offset: int, unseen: int
    ) -> None:
        policy = frozen_policy(points, family, consequence_offset=offset)
        with rows_seen(policy.base.get_submodule(TOWER_ENTRY[family])) as rows:
            policy.compute(train_batch(policy, points, ANCHORS))
        assert rows == [12, unseen]

    @pytest.mark.parametrize("family", FAMILIES)
    def test_reused_features_are_the_targets_encoded_anew(self, points: Path, family: str) -> None:
        policy = frozen_policy(points, family)
        segment = split_segment(train_batch(policy, points, ANCHORS), policy.config.layout)
        reused, _ = policy._targets(segment, policy._encode_views(segment))
        tower, key = policy.adapter.build_tower(policy.target_layer), "observation.image"
        anew = [
            consequence_embedding([policy.adapter.encode_image(tower, key, segment.futures[key][future])])
            for future in segment.future_index
        ]
        torch.testing.assert_close(reused, torch.cat(anew), rtol=1e-4, atol=1e-5)
        assert (reused[0] - reused[-1]).abs().max() > 1e-3

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_segment_in_one_batch_equals_chunk_by_chunk(
        self, points: Path, family: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        policy, batch = policy_and_batch(points, family)
        policy.eval()
        segment = split_segment(batch, policy.config.layout)
        if family == "smolvla":
            use_noise_table(monkeypatch, policy.base.model, rows=12)
        together = policy._trace(segment, policy._encode_views(segment))
        if family == "smolvla":
            use_noise_table(monkeypatch, policy.base.model, rows=12)
        apart = [policy.adapter.trace(segment.chunk(t)) for t in range(3)]
        for field, pieces in {
            "loss": [trace.loss for trace in apart],
            "context": [masked_mean(trace.context, trace.context_mask) for trace in apart],
            "action": [masked_mean(trace.action_tokens, trace.action_mask) for trace in apart],
        }.items():
            torch.testing.assert_close(together[field], torch.cat(pieces), rtol=1e-4, atol=1e-5)
        assert together["loss"].std() > 1e-3


def use_noise_table(monkeypatch: pytest.MonkeyPatch, model: Any, rows: int) -> None:
    """Give SmolVLA's flow matching the same noise and time for a row whatever the batch it stands in."""
    generator = torch.Generator().manual_seed(0)
    shape = (rows, model.config.chunk_size, model.config.max_action_dim)
    noise, time = torch.randn(shape, generator=generator), torch.rand(rows, generator=generator)
    served = {"noise": 0, "time": 0}

    def serve(name: str, table: Tensor, size: int) -> Tensor:
        served[name] += size
        return table[served[name] - size : served[name]]

    monkeypatch.setattr(model, "sample_noise", lambda shape, device: serve("noise", noise, shape[0]))
    monkeypatch.setattr(model, "sample_time", lambda size, device: serve("time", time, size))


class TestBelief:
    @pytest.fixture
    def carried(self, points: Path) -> tuple[PTRPolicy, dict[str, Any]]:
        policy, batch = policy_and_batch(points, "act", segment_length=2, num_belief_tokens=3)
        return policy.eval(), batch

    def test_the_next_chunk_reads_what_the_last_one_left(self, carried: tuple[PTRPolicy, dict[str, Any]]) -> None:
        policy, batch = carried
        segment, memory = split_segment(batch, policy.config.layout), policy.belief.memory
        output = policy.compute(batch)
        tokens = memory.start(4)
        for t in range(2):
            trace = policy.adapter.trace(segment.chunk(t), belief=memory.to_backbone(tokens))
            torch.testing.assert_close(output.loss[segment.rows(t)], trace.loss, rtol=1e-5, atol=1e-6)
            if t == 1:
                first = policy.adapter.trace(segment.chunk(t), belief=memory.to_backbone(memory.start(4)))
                assert (trace.loss - first.loss).abs().min() > 1e-6
            tokens = policy.belief.tokenizer(trace.action_hidden, trace.action_tokens, trace.action_mask).tokens

    def test_no_gradient_runs_from_chunk_to_chunk(self, carried: tuple[PTRPolicy, dict[str, Any]]) -> None:
        policy, batch = carried
        memory, tokenizer = policy.belief.memory, policy.belief.tokenizer
        reached = {}
        for t in range(2):
            policy.zero_grad()
            policy.compute(batch).loss[4 * t : 4 * t + 4].sum().backward()
            reached[t] = [
                parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
                for parameter in (memory.initial, memory.inject.weight, tokenizer.fuse.weight, tokenizer.assign.weight)
            ]
        assert reached == {0: [True, True, False, False], 1: [False, True, False, False]}

    def test_the_tokenizer_learns_from_its_own_terms(self, carried: tuple[PTRPolicy, dict[str, Any]]) -> None:
        policy, batch = carried
        _, metrics = policy(batch)
        assert metrics["belief_entropy"] > 0
        assert metrics["belief_diversity"] > 0
        output = policy.compute(batch)
        policy.zero_grad()
        policy.objective.combine(output)["tokenizer"].backward()
        assert policy.belief.tokenizer.assign.weight.grad.abs().max() > 0

    @pytest.mark.parametrize("family", FAMILIES)
    def test_it_changes_the_sampled_chunk_until_reset(self, points: Path, family: str) -> None:
        policy = ptr_policy(family, points, num_belief_tokens=3)
        view = observation(policy, points, [3, 50])

        def sample() -> Tensor:
            torch.manual_seed(0)
            return policy.predict_action_chunk(view)

        first, second = sample(), sample()
        assert first.shape == (2, CHUNK, 2)
        assert (first - second).abs().amax(dim=(1, 2)).min() > 1e-6, "the belief of both robots moved"
        policy.reset()
        assert torch.equal(sample(), first)

    def test_robots_of_a_batch_do_not_share_it(self, points: Path) -> None:
        policy = ptr_policy("act", points, num_belief_tokens=3)
        frames = [[3, 50], [7, 60], [11, 70]]
        together = [policy.predict_action_chunk(observation(policy, points, pair)) for pair in frames]
        for robot in range(2):
            policy.reset()
            alone = [policy.predict_action_chunk(observation(policy, points, [pair[robot]])) for pair in frames]
            for batched, single in zip(together, alone, strict=True):
                torch.testing.assert_close(batched[robot], single[0], rtol=1e-4, atol=1e-5)

    def test_another_batch_size_without_reset_is_refused(self, points: Path) -> None:
        policy = ptr_policy("act", points, num_belief_tokens=3)
        policy.predict_action_chunk(observation(policy, points, [3, 50]))
        with pytest.raises(ValueError, match=r"has 2 rows but the batch has 3; call reset\(\)"):
            policy.predict_action_chunk(observation(policy, points, [3, 50, 60]))
        policy.reset()
        assert len(policy.predict_action_chunk(observation(policy, points, [3, 50, 60]))) == 3

    @pytest.mark.parametrize("tokens", [0, 3])
    def test_select_action_plays_a_chunk_before_the_next(self, points: Path, tokens: int) -> None:
        policy = ptr_policy("act", points, {"n_action_steps": 3}, num_belief_tokens=tokens)
        view = observation(policy, points, [3])
        with rows_seen(policy.base.model.action_head) as predicted:
            actions = [policy.select_action(view) for _ in range(4)]
        # Without a VAE the adapter reads the action head's columns once more for each belief update.
        assert len(predicted) == (2 if tokens == 0 else 6)
        policy.reset()
        first = policy.predict_action_chunk(view)
        assert [action.shape for action in actions] == [(1, 2)] * 4
        assert torch.equal(torch.stack(actions[:3], dim=1), first[:, :3])
        second = policy.predict_action_chunk(view)
        assert torch.equal(actions[3], second[:, 0])
        assert torch.equal(first, second) == (tokens == 0)


class TestUpdate:
    def test_the_average_moves_towards_the_policy(self, points: Path) -> None:
        policy, batch = policy_and_batch(points, "smolvla", ema_decay=0.9)
        before = copy.deepcopy(policy.target_encoder.tower.state_dict())
        step(policy, batch, torch.optim.SGD(policy.parameters(), lr=1.0))
        own = dict(policy.adapter.tower_parameters(policy.target_layer))
        moved = 0
        for name, value in policy.target_encoder.tower.state_dict().items():
            torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * own[name], rtol=1e-5, atol=1e-6)
            moved += not torch.equal(value, before[name])
        assert moved > 10

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_shared_tower_stays(self, points: Path, family: str) -> None:
        policy = frozen_policy(points, family)
        batch = train_batch(policy, points, ANCHORS)
        tower = policy.base.get_submodule(TOWER_ENTRY[family])
        before = copy.deepcopy(tower.state_dict())
        step(policy, batch, torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=1.0))
        assert tensors_equal(tower.state_dict(), before)
        assert not [name for name in policy.side_state_dict() if name.startswith("target_encoder")]

    def test_the_queue_takes_recorded_consequences_alone(self, points: Path) -> None:
        policy, _ = policy_and_batch(points, "act")
        batch = train_batch(policy, points, [0, 22, 29, 48])
        segment = split_segment(batch, policy.config.layout)
        step(policy, batch)
        kept = policy.objective.queue.ordered()
        expected = segment.target_index[segment.future_valid]
        assert 0 < len(expected) < 12
        assert kept["frame"].tolist() == expected.tolist()
        assert kept["episode"].tolist() == segment.episode[segment.future_valid].tolist()
        assert kept["task"].tolist() == segment.task[segment.future_valid].tolist()
        states = torch.stack([frames_of(points)[frame]["observation.state"] for frame in expected - CHUNK])
        assert len(states) == len(kept["state"])
        torch.testing.assert_close(kept["targets"].norm(dim=1), torch.ones(len(expected)))

    def test_evaluation_leaves_no_trace(self, points: Path) -> None:
        policy, batch = policy_and_batch(points, "act")
        before = copy.deepcopy(policy.state_dict())
        policy.eval()
        with torch.no_grad():
            policy(batch)
        assert tensors_equal(policy.state_dict(), before)

    def test_the_controller_acts_at_its_interval(self, points: Path) -> None:
        policy, batch = policy_and_batch(points, "act", controller_interval=3)
        updates = []
        for _ in range(7):
            step(policy, batch)
            updates.append(int(policy.objective.controller.updates))
        assert updates == [0, 0, 1, 1, 1, 2, 2]
        assert policy.objective.step == 7

    def test_weights_wait_for_the_warmup(self, points: Path) -> None:
        policy, batch = policy_and_batch(points, "act", scorer_warmup_steps=2)
        weights = []
        for _ in range(3):
            weights.append(policy.compute(batch).weight)
            policy.update()
        assert torch.equal(torch.stack(weights[:2]), torch.ones(2, 12))
        assert not torch.equal(weights[2], torch.ones(12))

    def test_a_share_of_the_run_sets_the_warmup(self, points: Path) -> None:
        policy = ptr_policy("act", points, scorer_warmup_steps=0.05)
        assert policy.objective.warmup_steps == 3000, "the paper's count while the run's length is unknown"
        policy.set_run_length(200)
        assert policy.objective.warmup_steps == 10
        saved = PTRPolicy(copy.copy(policy.config), base_policy=policy.base)
        assert saved.objective.warmup_steps == 10


class TestForward:
    @pytest.mark.parametrize("settings", [{}, {"num_belief_tokens": 2}], ids=settings_id)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_it_returns_a_loss_and_plain_numbers(self, points: Path, family: str, settings: dict[str, Any]) -> None:
        policy, batch = policy_and_batch(points, family, **settings)
        loss, metrics = policy(batch)
        assert loss.shape == ()
        assert loss.requires_grad
        assert {"loss", "loss_action", "loss_identification", "loss_ranking", "accuracy", "score"} <= metrics.keys()
        assert all(type(value) is float for value in metrics.values())
        json.dumps(metrics, allow_nan=False)
        assert metrics["loss"] == pytest.approx(loss.item())
        config = policy.config
        whole = metrics["loss_action"] + metrics["loss_tokenizer"]
        whole += config.identification_coef * metrics["loss_identification"]
        whole += config.ranking_coef * metrics["loss_ranking"]
        assert metrics["loss"] == pytest.approx(whole, rel=1e-5)

    def test_reduction_none_gives_the_chunks(self, points: Path) -> None:
        policy, batch = policy_and_batch(points, "act")
        output, metrics = policy(batch, reduction="none")
        assert output.loss.shape == output.weight.shape == (12,)
        assert metrics == {}

    @pytest.mark.parametrize("family", FAMILIES)
    def test_weights_are_constants(self, points: Path, family: str) -> None:
        policy, batch = policy_and_batch(points, family)
        output = policy.compute(batch)
        assert not output.weight.requires_grad
        assert not output.score.requires_grad
        assert output.loss.requires_grad
        assert output.weight.std() > 0

    @pytest.mark.parametrize("term", ["identification", "ranking"])
    @pytest.mark.parametrize("detached", [False, True])
    @pytest.mark.parametrize("family", ONE_FAMILY)
    def test_scorer_losses_reach_the_policy_unless_detached(
        self, points: Path, family: str, detached: bool, term: str
    ) -> None:
        policy, batch = policy_and_batch(points, family, detach_scorer_inputs=detached)
        policy.objective.combine(policy.compute(batch))[term].backward()
        reached = [value.abs().max() > 0 for value in gradients(policy.base).values()]
        assert any(reached) is not detached
        assert gradients(policy.objective.scorer)

    def test_targets_and_their_encoder_get_no_gradient(self, points: Path) -> None:
        policy, batch = policy_and_batch(points, "smolvla")
        policy(batch)[0].backward()
        assert not gradients(policy.target_encoder)

    @pytest.mark.parametrize("family", ONE_FAMILY)
    def test_a_broken_sample_does_not_change_the_others(self, points: Path, family: str) -> None:
        policy, batch = policy_and_batch(points, family)
        step(policy, batch)
        policy.eval()
        broken = {**batch, "observation.state": batch["observation.state"].clone()}
        broken["observation.state"][1::4] = torch.nan
        # as if it had no future, which makes it nobody's candidate either
        absent = {**batch, FUTURE_PAD: batch[FUTURE_PAD].clone()}
        absent[FUTURE_PAD][1::4] = True
        outputs = []
        for inputs in (absent, broken, batch):
            torch.manual_seed(0)
            outputs.append(policy.compute(inputs))
        others = torch.arange(12) % 4 != 1
        torch.testing.assert_close(outputs[1].weight[others], outputs[0].weight[others], rtol=1e-4, atol=1e-5)
        assert torch.equal(outputs[1].weight[~others], torch.ones(3))
        assert not torch.equal(outputs[2].weight[~others], torch.ones(3))
        assert policy.objective.combine(outputs[1])["loss"].isfinite()


class TestWrapping:
    @pytest.mark.parametrize("settings", [{}, {"num_belief_tokens": 2}, {"preset": "sft"}], ids=settings_id)
    @pytest.mark.parametrize("family", ONE_FAMILY)
    def test_a_peft_model_trains_its_adapter(self, points: Path, family: str, settings: dict[str, Any]) -> None:
        peft = get_peft_model(base_policy(family, points), LoraConfig(r=2, target_modules=LORA[family]))
        own = {"preset": "ptr", "segment_length": 2, "num_belief_tokens": 0, "scorer_warmup_steps": 0}
        config = {"device": "cpu", **({} if "preset" in settings else own), **settings}
        policy = PTRPolicy(PTRConfig(**config), base_policy=peft).train()
        batch = train_batch(policy, points, ANCHORS)
        before = copy.deepcopy(policy.state_dict())
        parameters = [p for group in policy.get_optim_params() for p in group["params"]]
        step(policy, batch, torch.optim.SGD(parameters, lr=1.0))
        changed = {
            name for name, value in policy.base.state_dict().items() if not torch.equal(value, before[f"base.{name}"])
        }
        assert changed
        assert all("lora_" in name for name in changed)
        if policy.objective is not None:
            assert policy.target_encoder.shared, "LoRA leaves the vision tower as it is"

    @pytest.mark.parametrize("make", [ptr_policy, frozen_policy], ids=["averaged", "shared"])
    @pytest.mark.parametrize("family", ONE_FAMILY)
    def test_a_deep_copy_is_independent(self, points: Path, family: str, make: Callable[..., PTRPolicy]) -> None:
        settings = {"segment_length": 2, "num_belief_tokens": 2, "scorer_warmup_steps": 0}
        policy = make(points, family, **settings) if make is frozen_policy else make(family, points, **settings)
        batch = train_batch(policy, points, ANCHORS)
        policy(batch)
        copied = copy.deepcopy(policy)
        losses = []
        for module in (policy, copied):
            torch.manual_seed(0)
            losses.append(module(batch)[0])
        assert torch.equal(losses[0], losses[1])
        before = copy.deepcopy(policy.state_dict())
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.add_(1.0)
        step(copied, batch)
        assert tensors_equal(policy.state_dict(), before)
        if copied._shared_tower:
            own = {id(value) for value in copied.base.parameters()}
            assert {id(value) for value in copied._shared_tower[0].parameters()} <= own


class TestConstruction:
    def test_an_unsupported_policy_is_refused_before_it_is_built(self) -> None:
        with pytest.raises(ValueError, match=r"does not support the policy type 'tdmpc'.*Supported: act, diffusion"):
            PTRPolicy(PTRConfig(device="cpu", base={"type": "tdmpc"}))

    def test_another_chunk_size_than_the_base_policy_has_is_refused(self, points: Path) -> None:
        with pytest.raises(ValueError, match=r"chunk_size=8 was asked for, but the base policy predicts chunks of 4"):
            ptr_policy("act", points, chunk_size=8)

    def test_a_layer_the_tower_lacks_is_refused(self, points: Path) -> None:
        with pytest.raises(ValueError, match=r"target_layer must be between 1 and 4, not 9"):
            ptr_policy("act", points, target_layer=9)

    def test_without_a_scorer_there_is_nothing_to_compute(self, points: Path) -> None:
        policy = ptr_policy("act", points, preset="sft")
        with pytest.raises(ValueError, match=r"no scorer.*preset='sft'"):
            policy.compute(train_batch(policy, points, [0]))

    def test_a_base_from_its_configuration(self, points: Path) -> None:
        reference = base_policy("act", points).config
        base = {
            "type": "act",
            "chunk_size": 4,
            "n_action_steps": 4,
            "dim_model": 32,
            "pretrained_backbone_weights": None,
        }
        config = PTRConfig(
            device="cpu",
            preset="ptr",
            base=base,
            input_features=reference.input_features,
            output_features=reference.output_features,
        )
        policy = PTRPolicy(config)
        assert isinstance(policy.base, ACTPolicy)
        assert policy.base.config.input_features == reference.input_features
        assert policy.config.layout.action_steps == (0, 1, 2, 3)
