import torch
from builders import property_test
from hypothesis import given
from hypothesis import strategies as st

from ptr_hf.method import uniform


@property_test
@given(seed=st.integers(0, 2**63 - 1), columns=st.integers(1, 50), rows=st.lists(st.integers(0, 10**6), min_size=1))
def test_a_number_depends_on_seed_row_and_column_alone(seed, columns, rows):
    drawn = uniform(seed, torch.tensor(rows), columns)
    for place, row in enumerate(rows):
        assert torch.equal(drawn[place], uniform(seed, torch.tensor([row]), columns + 3)[0, :columns])
    assert drawn.min() >= 0
    assert drawn.max() < 1


def test_numbers_are_uniform_and_unrelated():
    drawn = uniform(5, torch.arange(400), 500)
    counts = torch.histc(drawn, 50, 0, 1)
    # chi-square with 49 degrees of freedom: beyond 100 once in a hundred thousand
    expected = drawn.numel() / 50
    assert ((counts - expected).square() / expected).sum() < 100
    for first, second in (
        (drawn[:, :-1], drawn[:, 1:]),
        (drawn[:-1], drawn[1:]),
        (drawn, uniform(6, torch.arange(400), 500)),
        (drawn, uniform(5 + 2**32, torch.arange(400), 500)),
    ):
        correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
        assert correlation.abs() < 5 / drawn.numel() ** 0.5
    assert drawn.unique().numel() > 0.9999 * drawn.numel()
