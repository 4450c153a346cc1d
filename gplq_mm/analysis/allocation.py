"""Which width for which layer: a multiple-choice knapsack."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from ..errors import SettingError

# Enough for hundreds of layers; a limit in seconds would make results depend on the machine.
MAX_NODES = 20000
# The solver takes a row that is exceeded by this as kept: in a large row that is little.
TOLERANCE = 1e-6
ROW_SCALE = 1e4


class BudgetError(SettingError):
    """A budget that no choice of widths can meet."""


def allocate(
    costs: Sequence[Mapping[int, float]], sizes: Sequence[Mapping[int, float]], budget: float
) -> list[int]:
    """Chooses one width for each layer such that the sum of costs is smallest within a budget.

    An integer linear program with one binary variable for each layer and width
    (``scipy.optimize.milp``, HiGHS). Costs may lie many decades apart, more than the solver
    resolves: it is called again without what alone costs more than the solution found, until
    nothing is gained. For many hundreds of layers a search may end at :data:`MAX_NODES` before it
    has proved the optimum. The result is the same on every call.

    Args:
        costs: For each layer, bits -> cost, not negative.
        sizes: For each layer, bits -> size, positive, for the same bits.
        budget: Largest sum of sizes.

    Returns:
        Bits of each layer.

    Raises:
        BudgetError: If even the smallest widths exceed the budget.
    """
    chosen = [
        min(cost, key=lambda bits, cost=cost, size=size: (size[bits], cost[bits], -bits))
        for cost, size in zip(costs, sizes, strict=True)
    ]
    if not budget >= _total(sizes, chosen):
        least = _total(sizes, chosen)
        raise BudgetError(f'the budget {budget:g} is below the smallest size {least:g}.')
    while True:
        better = _solve(costs, sizes, budget, _total(costs, chosen))
        if better is None or _total(costs, better) >= _total(costs, chosen):
            return chosen
        chosen = better


def _total(values: Sequence[Mapping[int, float]], widths: Sequence[int]) -> float:
    return math.fsum(value[bits] for value, bits in zip(values, widths, strict=True))


def _solve(
    costs: Sequence[Mapping], sizes: Sequence[Mapping], budget: float, bound: float
) -> list[int] | None:
    """Widths of least cost, of those that cost no more than ``bound`` alone; None if not found."""
    if bound == 0:
        return None
    options = [
        (layer, bits) for layer, cost in enumerate(costs) for bits in cost if cost[bits] <= bound
    ]
    layers = np.array([layer for layer, _ in options])
    objective = np.array([1e3 * (costs[layer][bits] / bound) for layer, bits in options])
    weights = np.array([sizes[layer][bits] * (ROW_SCALE / budget) for layer, bits in options])
    one_each = LinearConstraint(layers == np.arange(len(costs))[:, None], 1, 1)
    # Where the solver's own tolerance has counted, the second limit leaves room for it.
    for limit in (ROW_SCALE, ROW_SCALE - 2 * TOLERANCE):
        result = milp(
            objective,
            integrality=np.ones(len(options)),
            bounds=Bounds(0, 1),
            constraints=[one_each, LinearConstraint(weights, -np.inf, limit)],
            options={'mip_rel_gap': 0.0, 'node_limit': MAX_NODES},
        )
        if result.x is None:
            return None
        order = np.lexsort((-result.x, layers))
        first = np.searchsorted(layers[order], np.arange(len(costs)))
        chosen = [options[index][1] for index in order[first]]
        if _total(sizes, chosen) <= budget:
            return chosen
    return None
