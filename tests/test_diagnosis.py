"""The diagnosis on data whose answer is known: what is identifiable, what stands out, and what it advises."""

import html
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from demonstrations import write_dataset
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.policies.factory import make_pre_post_processors
from small_policies import base_policy, stats_of, tensors_equal

from ptr_hf.diagnosis import (
    Diagnosis,
    Interval,
    advise,
    collect,
    diagnose,
    frozen_policy,
    identify_instructions,
    rows_of,
    two_folds,
)
from ptr_hf.diagnosis.diagnose import ACTIONS, INSTRUCTIONS, bootstrapped, spearman
from ptr_hf.diagnosis.rules import RULES
from ptr_hf.method.evidence import Evidence
from ptr_hf.report.diagnosis import sections, write_diagnosis

pytestmark = pytest.mark.full

EPISODES, CHUNKS, DIM = 48, 6, 8
FLIPPED, MISFILED = range(0, 5), range(5, 10)


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def meta(tmp_path_factory: pytest.TempPathFactory) -> LeRobotDatasetMetadata:
    """A real dataset of two tasks that take turns; what is seen in it comes from `world`."""
    root = write_dataset(tmp_path_factory.mktemp("datasets") / "arm", (4 * CHUNKS,) * EPISODES, cameras=())
    return LeRobotDatasetMetadata("tests/arm", root=root)


def world(
    bad: bool = True, moved: float = 1.0, guessable: float = 0.0, pull: float = 2.0, episodes: int = EPISODES
) -> Evidence:
    """Chunks whose action moves the scene by `moved`, whose task pulls it, and whose action can be guessed beforehand.

    With `bad`, the episodes of FLIPPED hold negated actions, those of MISFILED the other task.
    """
    rows = episodes * CHUNKS
    episode = torch.arange(rows) // CHUNKS
    task = episode % 2
    action, current = drawn(rows, 3, seed=1), drawn(rows, DIM, seed=2)
    current[:, :3] += guessable * action
    change = 0.1 * drawn(rows, DIM, seed=3)
    change[:, :3] += moved * action
    change[:, 3:5] += pull * torch.tensor([[1.0, 0.0], [0.0, 1.0]])[task]
    target = current + change if moved or pull else drawn(rows, DIM, seed=4)
    flipped = torch.isin(episode, torch.tensor(FLIPPED)) & bad
    misfiled = torch.isin(episode, torch.tensor(MISFILED)) & bad
    recorded = torch.where(flipped[:, None], -action, action)
    last = torch.arange(rows) % CHUNKS == CHUNKS - 1
    return Evidence(
        loss=drawn(rows, seed=5).square() + flipped,
        action=recorded[:, None],
        current=current,
        target=torch.where(last[:, None], 0.0, target),
        target_valid=~last,
        chunk_valid=torch.ones(rows, dtype=torch.bool),
        posterior=torch.zeros(rows),
        contrast=torch.zeros(rows),
        contrast_valid=torch.zeros(rows, dtype=torch.bool),
        motion=recorded.square().mean(dim=1),
        task=torch.where(misfiled, 1 - task, task),
        episode=episode,
        index=4 * torch.arange(rows),
    )


