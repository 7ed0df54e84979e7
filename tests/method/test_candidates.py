import copy
from collections import deque

import pytest
import torch
from builders import HostReads, make_samples, property_test, seeded, unit_rows
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import nn

from ptr_hf.method import (
    CandidateQueue,
    GlobalRows,
    Samples,
    build_candidates,
    gather_samples,
    identification_logits,
)

COLUMNS = ("task", "source", "episode", "frame", "state")


def push(queue: CandidateQueue, samples: Samples) -> None:
    queue.push(samples.targets, samples.valid, **{name: getattr(samples, name) for name in COLUMNS})


def filled_queue(entries: int, capacity: int, **columns) -> CandidateQueue:
    queue = CandidateQueue(capacity, 8, 3)
    push(queue, make_samples(entries, seed=50, **columns))
    return queue


@property_test
@given(
    capacity=st.integers(1, 7),
    pushes=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 10_000)), min_size=1, max_size=8),
)
def test_queue_is_a_fifo_of_the_valid_rows(capacity, pushes):
    queue, model = CandidateQueue(capacity, 3, 2), deque(maxlen=capacity)
    for rows, seed in pushes:
        samples = make_samples(rows, 3, seed, 2, valid=torch.rand(rows, generator=seeded(seed)) < 0.6)
        push(queue, samples)
        for row in range(rows):
            if samples.valid[row]:
                model.append([samples.targets[row], *(getattr(samples, name)[row] for name in COLUMNS)])
        assert len(queue) == len(model) == queue.filled.sum()
        held = queue.ordered()
        for position, entry in enumerate(model):
            for name, value in zip(("targets", *COLUMNS), entry, strict=True):
                assert torch.equal(held[name][position], value)


def test_more_rows_than_fit_keep_the_newest():
    queue = CandidateQueue(4, 1)
    queue.push(torch.arange(11.0)[:, None])
    assert queue.ordered()["targets"].flatten().tolist() == [7, 8, 9, 10]
    queue.push(torch.tensor([[20.0]]))
    assert queue.ordered()["targets"].flatten().tolist() == [8, 9, 10, 20]
    assert queue.targets.shape == (4, 1)


def test_what_a_push_does_not_say_is_unknown():
    queue = CandidateQueue(4, 2, state_dim=3)
    queue.push(torch.ones(1, 2), task=[5])
    held = queue.ordered()
    assert (held["task"], held["source"], held["episode"], held["frame"]) == (5, -1, -1, -1)
    assert held["state"].isnan().all()


def test_queue_drops_rows_that_are_not_finite():
    queue = CandidateQueue(4, 2)
    queue.push(torch.tensor([[1.0, 0.0], [torch.nan, 0.0], [torch.inf, 0.0], [0.0, 1.0]]), frame=[1, 2, 3, 4])
    assert queue.ordered()["frame"].tolist() == [1, 4]


def test_queue_holds_constants_in_float32():
    queue = nn.ModuleList([CandidateQueue(4, 2, 1)]).to(torch.bfloat16)[0]
    queue.push(torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True))
    assert queue.targets.dtype == queue.state.dtype == torch.float32
    assert queue.frame.dtype == torch.int64
    assert not queue.targets.requires_grad


def test_queue_refuses_what_it_does_not_keep():
    queue = CandidateQueue(4, 2, 3)
    with pytest.raises(ValueError, match="colour"):
        queue.push(torch.ones(1, 2), colour=torch.ones(1))
    with pytest.raises(ValueError, match=r"state of shape \(1, 3\), not \(1, 2\)"):
        queue.push(torch.ones(1, 2), state=torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"targets of shape \(1, 2\), not \(1, 5\)"):
        queue.push(torch.ones(1, 5))
    with pytest.raises(ValueError, match="positive capacity"):
        CandidateQueue(0, 2)


def test_queue_round_trips_through_its_state_and_continues_alike():
    queue = CandidateQueue(5, 8, 3)
    push(queue, make_samples(7, seed=1))
    other = CandidateQueue(5, 8, 3)
    other.load_state_dict(queue.state_dict())
    for each in (queue, other):
        push(each, make_samples(3, seed=2))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in queue.state_dict().items())


