"""Scale search: how large is an integer step of a weight.

Every weight here is already in the space in which it is quantized: with ``layout='folded'`` the
caller has multiplied the activation scale into the columns and sorted them. Rows are
independent of each other, so everything below is vectorised over rows and walks over them in
chunks, which bounds the temporaries.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant.functional import dequantize, quantize
from ..quant.spec import WeightSpec

__all__ = ['group_width', 'search_group_scales', 'search_row_scale']

# Elements a chunk: half a megabyte stays in a core's cache and still keeps the cores busy; a GPU
# wants larger launches. About eight temporaries of it live at once, even those below 64 MB.
CHUNK_ELEMENTS = {'cpu': 2**17, 'cuda': 2**21}
# Grids were chosen on the layers of a real ViT-Ti, where finer ones gain less than 0.5 %: most
# of what a coarse grid misses comes back through the closed-form refits that follow it.
ROW_GRID = (40, 0.08)  # points; smallest ratio of step to unclipped step
GROUP_GRID = (20, 0.25)  # a group has few columns and thus short tails
BASE_GRID = 32
REFITS = 3


def group_width(spec: WeightSpec, columns: int) -> int:
    """Columns that share a multiplier; a whole row in the raw layout."""
    return spec.group_size if spec.layout == 'folded' else max(columns, 1)


def search_row_scale(weight: Tensor, spec: WeightSpec, importance: Tensor | None = None) -> Tensor:
    """One scale per row.

    ``'minmax'`` takes the smallest scale that clips nothing, ``'percentile'`` divides that
    quantile of the row's magnitudes by the largest code, ``'mse'`` minimises
    ``sum_k importance_k * (w_k - w_hat_k)**2`` over a grid of clipping ratios, followed by
    closed-form refits.

    Args:
        weight: ``(out, K)``, any floating dtype.
        spec: Says bits, observer and percentile; layout and groups do not matter here.
        importance: ``(K,)``, weight of each column's squared error, not negative; None for
            equal ones. Used by ``'mse'`` only.

    Returns:
        float32 ``(out,)``: real value per integer step; positive and finite, 1 for a zero row.

    Raises:
        ValueError: If the weight is not a finite matrix or the importance does not suit it.
    """
    weight, importance = _check(weight, importance)
    scale = torch.empty(len(weight), device=weight.device)
    for rows in _chunks(weight):
        block, unit = _normalise(weight[rows])
        step, _ = _observe(block[:, None], importance, spec, ROW_GRID)
        scale[rows] = _positive(step.view(-1) * unit, block)
    return scale


def search_group_scales(
    weight: Tensor, spec: WeightSpec, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One scale per row and one integer multiplier per row and group.

    The observer first says which real step a_nj each group wants; then t_n and g_nj are chosen
    so that the steps ``t_n * g_nj`` serve the same purpose: ``'minmax'`` and ``'percentile'``
    cover every a_nj at the least total noise power ``sum_j (t * g_j)**2``, ``'mse'`` minimises
    the (importance-weighted) squared error itself and is never worse than a single scale a row.

    Args:
        weight: ``(out, K)`` in stored order, any floating dtype. The last group may be short.
        spec: All of it is used. With ``spec.max_multiplier == 1`` (raw layout, or 7 bits and
            more) the result is that of :func:`search_row_scale` and multipliers of one.
        importance: As in :func:`search_row_scale`.

    Returns:
        Row scale, float32 ``(out,)``, real value per step of ``multiplier * code``, positive
        and finite; and the multiplier, uint8 ``(out, G)``, 1..``spec.max_multiplier``.

    Raises:
        ValueError: If the weight is not a finite matrix or the importance does not suit it.
    """
    weight, importance = _check(weight, importance)
    out, columns = weight.shape
    width = group_width(spec, columns)
    groups = -(-columns // width)
    multiplier = torch.ones(out, groups, dtype=torch.uint8, device=weight.device)
    if spec.max_multiplier == 1 or groups == 1:
        return search_row_scale(weight, spec, importance), multiplier

    # Zeros are padded to the last group: their code is zero, so they add no error.
    pad = groups * width - columns
    if importance is not None:
        importance = F.pad(importance, (0, pad)).view(groups, width)
    scale = torch.empty(out, device=weight.device)
    for rows in _chunks(weight):
        block, unit = _normalise(weight[rows])
        block = F.pad(block, (0, pad)).view(len(block), groups, width)
        if spec.observer == 'mse':
            base, multiple = _search_two_level(block, importance, spec)
        else:
            wanted, _ = _observe(block, importance, spec, GROUP_GRID)
            base, multiple = _cover(wanted, spec)
        scale[rows] = _positive(base.view(-1) * unit, block)
        multiplier[rows] = multiple.view(len(block), groups).to(torch.uint8)
    return scale, multiplier


def _check(weight: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f'a weight must be a matrix (out, K), got shape {tuple(weight.shape)}.')
    weight = weight.detach().float()
    if not weight.isfinite().all():
        raise ValueError('the weight has non-finite values; it cannot be quantized.')
    if importance is None:
        return weight, None
    importance = importance.detach().to(weight.device, torch.float64)
    if importance.shape != weight.shape[1:]:
        raise ValueError(
            f'importance must have one value per column, {weight.shape[1]}; '
            f'it has shape {tuple(importance.shape)}.'
        )
    if not importance.isfinite().all() or (importance < 0).any():
        raise ValueError('importance must be finite and not negative.')
    mean = importance.mean()
    # Of columns that all do not matter none matters more than another.
    return weight, (importance / mean).float() if mean > 0 else None


def _chunks(weight: Tensor) -> Iterator[slice]:
    limit = CHUNK_ELEMENTS.get(weight.device.type, CHUNK_ELEMENTS['cpu'])
    size = max(1, limit // weight.shape[1])
    for start in range(0, len(weight), size):
        yield slice(start, start + size)


def _normalise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of absolute maximum 1 (squares of tiny weights would underflow), and the factor."""
    unit = weight.abs().amax(1)
    unit = torch.where(unit > 0, unit, 1.0)
    return weight / unit[:, None], unit


def _positive(scale: Tensor, weight: Tensor) -> Tensor:
    """Scale ``(R,)`` with 1 for a row of zeros; none may underflow to zero."""
    scale = torch.where(weight.flatten(1).any(1), scale, 1.0)
    return scale.clamp_(min=torch.finfo(scale.dtype).tiny)


def _error(weight: Tensor, step: Tensor, importance: Tensor | None, spec: WeightSpec) -> Tensor:
    """Squared error per group ``(R, G, 1)`` of a weight ``(R, G, S)`` at steps ``(R, G, 1)``."""
    error = dequantize(quantize(weight, step, None, *spec.code_range), step, None)
    error = error.sub_(weight).square_()
    if importance is not None:
        error.mul_(importance)
    return error.sum(-1, keepdim=True)


def _fit(weight: Tensor, codes: Tensor, importance: Tensor | None, dim: tuple[int, ...]) -> Tensor:
    """Least-squares step ``sum w z / sum z z`` for fixed codes, zero where nothing is known."""
    weighted = codes if importance is None else codes * importance
    power = (weighted * codes).sum(dim, keepdim=True)
    return (weighted * weight).sum(dim, keepdim=True) / torch.where(power > 0, power, 1.0)


def _observe(
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
    best, least = safe, _error(weight, safe, importance, spec)
    for i in range(1, points):
        step = safe * smallest ** (i / (points - 1))
        best, least = _keep_better(best, least, step, _error(weight, step, importance, spec))
    for _ in range(REFITS):
        codes = quantize(weight, best, None, qmin, qmax)
        step = _fit(weight, codes, importance, (-1,))
        step = torch.where(step > 0, step, best)
        best, least = _keep_better(best, least, step, _error(weight, step, importance, spec))
    return torch.where(widest > 0, best, 0.0), least


def _keep_better(
    best: Tensor, least: Tensor, other: Tensor, error: Tensor
) -> tuple[Tensor, Tensor]:
    """Elementwise choice; the first of equals stays, which is the less clipped one."""
    better = error < least
    return torch.where(better, other, best), torch.where(better, error, least)


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


def _cover(wanted: Tensor, spec: WeightSpec) -> tuple[Tensor, Tensor]:
    """Base ``(R, 1, 1)`` and multiplier ``(R, G, 1)`` with no step below the wanted one."""
    least_base = wanted.amax(1, keepdim=True) / spec.max_multiplier
    best = least = None
    for base in _base_candidates(wanted, spec):
        base = base.maximum(least_base)
        noise = (base * _above(wanted, base, spec)).square().sum(1, keepdim=True)
        if best is None:
            best, least = base, noise
        else:
            best, least = _keep_better(best, least, base, noise)
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
    error = _error(weight, base * multiple, importance, spec)
    best = multiple
    for change in changes:
        other = (multiple + change).clamp_(1, spec.max_multiplier)
        other_error = _error(weight, base * other, importance, spec)
        best, error = _keep_better(best, error, other, other_error)
    return best, error.sum(1, keepdim=True)


def _search_two_level(
    weight: Tensor, importance: Tensor | None, spec: WeightSpec
) -> tuple[Tensor, Tensor]:
    """Base ``(R, 1, 1)`` and multiplier ``(R, G, 1)`` of little squared error.

    Every base is tried with the multipliers on both sides of the groups' own best steps; the
    best one is then improved in turns: base in closed form given the integers, multipliers by
    their neighbours given the base.
    """
    wanted, _ = _observe(weight, importance, spec, GROUP_GRID)
    # A single step a row is the first candidate, so the result is never worse than it.
    flat = None if importance is None else importance.flatten()
    best, least = _observe(weight.flatten(1)[:, None], flat, spec, ROW_GRID)
    best = torch.where(best > 0, best, 1.0)
    multiple = torch.ones_like(wanted)
    for base in _base_candidates(wanted, spec):
        other, error = _choose(weight, base, _below(wanted, base, spec), (1,), importance, spec)
        multiple = torch.where(error < least, other, multiple)
        best, least = _keep_better(best, least, base, error)

    for _ in range(REFITS):
        codes = quantize(weight, best * multiple, None, *spec.code_range)
        base = _fit(weight, codes.mul_(multiple), importance, (1, 2))
        base = torch.where(base > 0, base, best)
        other, error = _choose(weight, base, multiple, (-1, 1), importance, spec)
        multiple = torch.where(error < least, other, multiple)
        best, least = _keep_better(best, least, base, error)
    return best, multiple
