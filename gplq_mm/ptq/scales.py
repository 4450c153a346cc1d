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

from ..errors import DataError
from ..quant.spec import WeightSpec
from .group_steps import (
    LEAST_RATIO,
    cover_steps,
    search_block_scales,
    search_float,
    search_two_level,
)
from .observed_step import GROUP_GRID, ROW_GRID, observed_step

# Elements a chunk: half a megabyte stays in a core's cache and still keeps the cores busy; a GPU
# wants larger launches. About eight temporaries of it live at once, even those below 64 MB.
CHUNK_ELEMENTS = {'cpu': 2**17, 'cuda': 2**21}


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
        step, _ = observed_step(block[:, None], importance, spec, ROW_GRID)
        scale[rows] = _positive(step.view(-1) * unit, block)
    return scale


def search_group_scales(
    weight: Tensor, spec: WeightSpec, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One scale per row and one multiplier per row and group.

    The observer first says which real step a_nj each group wants; then t_n and g_nj are chosen
    so that the steps ``t_n * g_nj`` serve the same purpose: ``'minmax'`` and ``'percentile'``
    cover every a_nj at the least total noise power ``sum_j (t * g_j)**2``, ``'mse'`` minimises
    the (importance-weighted) squared error itself and is never worse than a single scale a row.
    With float group scales every group gets the step that it wants, and ``'mse'`` is never worse
    than with integer multipliers. The blocks of a block-scaled format get one of the two scales of
    the format beside it.

    Args:
        weight: ``(out, K)`` in stored order, any floating dtype. The last group may be short.
        spec: All of it is used. With ``spec.has_one_step`` (raw layout, or 7 bits and more with
            integer multipliers) the result is that of :func:`search_row_scale` and multipliers
            of one.
        importance: As in :func:`search_row_scale`.

    Returns:
        Row scale, float32 ``(out,)``, real value per step of ``multiplier * code``, positive
        and finite; and the multiplier, uint8 ``(out, G)``, 1..``spec.max_multiplier``. With float
        group scales it is float32, positive, and 1 for the group of the largest step.

    Raises:
        ValueError: If the weight is not a finite matrix or the importance does not suit it.
    """
    weight, importance = _check(weight, importance)
    out, columns = weight.shape
    width = spec.group_width(columns)
    groups = -(-columns // width)
    multiplier = torch.ones(out, groups, dtype=spec.multiplier_dtype, device=weight.device)
    blocks = spec.code_format.block_size is not None
    if not blocks and (spec.has_one_step or groups == 1):
        return search_row_scale(weight, spec, importance), multiplier

    # Zeros are padded to the last group: their code is zero, so they add no error.
    pad = groups * width - columns
    if importance is not None:
        importance = F.pad(importance, (0, pad)).view(groups, width)
    scale = torch.empty(out, device=weight.device)
    if blocks:
        # A block scale has a format of its own, so it is searched in its own unit.
        scale.fill_(spec.code_format.tensor_scale(weight.abs().amax()) / 2)
    for rows in _chunks(weight):
        block, unit = (weight[rows], scale[rows]) if blocks else _normalise(weight[rows])
        block = F.pad(block, (0, pad)).view(len(block), groups, width)
        wanted, error = observed_step(block, importance, spec, GROUP_GRID)
        if blocks:
            multiple = search_block_scales(block, wanted, importance, spec, unit[:, None, None])
            multiplier[rows] = multiple.squeeze(-1)
            continue
        if spec.has_float_groups:
            base, multiple = search_float(block, wanted, error, importance, spec)
        elif spec.observer == 'mse':
            base, multiple = search_two_level(block, wanted, importance, spec)
        else:
            base, multiple = cover_steps(wanted, spec)
        # The finest step must not underflow either.
        least = LEAST_RATIO if spec.has_float_groups else 1.0
        scale[rows] = _positive(base.view(-1) * unit, block, least)
        multiplier[rows] = multiple.view(len(block), groups).to(multiplier.dtype)
    return scale, multiplier


def _check(weight: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f'a weight must be a matrix (out, K), got shape {tuple(weight.shape)}.')
    weight = weight.detach().float()
    if not weight.isfinite().all():
        raise DataError('the weight has non-finite values; it cannot be quantized.')
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


def _positive(scale: Tensor, weight: Tensor, least: float = 1.0) -> Tensor:
    """Scale ``(R,)`` with 1 for a row of zeros; none may underflow to zero, ``least`` of it
    neither."""
    scale = torch.where(weight.flatten(1).any(1), scale, 1.0)
    return scale.clamp_(min=torch.finfo(scale.dtype).tiny / least)