def as_sets(samples, gathered, queue):
    """For each sample: the rows that must compete, and the queue slots that may be drawn."""
    required, allowed = [], []
    for i in range(len(samples.valid)):
        identity = int(samples.source[i]), int(samples.episode[i]), int(samples.frame[i])
        known = identity[1] >= 0 and identity[2] >= 0

        def same(other, row, identity=identity, known=known):
            return known and identity == (int(other.source[row]), int(other.episode[row]), int(other.frame[row]))

        rows = range(len(gathered.valid))
        required.append({j for j in rows if gathered.valid[j] and not same(gathered, j)} | {i})
        allowed.append({len(rows) + s for s in range(queue.capacity) if queue.filled[s] and not same(queue, s)})
    return required, allowed


@property_test
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 6),
    entries=st.integers(0, 14),
    capacity=st.integers(1, 10),
    drawn=st.integers(0, 12),
    ratio=st.floats(0.0, 1.0),
    key=st.sampled_from(["task", "state", "task_or_state"]),
)
def test_candidates_are_the_match_the_others_and_the_draws(seed, rows, entries, capacity, drawn, ratio, key):
    source = seeded(seed)

    def crowded(count):
        """Few episodes and frames, so that the same target turns up again and again; -1 is unknown."""
        columns = {name: torch.randint(-1, 2, (count,), generator=source) for name in COLUMNS[:-1]}
        return make_samples(count, seed=seed, valid=torch.rand(count, generator=source) < 0.7, **columns)

    samples, queue = crowded(rows), CandidateQueue(capacity, 8, 3)
    push(queue, crowded(entries))
    candidates = build_candidates(samples, samples, None, queue, drawn, torch.tensor(ratio), key, seed)
    required, allowed = as_sets(samples, samples, queue)
    for i in range(rows):
        columns = candidates.index[i][candidates.mask[i]].tolist()
        if not samples.valid[i]:
            assert columns == []
            continue
        assert columns[0] == candidates.index[i, 0] == i
        assert len(columns) == len(set(columns)) == candidates.count[i]
        batch, from_queue = {c for c in columns if c < rows}, {c for c in columns if c >= rows}
        assert batch == required[i]
        assert from_queue <= allowed[i]
        assert len(from_queue) == min(drawn, len(allowed[i]))
    assert not candidates.pool.requires_grad


def test_a_target_is_never_its_own_negative_in_batch_or_queue():
    twins = {name: torch.tensor([3, 3, 4]) for name in ("source", "episode", "frame")}
    samples = make_samples(3, **twins)
    queue = CandidateQueue(8, 8, 3)
    push(queue, samples)
    candidates = build_candidates(samples, samples, None, queue, 8)
    assert candidates.count.tolist() == [3, 3, 5]
    assert candidates.index[0][candidates.mask[0]].tolist() == [0, 2, 5]


@pytest.mark.parametrize("column", ["episode", "frame"])
def test_equal_unknowns_are_not_one_identity(column):
    samples = make_samples(3, **({"frame": torch.zeros(3, dtype=torch.int64)} | {column: torch.full((3,), -1)}))
    assert build_candidates(samples, samples, None, None).count.tolist() == [3, 3, 3]


def test_a_sample_without_target_competes_nowhere():
    samples = make_samples(4, valid=torch.tensor([True, False, True, True]))
    candidates = build_candidates(samples, samples, None, None)
    assert candidates.count.tolist() == [3, 0, 3, 3]
    assert not (candidates.mask & (candidates.index == 1)).any()


def test_alone_without_queue_there_is_only_the_match():
    samples = make_samples(1)
    candidates = build_candidates(samples, samples, None, None)
    assert candidates.index.tolist() == [[0]]
    assert candidates.mask.all()


def test_local_rows_among_gathered_ones():
    everyone, rows = make_samples(6), GlobalRows(2, 1, rank=1, ranks=3)
    own = rows.own()
    local = Samples(**{name: value[own] for name, value in vars(everyone).items()})
    candidates = build_candidates(local, everyone, rows, None)
    assert candidates.index[:, 0].tolist() == [1, 4]
    assert [sorted(row) for row in candidates.index.tolist()] == [list(range(6))] * 2
    assert torch.equal(candidates.targets[:, 0], local.targets)