def diagnosed(evidence: Evidence, meta: LeRobotDatasetMetadata, **options: object) -> Diagnosis:
    return diagnose(evidence, meta, policy="a policy", trained=True, steps=120, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def uneven(meta: LeRobotDatasetMetadata) -> Diagnosis:
    truth = {i: "flipped" if i in FLIPPED else "misfiled" if i in MISFILED else "clean" for i in range(EPISODES)}
    return diagnosed(world(), meta, truth=truth)


class TestWhatIsFound:
    def test_both_labels_are_identifiable_and_the_future_counts(self, uneven: Diagnosis) -> None:
        assert set(uneven.identifiability) == {ACTIONS, INSTRUCTIONS}
        for of in uneven.identifiability.values():
            assert of.nats.low > 0.1
            assert of.gain.low > 0
            assert of.nats.low <= of.nats.value <= of.nats.high
            assert of.accuracy.low > of.chance
            assert of.null < 0
            assert of.episodes == EPISODES
        assert uneven.identifiability[INSTRUCTIONS].candidates == 2
        assert uneven.identifiability[INSTRUCTIONS].nats.value <= math.log(2) + 1e-6
        assert uneven.folds == (EPISODES // 2, EPISODES // 2)
        assert (uneven.chunks, uneven.with_future) == (EPISODES * CHUNKS, EPISODES * (CHUNKS - 1))

    def test_each_score_finds_its_own_kind(self, uneven: Diagnosis) -> None:
        for name, bad, fine in ((ACTIONS, FLIPPED, MISFILED), (INSTRUCTIONS, MISFILED, FLIPPED)):
            z = np.array([row.z[name] for row in uneven.episodes])
            assert z[list(bad)].max() < -2
            assert np.median(z[list(fine)]) > -2
        assert set(uneven.standing_out) == {*FLIPPED, *MISFILED}
        assert uneven.confirmed == len(FLIPPED) + len(MISFILED)
        assert uneven.detection["ptr_consequence"] > 0.9
        assert uneven.detection["ptr_consequence"] > uneven.detection["small_loss"]

    def test_weights_have_mean_1_and_shares_add_up(self, uneven: Diagnosis) -> None:
        for effect in uneven.effects:
            weights = np.array([row.weights[effect.preset] for row in uneven.episodes])
            assert weights.mean() == pytest.approx(1.0)
            assert effect.below_half == (weights < 0.5).mean()
            assert sum(share.weight_share for share in effect.shares) == pytest.approx(1.0)
            assert sum(share.chunk_share for share in effect.shares) == pytest.approx(1.0)
            # all episodes hold as many chunks
            assert effect.effective_share == pytest.approx(weights.sum() ** 2 / (EPISODES * (weights**2).sum()))

    def test_correlations_are_symmetric(self, uneven: Diagnosis) -> None:
        names = list(uneven.correlations)
        assert set(names) == {ACTIONS, INSTRUCTIONS, "loss", "motion", "length"}
        for a in names:
            for b in names:
                assert uneven.correlations[a][b] == pytest.approx(uneven.correlations[b][a], nan_ok=True)
        assert math.isnan(uneven.correlations["length"]["motion"]), "all episodes are as long"

    def test_the_seed_decides(self, uneven: Diagnosis, meta: LeRobotDatasetMetadata) -> None:
        torch.manual_seed(11)
        quick = [diagnose(world(), meta, policy="a policy", trained=True, steps=10, seed=seed) for seed in (3, 3, 4)]
        assert quick[0].identifiability == quick[1].identifiability
        assert quick[0].identifiability != quick[2].identifiability
        assert not quick[0].detection
        assert uneven.detection


class TestAdvice:
    def test_episodes_that_stand_out(self, uneven: Diagnosis) -> None:
        advice = advise(uneven)
        assert advice.verdict == "may help"
        assert any("preset=ptr_calibrated" in sentence for sentence in advice.sentences)

    def test_nothing_to_reject(self, meta: LeRobotDatasetMetadata) -> None:
        advice = advise(diagnosed(world(bad=False), meta))
        assert advice.verdict == "will not help"
        assert "Nothing stands out" in advice.headline
        assert any("preset=sft" in sentence for sentence in advice.sentences)

    def test_consequences_that_are_noise(self, meta: LeRobotDatasetMetadata) -> None:
        found = diagnosed(world(moved=0.0, pull=0.0), meta)
        advice = advise(found)
        assert all(of.nats.low < 0.1 for of in found.identifiability.values())
        assert (advice.verdict, advice.headline) == (
            "will not help",
            "Consequences are not identifiable on this data",
        )

    def test_actions_that_are_guessed_beforehand(self, meta: LeRobotDatasetMetadata) -> None:
        found = diagnosed(world(bad=False, moved=0.0, pull=0.0, guessable=3.0), meta)
        assert found.identifiability[ACTIONS].nats.low > 0.1
        advice = advise(found)
        assert advice.verdict == "will not help"
        assert advice.headline == "What followed adds nothing to the verdicts"

    def test_too_few_episodes(self, meta: LeRobotDatasetMetadata) -> None:
        advice = advise(diagnosed(world(episodes=14), meta))
        assert (advice.verdict, advice.headline) == ("unclear", "Too few episodes to tell")

    def test_weights_that_follow_motion(self, uneven: Diagnosis) -> None:
        effects = tuple(replace(effect, motion=-0.8) for effect in uneven.effects)
        advice = advise(replace(uneven, effects=effects))
        assert (advice.verdict, advice.headline) == ("unclear", "The weights would follow motion")

    def test_a_task_at_risk(self, uneven: Diagnosis) -> None:
        effects = {effect.preset: effect for effect in uneven.effects}
        ours = effects["ptr_consequence"]
        effects["ptr_consequence"] = replace(ours, shares=(replace(ours.shares[0], weight_share=0.1), *ours.shares[1:]))
        advice = advise(replace(uneven, effects=tuple(effects.values())))
        # misfiled episodes make one task larger than the other
        assert any("would keep 10% of the weight for 52%" in sentence for sentence in advice.sentences)

    def test_an_untrained_policys_loss_judges_nothing(self, meta: LeRobotDatasetMetadata) -> None:
        found = diagnose(world(), meta, policy="a policy", trained=False, steps=20)
        assert [effect.preset for effect in found.effects] == ["ptr_consequence", "ptr_calibrated"]
        assert set(found.episodes[0].z) == {ACTIONS, INSTRUCTIONS}
        assert "loss" in found.correlations

    def test_an_untrained_policy_is_named(self, uneven: Diagnosis) -> None:
        told = [advise(replace(uneven, trained=trained)) for trained in (True, False)]
        assert [advice.verdict for advice in told] == ["may help", "may help"]
        assert "untrained" not in " ".join(told[0].sentences)
        assert "Give --policy_path" in told[1].sentences[-1]
        nothing = replace(uneven, trained=False, standing_out=())
        assert advise(nothing).verdict == "unclear", "other features might see more"


class TestCrossFitting:
    def test_folds_halve_every_task_and_keep_episodes_whole(self) -> None:
        evidence = world(bad=False)
        fold = two_folds(evidence.task, evidence.episode)
        for number in range(EPISODES):
            assert len(fold[evidence.episode == number].unique()) == 1
        for task in (0, 1):
            assert fold[evidence.task == task].float().mean() == 0.5
        assert not torch.equal(fold, two_folds(evidence.task, evidence.episode, seed=1))

    def test_a_head_never_learns_from_what_it_judges(self) -> None:
        evidence = world(bad=False)
        fold = two_folds(evidence.task, evidence.episode)
        changed = (fold == 0) & (evidence.episode < EPISODES // 2)
        other = replace(evidence, task=torch.where(changed, 1 - evidence.task, evidence.task))
        before, after = (identify_instructions(e, fold, 2, steps=30).value for e in (evidence, other))
        same = (fold == 0) & ~changed & evidence.target_valid
        assert torch.equal(before[same], after[same])
        taught = (fold == 1) & evidence.target_valid
        assert not torch.allclose(before[taught], after[taught])

    def test_chunks_without_a_future_have_no_verdict(self) -> None:
        evidence = world(bad=False)
        fold = two_folds(evidence.task, evidence.episode)
        value = identify_instructions(evidence, fold, 2, steps=5).value
        assert torch.equal(value.isfinite(), evidence.target_valid)


class TestStatistics:
    def test_an_interval_holds_the_mean(self) -> None:
        values = np.random.default_rng(0).normal(3.0, 1.0, 400)
        found = bootstrapped(values, np.mean)
        assert found.value == pytest.approx(values.mean())
        assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
        assert found.low < 3.0 < found.high

    def test_nothing_known(self) -> None:
        assert all(math.isnan(value) for value in bootstrapped(np.array([]), np.median))
        assert math.isnan(spearman(np.ones(5), np.arange(5.0)))
        assert spearman(np.array([1.0, 2.0, 3.0, np.nan]), np.array([2.0, 4.0, 9.0, 0.0])) == pytest.approx(1.0)


class TestPage:
    def test_json_and_page_say_what_was_found(self, uneven: Diagnosis, tmp_path: Path) -> None:
        advice = advise(uneven)
        page = write_diagnosis(uneven, advice, tmp_path).read_text()
        assert advice.headline in page
        assert all(rule in html.unescape(page) for rule, _ in RULES)
        assert page.count("data:image/png") == 2
        content = json.loads((tmp_path / "diagnosis.json").read_text(), parse_constant=pytest.fail)
        assert content["advice"]["verdict"] == advice.verdict
        assert len(content["episodes"]) == EPISODES
        assert content["correlations"]["length"]["motion"] is None
        assert Interval(*content["identifiability"][ACTIONS]["nats"]) == uneven.identifiability[ACTIONS].nats
        assert (tmp_path / "figures" / "weights.png").read_bytes()[:4] == b"\x89PNG"

    def test_the_lowest_episodes_come_first(self, uneven: Diagnosis) -> None:
        lowest = next(s for s in sections(uneven, advise(uneven)) if "lie lowest" in s.title).blocks[0]
        assert {int(row[0].split(":")[0]) for row in lowest.rows} == {*FLIPPED, *MISFILED}


class TestCollecting:
    def evidence(self, points: Path, **options: object) -> Evidence:
        policy = frozen_policy(base_policy("smolvla", points), segment_length=2)
        preprocessor, _ = make_pre_post_processors(policy.config.base_config, dataset_stats=stats_of(points))
        return collect(policy, points, preprocessor, progress=False, **options)  # type: ignore[arg-type]

    def test_every_chunk_once_and_nothing_learns(self, points: Path) -> None:
        base = base_policy("smolvla", points)
        evidence = self.evidence(points)
        expected = [start + at for start, n in ((0, 30), (30, 24), (54, 40), (94, 18)) for at in range(0, n, 4)]
        assert evidence.index.tolist() == expected
        assert evidence.chunk_valid.all()
        assert not evidence.target_valid.all()
        assert evidence.current.std() > 0
        assert torch.isfinite(evidence.loss).all()
        # the consequence of a chunk is what the next one starts from
        inside = (evidence.episode[:-1] == evidence.episode[1:]) & evidence.target_valid[:-1]
        torch.testing.assert_close(evidence.target[:-1][inside], evidence.current[1:][inside], rtol=1e-4, atol=1e-5)
        policy = frozen_policy(base, segment_length=2)
        assert not any(parameter.requires_grad for parameter in policy.base.parameters())
        assert policy.target_encoder.shared
        assert tensors_equal(policy.base.state_dict(), base_policy("smolvla", points).state_dict())

    def test_a_large_dataset_is_read_in_part(self, points: Path) -> None:
        evidence = self.evidence(points, max_segments=4)
        assert evidence.index.tolist() == [0, 4, 38, 42, 70, 74, 110], "the last segment ends with its episode"
        kept = rows_of(evidence, evidence.episode == evidence.episode[0])
        assert set(kept.episode.tolist()) == {int(evidence.episode[0])}
