"""Softmax on a learned grid on CUDA; a program holds whole rows of scores."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import native, training_checks, training_reference
from .triton_common import count_tables, fma, launch_options, learned_axis, numbers_of, zeros_of
from .triton_training_kernels import (
    code_of,
    grid_of,
    integer_of,
    is_outside,
    shares,
    store_sums,
    tile_of,
)

# Values of a tile of whole rows of scores, which several arrays of its size are kept of, and the
# longest row that registers hold; above it the plain-torch form runs.
SCORES_TILE = 1024
MAX_KEYS = 1 << 14


@triton.jit
def _probabilities(
    scores, bias, mask, place, ok, row, column, columns, queries, item_rows, windows, factor,
    ROW_RELATIVE: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Probabilities (ROWS, BLOCK), or numerators with ROW_RELATIVE; denominators (ROWS, 1)."""
    value = tl.load(scores + place, mask=ok, other=0.0) * factor
    if BIAS:
        at = (row % item_rows)[:, None] * columns + column[None, :]
        value += tl.load(bias + at, mask=ok, other=0.0)
    if MASK:
        mask_row = row // item_rows % windows * queries + row % queries
        value += tl.load(mask + mask_row[:, None] * columns + column[None, :], mask=ok, other=0.0)
    value = tl.where((column < columns)[None, :], value, float('-inf'))
    value = tl.exp(value - tl.max(value, 1)[:, None])
    total = tl.sum(value, 1)[:, None]
    below = tl.broadcast_to(total, value.shape)
    if not ROW_RELATIVE:
        value = tl.div_rn(value, below)
    # A maximum passes over NaN: the rest of its row must not look as if there were none.
    return tl.where(below == below, value, below), total


