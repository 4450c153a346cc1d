"""Which width for which layer: a multiple-choice knapsack."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

__all__ = ['BudgetError', 'allocate']

# Enough for hundreds of layers; a limit in seconds would make results depend on the machine.
MAX_NODES = 20000
# The solver takes a row that is exceeded by this as kept: in a large row that is little.
TOLERANCE = 1e-6
ROW_SCALE = 1e4


class BudgetError(ValueError):
    """A budget that no choice of widths can meet."""


def allocate(
    costs: Sequence[Mapping[int, float]], sizes: Sequence[Mapping[int, float]], budget: float
) -> list[int]:
    """Chooses one width for each layer such that the sum of costs is smallest within a budget.

    First every layer has its smallest width, and is widened step by step where a step saves most
    cost by size. Then the exact problem is solved, an integer linear program with one binary
    variable for each layer and width (``scipy.optimize.milp``, HiGHS), and the better of the two
    counts; for many hundreds of layers the search may end at :data:`MAX_NODES` before it has proved
    the optimum. The result is the same on every call.

    Args:
        costs: For each layer, bits -> cost, not negative.
        sizes: For each layer, bits -> size, positive, for the same bits.
        budget: Largest sum of sizes.

    Returns:
        Bits of each layer.

    Raises:
        BudgetError: If even the smallest widths exceed the budget.
    """
    least = sum(min(size.values()) for size in sizes)
    if not budget >= least:
        raise BudgetError(f'the budget {budget:g} is below the smallest size {least:g}.')
    chosen = _by_steps(costs, sizes, budget)
    bound = _total(costs, chosen)
    if bound == 0:
        return chosen
    for row_limit in (ROW_SCALE, ROW_SCALE - 2 * TOLERANCE):
        exact = _by_program(costs, sizes, budget, bound, row_limit)
        if exact is None:
            break
        # The solver's own tolerance must not count; the second limit leaves room for it.
        if _total(sizes, exact) <= budget:
            return min(chosen, exact, key=lambda widths: _total(costs, widths))
    return chosen


def _total(values: Sequence[Mapping[int, float]], widths: Sequence[int]) -> float:
    return math.fsum(value[bits] for value, bits in zip(values, widths, strict=True))


def _by_steps(costs: Sequence[Mapping], sizes: Sequence[Mapping], budget: float) -> list[int]:
    chosen = []
    for cost, size in zip(costs, sizes, strict=True):
        smallest = min(size.values())
        chosen.append(
            min((bits for bits in cost if size[bits] == smallest), key=lambda b: (cost[b], -b))
        )
    left = budget - _total(sizes, chosen)
    while True:
        best = None
        for index, (cost, size) in enumerate(zip(costs, sizes, strict=True)):
            now = chosen[index]
            for bits in cost:
                more, gain = size[bits] - size[now], cost[now] - cost[bits]
                if gain > 0 and more <= left:
                    rate = gain / more if more > 0 else math.inf
                    if best is None or rate > best[0]:
                        best = (rate, index, bits)
        if best is None:
            return chosen
        _, index, bits = best
        chosen[index] = bits
        left = budget - _total(sizes, chosen)


def _by_program(
    costs: Sequence[Mapping],
    sizes: Sequence[Mapping],
    budget: float,
    bound: float,
    row_limit: float,
) -> list[int] | None:
    # What alone costs more than a known solution is in no better one; without it all numbers lie
    # within the precision of the solver.
    options = [
        (layer, bits) for layer, cost in enumerate(costs) for bits in cost if cost[bits] <= bound
    ]
    objective = np.array([1e3 * (costs[layer][bits] / bound) for layer, bits in options])
    weights = np.array([[sizes[layer][bits] for layer, bits in options]]) * (ROW_SCALE / budget)
    one_each = np.zeros((len(costs), len(options)))
    for column, (layer, _) in enumerate(options):
        one_each[layer, column] = 1.0
    result = milp(
        objective,
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(weights, -np.inf, row_limit),
        ],
        options={'mip_rel_gap': 0.0, 'node_limit': MAX_NODES},
    )
    if result.x is None:
        return None
    chosen = [0] * len(costs)
    largest = [-1.0] * len(costs)
    for (layer, bits), value in zip(options, result.x, strict=True):
        if value > largest[layer]:
            chosen[layer], largest[layer] = bits, value
    return chosen