@pytest.mark.parametrize("ranks", [2, 4, 64])
def test_a_row_has_the_same_candidates_on_whichever_rank_it_is(ranks):
    chunks, segments = 3, 64
    everyone = make_samples(chunks * segments, valid=torch.arange(chunks * segments) % 5 > 0)
    queue = filled_queue(100, 128)
    options = {"num_queue_negatives": 16, "hard_negative_ratio": 0.5, "seed": 3}
    alone = build_candidates(everyone, everyone, GlobalRows(chunks, segments), queue, **options)
    seen = []
    for rank in range(ranks):
        rows = GlobalRows(chunks, segments // ranks, rank, ranks)
        own = rows.own()
        local = Samples(**{name: value[own] for name, value in vars(everyone).items()})
        candidates = build_candidates(local, everyone, rows, queue, **options)
        assert torch.equal(candidates.index, alone.index[own])
        assert torch.equal(candidates.mask, alone.mask[own])
        seen += own.tolist()
    assert sorted(seen) == list(range(chunks * segments))


def test_one_process_gathers_itself():
    samples = make_samples(3)
    for name, value in vars(gather_samples(samples, GlobalRows(1, 3))).items():
        assert torch.equal(value, getattr(samples, name))


def test_uniform_draws_are_uniform():
    queue = filled_queue(20, 32)
    samples = make_samples(1000)
    candidates = build_candidates(samples, samples, None, queue, 5)
    slots = (candidates.index[:, 1000:] - 1000)[candidates.mask[:, 1000:]]
    counts = torch.bincount(slots, minlength=32)
    assert (counts[20:] == 0).all()
    # 250 expected of each, standard deviation about 14
    assert ((counts[:20] - 250).abs() < 70).all()


@pytest.mark.parametrize(("ratio", "expected"), [(0.0, None), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_the_hard_share_comes_from_the_own_task(ratio, expected):
    task = torch.zeros(200, dtype=torch.int64)
    task[:10] = 7
    queue = filled_queue(200, 256, task=task)
    samples = make_samples(50, task=torch.full((50,), 7))
    candidates = build_candidates(samples, samples, None, queue, 8, torch.tensor(ratio), "task", 1)
    similar = ((candidates.index[:, 50:] - 50) < 10).sum(dim=1).double()
    if expected is None:
        assert similar.mean() < 1.0
    else:
        assert (similar >= expected).all()
        # the rest is uniform, so similar entries turn up there at their own rate only
        assert similar.mean() < expected + 1.0


def test_the_rest_beside_the_hard_share_is_uniform_over_all_that_is_left():
    task = (torch.arange(200) < 100).long()
    queue, samples = filled_queue(200, 256, task=task), make_samples(400, task=torch.ones(400, dtype=torch.int64))
    candidates = build_candidates(samples, samples, None, queue, 8, 0.5, "task", 6)
    similar = ((candidates.index[:, 400:] - 400) < 100).sum(dim=1).double()
    # 4 hard ones, and 4 draws from 96 similar and 100 other entries; standard error 0.05
    assert similar.mean().item() == pytest.approx(4 + 4 * 96 / 196, abs=0.25)


def test_uniform_draws_fill_up_where_similar_entries_are_too_few():
    task = torch.zeros(100, dtype=torch.int64)
    task[:2] = 7
    queue, samples = filled_queue(100, 128, task=task), make_samples(20, task=torch.full((20,), 7))
    candidates = build_candidates(samples, samples, None, queue, 16, 1.0, "task", 2)
    drawn = candidates.index[:, 20:] - 20
    assert candidates.mask[:, 20:].all()
    assert ((drawn < 2).sum(dim=1) == 2).all()


def test_an_unknown_task_is_similar_to_nothing():
    unknown = torch.full((100,), -1)
    task = unknown.clone()
    task[:50] = 3
    queue = filled_queue(100, 128, task=task)
    samples = make_samples(40, task=unknown[:40])
    hard = build_candidates(samples, samples, None, queue, 8, 1.0, "task", 3).index
    uniform = build_candidates(samples, samples, None, queue, 8, 0.0, "task", 3).index
    assert torch.equal(hard, uniform)


def test_hard_negatives_by_state_are_the_nearest():
    state = torch.arange(100.0)[:, None].expand(100, 3)
    queue = filled_queue(100, 128, state=state)
    samples = make_samples(1, state=torch.full((1, 3), 60.2))
    candidates = build_candidates(samples, samples, None, queue, 5, 1.0, "state", 4)
    assert sorted((candidates.index[0, 1:] - 1).tolist()) == [58, 59, 60, 61, 62]
    either = build_candidates(samples, samples, None, queue, 5, 1.0, "task_or_state", 4)
    same_task = (queue.task[either.index[0, 1:] - 1] == samples.task[0]).tolist()
    near = [slot in range(58, 63) for slot in (either.index[0, 1:] - 1).tolist()]
    assert all(a or b for a, b in zip(same_task, near, strict=True))


def test_an_unknown_state_is_near_to_nothing_and_spoils_nothing():
    queue = filled_queue(10, 16)
    queue.push(unit_rows(3, 8, 9))
    samples = make_samples(2, state=torch.tensor([[torch.nan] * 3, [0.0] * 3]))
    candidates = build_candidates(samples, samples, None, queue, 4, 1.0, "state", 5)
    assert candidates.mask.all()
    assert ((candidates.index[1, 2:] - 2) < 10).all()


@property_test
@given(seed=st.integers(0, 10_000), temperature=st.floats(0.02, 1.0), clamp=st.sampled_from([5.0, 20.0]))
def test_logits_equal_the_reference_on_the_materialised_candidates(seed, temperature, clamp):
    samples = make_samples(5, seed=seed, targets=3 * unit_rows(5, 8, seed, torch.float64))
    candidates = build_candidates(samples, samples, None, filled_queue(12, 16), 6, 0.5, seed=seed)
    query = torch.randn(5, 8, generator=seeded(seed), dtype=torch.float64, requires_grad=True)
    logits = candidates.logits(query, temperature, clamp)
    reference = identification_logits(query, candidates.targets, torch.tensor(temperature, dtype=torch.float64), clamp)
    torch.testing.assert_close(logits, reference, rtol=0, atol=1e-9)
    upstream = torch.randn(logits.shape, generator=seeded(seed), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((value * upstream).sum(), query)[0] for value in (logits, reference))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_no_gradient_reaches_targets_or_queue():
    targets = unit_rows(4, 8).requires_grad_()
    samples, queue = make_samples(4, targets=targets), filled_queue(8, 8)
    candidates = build_candidates(samples, gather_samples(samples, GlobalRows(1, len(samples.valid))), None, queue, 4)
    candidates.logits(torch.randn(4, 8, requires_grad=True), 0.1).sum().backward()
    assert targets.grad is None


def test_a_target_that_is_not_finite_spoils_only_its_own_row():
    targets = unit_rows(4, 8)
    targets[1, 3] = torch.nan
    samples = make_samples(4, targets=targets)
    candidates = build_candidates(samples, samples, None, filled_queue(8, 8), 4)
    query = torch.randn(4, 8, requires_grad=True)
    logits = candidates.logits(query, 0.1)
    logits.masked_fill(~candidates.mask, 0.0).sum().backward()
    assert candidates.count.tolist() == [7, 0, 7, 7]
    assert logits.isfinite().all()
    assert query.grad.isfinite().all()


def test_autocast_does_not_blur_the_logits():
    samples = make_samples(4)
    candidates = build_candidates(samples, samples, None, None)
    query = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = candidates.logits(query, 0.03)
    assert torch.equal(logits, candidates.logits(query, 0.03))
    assert candidates.logits(query.bfloat16(), 0.03).dtype == torch.float32


def test_draws_repeat_with_the_seed_and_leave_the_global_stream_alone():
    samples, queue = make_samples(4), filled_queue(30, 32)
    before = torch.get_rng_state()
    first, again, other = (
        build_candidates(samples, samples, None, queue, 8, 0.5, seed=seed).index for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_refuses_unknown_keys_and_another_width():
    samples = make_samples(2, dim=8)
    with pytest.raises(ValueError, match="width 5, the batch's have 8"):
        build_candidates(samples, samples, None, CandidateQueue(4, 5, 3), 2)
    # while the tests run, the annotation refuses it first
    with pytest.raises((ValueError, TypeCheckError), match="colour"):
        build_candidates(samples, samples, None, None, hard_negative_key="colour")


def test_nothing_waits_for_the_device_and_nothing_large_is_built():
    rows, dim, drawn = 32, 64, 48
    queue = CandidateQueue(256, dim, 3)
    samples = make_samples(rows, dim, valid=torch.arange(rows) % 3 > 0)
    query = torch.randn(rows, dim, requires_grad=True)
    with HostReads() as seen:
        for _ in range(2):
            push(queue, samples)
            candidates = build_candidates(
                samples,
                gather_samples(samples, GlobalRows(1, len(samples.valid))),
                None,
                queue,
                drawn,
                torch.tensor(0.5),
            )
            candidates.logits(query, torch.tensor(0.1)).sum().backward()
        candidates_per_row = candidates.index.shape[1]
    with HostReads() as control:
        bool(candidates.mask.any())
    assert control.reads
    assert seen.reads == []
    assert seen.largest < rows * candidates_per_row * dim / 4


def test_queue_copies_deeply():
    queue = filled_queue(3, 8)
    other = copy.deepcopy(queue)
    push(queue, make_samples(2))
    assert len(other) == 3