@triton.jit(do_not_specialize=['rows', 'inner', 'channels', 'windows', 'tables'])
def softmax_kernel(
    scores,  # float32 (rows, columns), rows in the order (batch, heads, queries); replaced
    total,  # float32 (rows,)
    bias,  # float32 (item_rows, columns), item_rows = heads * queries; read with BIAS
    mask,  # float32 (windows * queries, columns); read with MASK
    scale, offset,  # float32 (channels,); offset is read with OFFSET
    table,  # uint8 (tables, 64), one or one a head; read with TABLE
    rows, columns, queries, item_rows, windows, inner, channels, tables, factor,
    CODE_MIN: tl.constexpr, CODE_MAX: tl.constexpr, ROW_RELATIVE: tl.constexpr,
    OFFSET: tl.constexpr, TABLE: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantized numbers of a softmax in place of the scores; a program holds whole rows."""
    _, _, row, column, place, ok = tile_of(rows, columns, WIDE, ROWS, BLOCK)
    step, zero, inverse, shift = grid_of(
        scale, offset, row, column, columns, inner, channels, OFFSET, False
    )
    probs, sums = _probabilities(
        scores, bias, mask, place, ok, row, column, columns, queries, item_rows, windows, factor,
        ROW_RELATIVE, BIAS, MASK,
    )  # fmt: skip
    code = code_of(fma(probs, inverse, shift), CODE_MIN, CODE_MAX)
    integer = integer_of(code, table, row, queries, tables, TABLE)
    tl.store(scores + place, fma(integer, step, zero), mask=ok)
    tl.store(total + row[:, None], sums, mask=(row < rows)[:, None])


@triton.jit(do_not_specialize=['rows', 'inner', 'channels', 'windows', 'tables'])
def softmax_backward_kernel(
    grad,  # float32 (rows, columns), of the quantized numbers; becomes that of the scores
    scores,  # as in softmax_kernel; become the quantized numbers
    parts,  # float32 (2, rows)
    bias, mask, scale, offset, table,  # as in softmax_kernel
    rows, columns, queries, item_rows, windows, inner, channels, tables, factor,
    CODE_MIN: tl.constexpr, CODE_MAX: tl.constexpr, ROW_RELATIVE: tl.constexpr,
    OFFSET: tl.constexpr, TABLE: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of softmax_kernel, whose output is computed again."""
    row_block, column_block, row, column, place, ok = tile_of(rows, columns, WIDE, ROWS, BLOCK)
    step, zero, inverse, shift = grid_of(
        scale, offset, row, column, columns, inner, channels, OFFSET, False
    )
    probs, total = _probabilities(
        scores, bias, mask, place, ok, row, column, columns, queries, item_rows, windows, factor,
        ROW_RELATIVE, BIAS, MASK,
    )  # fmt: skip
    above = tl.load(grad + place, mask=ok, other=0.0)
    steps = fma(probs, inverse, shift)
    code = code_of(steps, CODE_MIN, CODE_MAX)
    integer = integer_of(code, table, row, queries, tables, TABLE)
    p_hat = fma(integer, step, zero)
    outside = is_outside(steps, CODE_MIN, CODE_MAX)
    of_probs, of_scale, of_offset = shares(above, outside, integer, integer - steps)
    # What reaches the scores through the denominator.
    if ROW_RELATIVE:
        taken = tl.div_rn(tl.sum(above * p_hat, 1)[:, None], total)
    else:
        taken = tl.sum(of_probs * probs, 1)[:, None]
    tl.store(grad + place, probs * (of_probs - taken), mask=ok)
    tl.store(scores + place, p_hat, mask=ok)
    store_sums(
        parts, of_scale, of_offset, row_block, column_block, row, column, rows, columns,
        False, ROWS, BLOCK,
    )  # fmt: skip


def _softmax_launch(
    scores: Tensor,
    factor: float,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: Tensor,
    offset: Tensor | None,
    table: Tensor,
    grid: list[int],
    row_relative: bool,
) -> tuple[tuple[int], list, dict]:
    """Programs of a softmax, and the arguments that forward and backward share."""
    batch, heads, queries, keys = scores.shape
    rows, block = batch * heads * queries, triton.next_power_of_2(keys)
    tile_rows = max(SCORES_TILE // block, 1)
    axis = learned_axis(scale)
    arguments = [
        scores if bias is None else bias.contiguous(),
        scores if mask is None else mask.contiguous(),
        *numbers_of(scale, offset, table),
        rows,
        keys,
        queries,
        heads * queries,
        1 if mask is None else len(mask),
        # Rows that a scale lasts for.
        math.prod(scores.shape[4 - axis + 1 : 3]) if axis else 1,
        scale.numel(),
        count_tables(table),
        factor,
    ]
    options = dict(
        CODE_MIN=grid[0],
        CODE_MAX=grid[1],
        ROW_RELATIVE=row_relative,
        OFFSET=offset is not None,
        TABLE=table.numel() > 0,
        BIAS=bias is not None,
        MASK=mask is not None,
        ROWS=tile_rows,
        BLOCK=block,
        **launch_options(scores.numel(), tile_rows * block, each=8),
    )
    return (triton.cdiv(rows, tile_rows),), arguments, options


def _fits(scores: Tensor) -> bool:
    keys = scores.shape[-1]
    if keys > MAX_KEYS:
        native.announce(
            f'softmaxes of training over {keys} keys on {scores.device.type}',
            'their rows do not fit the registers',
        )
    return keys <= MAX_KEYS


# What follows the scores stands in training_reference: factor, bias, mask, scale, offset, table,
# grid, row_relative.


def softmax_fake_quant_(scores: Tensor, factor: float, *rest) -> Tensor:
    training_checks.check_scores(scores, *rest[:6])
    if not _fits(scores):
        return training_reference.softmax_fake_quant_(scores, factor, *rest)
    total = scores.new_empty(*scores.shape[:-1], 1)
    if scores.numel():
        programs, arguments, options = _softmax_launch(scores, factor, *rest)
        with torch.cuda.device_of(scores):
            softmax_kernel[programs](scores, total, *arguments, **options)
    return total


def softmax_fake_quant_backward_(
    grad: Tensor, scores: Tensor, factor: float, *rest
) -> tuple[Tensor, Tensor]:
    training_checks.check_scores(scores, *rest[:6])
    training_checks.check_score_gradient(grad, scores)
    if not _fits(scores):
        return training_reference.softmax_fake_quant_backward_(grad, scores, factor, *rest)
    scale = rest[2]
    if not scores.numel():
        return zeros_of(scale)
    programs, arguments, options = _softmax_launch(scores, factor, *rest)
    rows, inner, channels = arguments[5], arguments[10], arguments[11]
    with torch.cuda.device_of(scores):
        parts = torch.empty(2, rows, dtype=torch.float32, device=scores.device)
        softmax_backward_kernel[programs](grad, scores, parts, *arguments, **options)
        sums = parts.view(2, -1, channels, inner).sum((1, 3))
    return sums[0].view(scale.shape), sums[1].view(scale.shape)
