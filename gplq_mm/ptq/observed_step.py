"""The step that an observer wants for each group of a weight's row.

Weights come in groups ``(R, G, S)``: rows, groups of a row, columns of a group; a whole row is one
group. They are normalised, see :mod:`.scales`.
"""

import torch
from torch import Tensor

from ..quant.spec import WeightSpec

# Grids were chosen on the layers of a real ViT-Ti, where finer ones gain less than 0.5 %: most
# of what a coarse grid misses comes back through the closed-form refits that follow it.
ROW_GRID = (40, 0.08)  # points; smallest ratio of step to unclipped step
GROUP_GRID = (20, 0.25)  # a group has few columns and thus short tails
REFITS = 3


def squared_error(
    weight: Tensor, step: Tensor, importance: Tensor | None, spec: WeightSpec
) -> Tensor:
    """Squared error per group ``(R, G, 1)`` of a weight ``(R, G, S)`` at steps ``(R, G, 1)``."""
    error = spec.code_format.codes_at(weight, step).mul_(step).sub_(weight).square_()
    if importance is not None:
        error.mul_(importance)
    return error.sum(-1, keepdim=True)


def fit_step(
    weight: Tensor, codes: Tensor, importance: Tensor | None, dim: tuple[int, ...]
) -> Tensor:
    """Least-squares step ``sum w z / sum z z`` for fixed codes, zero where nothing is known."""
    weighted = codes if importance is None else codes * importance
    power = (weighted * codes).sum(dim, keepdim=True)
    return (weighted * weight).sum(dim, keepdim=True) / torch.where(power > 0, power, 1.0)


def observed_step(
    weight: Tensor, importance: Tensor | None, spec: WeightSpec, grid: tuple[int, float]
) -> tuple[Tensor, Tensor | None]:
    """The step that the observer wants for each group.

    Args:
        weight: ``(R, G, S)``, normalised.
        importance: ``(S,)`` or ``(G, S)``, or None.
        spec: Says observer, percentile and bits.
        grid: Points and smallest ratio of the grid.

    Returns:
        Step ``(R, G, 1)``, positive unless the group is zero, and for ``'mse'`` its error.
    """
    qmin, qmax = spec.code_range
    magnitude = weight.abs()
    widest = magnitude.amax(-1, keepdim=True) / qmax
    if spec.observer == 'minmax':
        low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
        return torch.maximum(low / qmin, high / qmax), None
    if spec.observer == 'percentile':
        step = magnitude.quantile(spec.percentile, -1, keepdim=True) / qmax
        # Where nearly all weights are zero, so is their quantile, but not a usable step.
        return torch.where(step > 0, step, widest), None

    points, smallest = grid
    safe = torch.where(widest > 0, widest, 1.0)
    best, least = safe, squared_error(weight, safe, importance, spec)
    for i in range(1, points):
        step = safe * smallest ** (i / (points - 1))
        best, least = keep_better(best, least, step, squared_error(weight, step, importance, spec))
    for _ in range(REFITS):
        codes = spec.code_format.codes_at(weight, best)
        step = fit_step(weight, codes, importance, (-1,))
        step = torch.where(step > 0, step, best)
        best, least = keep_better(best, least, step, squared_error(weight, step, importance, spec))
    return torch.where(widest > 0, best, 0.0), least


def keep_better(best: Tensor, least: Tensor, other: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Elementwise choice; the first of equals stays, which is the less clipped one."""
    better = error < least
    return torch.where(better, other, best), torch.where(better, error, least)
