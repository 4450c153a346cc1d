"""Steps of the groups of a row: multiples of one step of the row, or a float for each.

Weights ``(R, G, S)`` and wanted steps ``(R, G, 1)`` are those of :mod:`.observed_step`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..quant.spec import WeightSpec
from .observed_step import (
    REFITS,
    ROW_GRID,
    fit_step,
    keep_better,
    observed_step,
    squared_error,
)

BASE_GRID = 32
# Least float scale of a group in units of the largest of its row.
LEAST_RATIO = 1e-6


def _base_candidates(wanted: Tensor, spec: WeightSpec) -> Iterator[Tensor]:
    """Candidates ``(R, 1, 1)`` for t.

    The group that wants most gets a multiplier from the largest possible, or slightly less than
    it wants, down to a third of that. Coarser bases only lose resolution.
    """
    most = wanted.amax(1, keepdim=True)
    most = torch.where(most > 0, most, 1.0)
    high, low = 1.07 * spec.max_multiplier, max(1.0, spec.max_multiplier / 3.2)
    for i in range(BASE_GRID):
        yield most / (high * (low / high) ** (i / (BASE_GRID - 1)))


def _below(wanted: Tensor, base: Tensor, spec: WeightSpec) -> Tensor:
    return (wanted / base).floor_().clamp_(1, spec.max_multiplier)


def _above(wanted: Tensor, base: Tensor, spec: WeightSpec) -> Tensor:
    # The tolerance keeps a quotient that is an integer but for rounding from going one up.
    return (wanted / base - 1e-5).ceil_().clamp_(1, spec.max_multiplier)


def cover_steps(wanted: Tensor, spec: WeightSpec) -> tuple[Tensor, Tensor]:
    """Base ``(R, 1, 1)`` and multiplier ``(R, G, 1)`` with no step below the wanted one."""
    least_base = wanted.amax(1, keepdim=True) / spec.max_multiplier
    best = least = None
    for base in _base_candidates(wanted, spec):
        base = base.maximum(least_base)
        noise = (base * _above(wanted, base, spec)).square().sum(1, keepdim=True)
        if best is None:
            best, least = base, noise
        else:
            best, least = keep_better(best, least, base, noise)
    return best, _above(wanted, best, spec)


def _choose(
    weight: Tensor,
    base: Tensor,
    multiple: Tensor,
    changes: tuple[int, ...],
    importance: Tensor | None,
    spec: WeightSpec,
) -> tuple[Tensor, Tensor]:
    """The best of a multiplier and its neighbours per group, and the row's error with them."""
    error = squared_error(weight, base * multiple, importance, spec)
    best = multiple
    for change in changes:
        other = (multiple + change).clamp_(1, spec.max_multiplier)
        other_error = squared_error(weight, base * other, importance, spec)
        best, error = keep_better(best, error, other, other_error)
    return best, error.sum(1, keepdim=True)


def search_two_level(
    weight: Tensor, wanted: Tensor, importance: Tensor | None, spec: WeightSpec
) -> tuple[Tensor, Tensor]:
    """Base ``(R, 1, 1)`` and multiplier ``(R, G, 1)`` of little squared error.

    Every base is tried with the multipliers on both sides of the groups' own best steps; the
    best one is then improved in turns: base in closed form given the integers, multipliers by
    their neighbours given the base.
    """
    # A single step a row is the first candidate, so the result is never worse than it.
    flat = None if importance is None else importance.flatten()
    best, least = observed_step(weight.flatten(1)[:, None], flat, spec, ROW_GRID)
    best = torch.where(best > 0, best, 1.0)
    multiple = torch.ones_like(wanted)
    for base in _base_candidates(wanted, spec):
        other, error = _choose(weight, base, _below(wanted, base, spec), (1,), importance, spec)
        multiple = torch.where(error < least, other, multiple)
        best, least = keep_better(best, least, base, error)

    for _ in range(REFITS):
        codes = spec.code_format.codes_at(weight, best * multiple)
        base = fit_step(weight, codes.mul_(multiple), importance, (1, 2))
        base = torch.where(base > 0, base, best)
        other, error = _choose(weight, base, multiple, (-1, 1), importance, spec)
        multiple = torch.where(error < least, other, multiple)
        best, least = keep_better(best, least, base, error)
    return best, multiple


def search_float(
    weight: Tensor,
    wanted: Tensor,
    error: Tensor | None,
    importance: Tensor | None,
    spec: WeightSpec,
) -> tuple[Tensor, Tensor]:
    """Largest step ``(R, 1, 1)`` of a row, and the groups' own steps ``(R, G, 1)`` in units of it.

    A group gets the step that it wants, and for ``'mse'`` the better one of that and the step that
    it has in the two-level search. ``error`` is that of the wanted steps, of ``'mse'`` only.
    """
    step = wanted
    if spec.observer == 'mse':
        base, multiple = search_two_level(weight, wanted, importance, spec)
        other = base * multiple
        is_better = (squared_error(weight, other, importance, spec) < error) & (step > 0)
        step = torch.where(is_better, other, step)
    most = step.amax(1, keepdim=True)
    most = torch.where(most > 0, most, 1.0)
    # A group of zeros wants no step. Of any other the floor raises no error: a value is rounded to
    # the nearer neighbour, and never to one that is farther than zero.
    return most, (step / most).clamp_(min=LEAST_RATIO)


def search_block_scales(
    weight: Tensor, wanted: Tensor, importance: Tensor | None, spec: WeightSpec, unit: Tensor
) -> Tensor:
    """Scales ``(R, G, 1)`` of a block-scaled format, whose step is ``unit`` times that of a code.

    ``'mse'`` takes the best one of those around the wanted step and around the step that makes the
    largest value a 4 instead of a 6; others take the one that covers the wanted step.
    """
    around = spec.code_format.scales_around
    below, best = around(wanted / unit)
    if spec.observer != 'mse':
        return best
    least = squared_error(weight, unit * best, importance, spec)
    for scale in (below, *around(weight.abs().amax(-1, keepdim=True) / (8 * unit))):
        error = squared_error(weight, unit * scale, importance, spec)
        best, least = keep_better(best, least, scale, error)
    return best
