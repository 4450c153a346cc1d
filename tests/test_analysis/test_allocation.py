"""Widths within a budget."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gplq_mm.analysis import BudgetError
from gplq_mm.analysis.allocation import allocate

WIDTHS = (2, 4, 8)


@st.composite
def problems(draw, most_layers=5):
    count = draw(st.integers(1, most_layers))
    costs, sizes = [], []
    for _ in range(count):
        top = draw(st.floats(1e-9, 1e3))
        falls = draw(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=2))
        values = [top, top * falls[0], top * falls[0] * falls[1]]
        costs.append(dict(zip(WIDTHS, values, strict=True)))
        weights = draw(st.integers(1, 10**6))
        sizes.append({bits: bits * weights for bits in WIDTHS})
    return costs, sizes


def total(values, widths):
    return sum(value[bits] for value, bits in zip(values, widths, strict=True))


def mean_budget(sizes, share):
    low, high = (total(sizes, [bits] * len(sizes)) for bits in (min(WIDTHS), max(WIDTHS)))
    return low + share * (high - low)


@settings(max_examples=60, deadline=None)
# A cost whose inverse is infinite.
@example(([{2: 1.0, 4: 1.0, 8: 2.2250738585e-313}], [{2: 2, 4: 4, 8: 8}]), 1.0)
@given(problems(), st.floats(0.0, 1.2))
def test_it_meets_the_budget_at_the_least_cost(problem, share):
    costs, sizes = problem
    budget = mean_budget(sizes, share)
    widths = allocate(costs, sizes, budget)
    assert total(sizes, widths) <= budget
    best = min(
        total(costs, choice)
        for choice in itertools.product(WIDTHS, repeat=len(costs))
        if total(sizes, choice) <= budget
    )
    assert total(costs, widths) <= best * (1 + 1e-6)


@settings(max_examples=40, deadline=None)
@given(problems(30), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_a_larger_budget_never_costs_more(problem, first, second):
    costs, sizes = problem
    small, large = (mean_budget(sizes, share) for share in sorted((first, second)))
    narrow, wide = allocate(costs, sizes, small), allocate(costs, sizes, large)
    assert total(sizes, narrow) <= small
    assert total(costs, wide) <= total(costs, narrow) * (1 + 1e-6)
    assert allocate(costs, sizes, small) == narrow


def test_all_that_there_is_and_all_that_is_needed():
    costs = [{4: 1.0, 8: 0.1}, {4: 0.0, 8: 0.0}]
    sizes = [{4: 40, 8: 80}, {4: 40, 8: 80}]
    assert allocate(costs, sizes, 1e9) == [8, 4]
    assert allocate(costs, sizes, 120) == [8, 4]
    assert allocate(costs, sizes, 119) == [4, 4]


def test_equal_sizes_take_the_cheapest():
    """A packed file stores 2 and 3 bits as 4."""
    costs, sizes = [{2: 3.0, 3: 2.0, 4: 1.0, 8: 0.5}], [{2: 10, 3: 10, 4: 10, 8: 20}]
    assert allocate(costs, sizes, 10) == [4]
    assert allocate(costs, sizes, 19) == [4]
    assert allocate(costs, sizes, 20) == [8]


def test_hundreds_of_layers():
    costs = [{b: (1 + i % 7) * 4.0**-b for b in range(2, 9)} for i in range(300)]
    sizes = [{b: b * (64 + 13 * (i % 11)) for b in range(2, 9)} for i in range(300)]
    budget = 4.5 * sum(size[2] / 2 for size in sizes)
    widths = allocate(costs, sizes, budget)
    assert 0.99 * budget < total(sizes, widths) <= budget
    assert total(costs, widths) < total(costs, [4] * 300)


@pytest.mark.parametrize('budget', [79, float('nan')])
def test_out_of_reach(budget):
    with pytest.raises(BudgetError, match='below the smallest size 80'):
        allocate([{4: 1.0}, {4: 1.0}], [{4: 40}, {4: 40}], budget)
