"""Triton kernels of the ops of training; :mod:`.training_reference` says what they compute.

A program works on one tile ``(ROWS, BLOCK)`` of a tensor that is cut into ``rows`` of ``columns``.
A grid is learned for a column (PER_COLUMN, or a single row) or for rows: that of a row is
``row // inner % channels``. Gradients of scales and offsets are summed over a tile along the axis
that shares a grid and written to a place of their own; the host adds these parts in a fixed order,
so that they are the same in every run, which atomic additions would not give.

With TABLE, a code stands for the integer that its table has for it; that of a row is
``row // table_rows % tables``.

With WIDE, places are counted in 64 bits, which take registers. Codes are those of the reference,
ties included: what is one fused multiply-add there is one here,
and the launches fuse nothing else.
"""

import triton
import triton.language as tl

from ..quant.functional import POSITIONS, TOLERANCE
from .triton_common import MAGIC, SQRT_HALF, fma

_TOLERANCE = tl.constexpr(TOLERANCE)
_POSITIONS = tl.constexpr(POSITIONS)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def tile_of(rows, columns, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Block of rows and block of columns of a program; its rows and columns; where its values lie
    in a contiguous tensor, and which of them exist."""
    blocks = tl.cdiv(columns, BLOCK)
    row_block = tl.program_id(0) // blocks
    column_block = tl.program_id(0) % blocks
    if WIDE:
        row_block = row_block.to(tl.int64)
        column_block = column_block.to(tl.int64)
    row = row_block * ROWS + tl.arange(0, ROWS)
    column = column_block * BLOCK + tl.arange(0, BLOCK)
    place = row[:, None] * columns + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return row_block, column_block, row, column, place, mask


@triton.jit
def _numbers(scale, offset, channel, OFFSET: tl.constexpr):
    """Scale and offset of channels, and ``inverse`` and ``shift`` of ``x * inverse + shift``."""
    step = tl.load(scale + channel)
    inverse = tl.div_rn(1.0, step)
    # A sum with 0 changes no product, so one form serves both.
    zero = tl.load(offset + channel) if OFFSET else tl.zeros_like(step)
    return step, zero, inverse, zero * -inverse


@triton.jit
def grid_of(
    scale, offset, row, column, columns, inner, channels,
    OFFSET: tl.constexpr, PER_COLUMN: tl.constexpr,
):  # fmt: skip
    """:func:`_numbers` of a tile, to be broadcast over it."""
    if PER_COLUMN:
        # Past the end the last one is read again: nothing is divided by zero.
        channel = tl.minimum(column, columns - 1)
        step, zero, inverse, shift = _numbers(scale, offset, channel, OFFSET)
        return step[None, :], zero[None, :], inverse[None, :], shift[None, :]
    else:
        channel = row // inner % channels
        step, zero, inverse, shift = _numbers(scale, offset, channel, OFFSET)
        return step[:, None], zero[:, None], inverse[:, None], shift[:, None]


@triton.jit
def code_of(steps, CODE_MIN: tl.constexpr, CODE_MAX: tl.constexpr):
    """Nearest code of values in steps, half to even, as float32; NaN stays."""
    # No minimum or maximum, which would drop a NaN.
    steps = tl.where(steps < CODE_MIN, CODE_MIN, steps)
    steps = tl.where(steps > CODE_MAX, CODE_MAX, steps)
    return (steps + MAGIC) - MAGIC


@triton.jit
def integer_of(code, table, row, table_rows, tables, TABLE: tl.constexpr):
    """What codes of a tile stand for; NaN stays."""
    if TABLE:
        is_number = code == code
        head = row // table_rows % tables
        at = head[:, None] * _POSITIONS + tl.where(is_number, code, 0.0).to(tl.int32)
        return tl.where(is_number, tl.load(table + at).to(tl.float32), code)
    else:
        return code


@triton.jit
def is_outside(steps, CODE_MIN: tl.constexpr, CODE_MAX: tl.constexpr):
    """Whether nothing of the gradient passes; so it is for NaN."""
    low: tl.constexpr = CODE_MIN - _TOLERANCE
    high: tl.constexpr = CODE_MAX + _TOLERANCE
    return ~((steps >= low) & (steps <= high))


@triton.jit
def _gelu(x):
    """``x * Phi(x)``, and ``Phi(x)``."""
    phi = 0.5 * (1.0 + tl.erf(x * SQRT_HALF))
    return x * phi, phi


@triton.jit
def shares(above, outside, integer, residual):
    """What values add to the gradients of x, scale and offset; residual is integer - steps."""
    return (
        tl.where(outside, 0.0, above),
        above * tl.where(outside, integer, residual),
        tl.where(outside, above, 0.0),
    )


@triton.jit
def store_sums(
    parts, of_scale, of_offset, row_block, column_block, row, column, rows, columns,
    PER_COLUMN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of a tile to ``parts``: float32 (2, blocks of rows, columns) or (2, blocks, rows)."""
    if PER_COLUMN:
        place = parts + row_block * columns + column
        step = tl.cdiv(rows, ROWS) * columns
        tl.store(place, tl.sum(of_scale, 0), mask=column < columns)
        tl.store(place + step, tl.sum(of_offset, 0), mask=column < columns)
    else:
        place = parts + column_block * rows + row
        step = tl.cdiv(columns, BLOCK) * rows
        tl.store(place, tl.sum(of_scale, 1), mask=row < rows)
        tl.store(place + step, tl.sum(of_offset, 1), mask=row < rows)


@triton.jit
def _decode(state, CODE_MIN: tl.constexpr, CODE_MAX: tl.constexpr, LEVEL_BITS: tl.constexpr):
    """Codes and rounding residuals, float32, and which values lay outside."""
    most: tl.constexpr = 2**LEVEL_BITS - 1
    middle: tl.constexpr = 2 ** (LEVEL_BITS - 1)
    width: tl.constexpr = 1.0 / most
    bits = state.to(tl.int32) & 0xFFFF
    index = bits >> LEVEL_BITS
    level = (bits & most) - middle
    outside = ((index == 0) & (level > 0)) | ((index == CODE_MAX - CODE_MIN) & (level < 0))
    return (index + CODE_MIN).to(tl.float32), level.to(tl.float32) * width, outside


@triton.jit(do_not_specialize=['rows', 'channels', 'inner', 'tables', 'table_rows'])
def encode_kernel(
    x,  # (rows, columns) float32, float16 or bfloat16
    x_hat,  # (rows, columns) float32
    state,  # (rows, columns) uint8 or int16
    scale, offset,  # float32 (channels,); offset is read with OFFSET
    table,  # uint8 (tables, 64); read with TABLE
    rows, columns, channels, inner, tables, table_rows,
    CODE_MIN: tl.constexpr, CODE_MAX: tl.constexpr, LEVEL_BITS: tl.constexpr,
    OFFSET: tl.constexpr, TABLE: tl.constexpr, PER_COLUMN: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Values on the grid and their states."""
    most: tl.constexpr = 2**LEVEL_BITS - 1
    middle: tl.constexpr = 2 ** (LEVEL_BITS - 1)
    end: tl.constexpr = middle - 1
    low: tl.constexpr = CODE_MIN - _TOLERANCE
    high: tl.constexpr = CODE_MAX + _TOLERANCE
    _, _, row, column, place, mask = tile_of(rows, columns, WIDE, ROWS, BLOCK)
    step, zero, inverse, shift = grid_of(
        scale, offset, row, column, columns, inner, channels, OFFSET, PER_COLUMN
    )
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    steps = fma(value, inverse, shift)
    code = code_of(steps, CODE_MIN, CODE_MAX)
    integer = integer_of(code, table, row, table_rows, tables, TABLE)
    tl.store(x_hat + place, fma(integer, step, zero), mask=mask)
    # What lies outside gets a level that no inner value of its code has.
    level = (code - steps) * most
    level = tl.where(steps < low, end, level)
    level = tl.where(steps > high, -end, level)
    # NaN is not above the lowest level, and becomes it.
    level = tl.where(level > -end, level, -end)
    level = tl.where(level < end, level, end)
    level = (level + MAGIC) - MAGIC
    index = tl.where(code > CODE_MIN, code - CODE_MIN, 0.0).to(tl.int32)
    bits = (index << LEVEL_BITS) + level.to(tl.int32) + middle
    # Truncating keeps the low bits: all 16 of an int16 are used.
    tl.store(state + place, bits.to(state.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['rows', 'channels', 'inner', 'tables', 'table_rows'])
def decode_kernel(
    state,  # (rows, columns) uint8 or int16
    x_hat,  # (rows, columns) float32
    scale, offset,  # float32 (channels,); offset is read with OFFSET
    table,  # uint8 (tables, 64); read with TABLE
    rows, columns, channels, inner, tables, table_rows,
    CODE_MIN: tl.constexpr, CODE_MAX: tl.constexpr, LEVEL_BITS: tl.constexpr,
    OFFSET: tl.constexpr, TABLE: tl.constexpr, PER_COLUMN: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Values on the grid from their states."""
    _, _, row, column, place, mask = tile_of(rows, columns, WIDE, ROWS, BLOCK)
    step, zero, _, _ = grid_of(
        scale, offset, row, column, columns, inner, channels, OFFSET, PER_COLUMN
    )
    bits = tl.load(state + place, mask=mask, other=0)
    code, _, _ = _decode(bits, CODE_MIN, CODE_MAX, LEVEL_BITS)
    integer = integer_of(code, table, row, table_rows, tables, TABLE)
    tl.store(x_hat + place, fma(integer, step, zero), mask=mask)


@triton.jit(do_not_specialize=['rows', 'channels', 'inner', 'tables', 'table_rows'])
def fake_quant_backward_kernel(
    grad,  # (rows, columns) float32, float16 or bfloat16
    state,  # (rows, columns) uint8 or int16
    grad_x,  # (rows, columns) float32
    parts,  # as store_sums writes them
    scale, offset,  # not read
    table,  # as in decode_kernel
    rows, columns, channels, inner, tables, table_rows,
    CODE_MIN: tl.constexpr, CODE_MAX: tl.constexpr, LEVEL_BITS: tl.constexpr,
    OFFSET: tl.constexpr, TABLE: tl.constexpr, PER_COLUMN: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of the input, and sums of those of scale and offset."""
    row_block, column_block, row, column, place, mask = tile_of(rows, columns, WIDE, ROWS, BLOCK)
    above = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
    bits = tl.load(state + place, mask=mask, other=0)
    code, residual, outside = _decode(bits, CODE_MIN, CODE_MAX, LEVEL_BITS)
    integer = integer_of(code, table, row, table_rows, tables, TABLE)
    if TABLE:
        residual += integer - code
    of_x, of_scale, of_offset = shares(above, outside, integer, residual)
    tl.store(grad_x + place, of_x, mask=mask)
    store_sums(
        parts, of_scale, of_offset, row_block, column_block, row, column, rows, columns,
        PER_COLUMN, ROWS, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=['rows', 'channels', 'inner', 'tables', 'table_rows'])
def gelu_kernel(
    x,  # (rows, columns) float32, float16 or bfloat16
    x_hat,  # (rows, columns) float32
    scale, offset,  # float32 (columns,), or (1,) without PER_COLUMN; offset is read with OFFSET
    table,  # uint8 (1, 64); read with TABLE
    rows, columns, channels, inner, tables, table_rows,
    CODE_MIN: tl.constexpr, CODE_MAX: tl.constexpr, LEVEL_BITS: tl.constexpr,
    OFFSET: tl.constexpr, TABLE: tl.constexpr, PER_COLUMN: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """GELU on the grid."""
    _, _, row, column, place, mask = tile_of(rows, columns, WIDE, ROWS, BLOCK)
    step, zero, inverse, shift = grid_of(
        scale, offset, row, column, columns, inner, channels, OFFSET, PER_COLUMN
    )
    value, _ = _gelu(tl.load(x + place, mask=mask, other=0.0).to(tl.float32))
    code = code_of(fma(value, inverse, shift), CODE_MIN, CODE_MAX)
    integer = integer_of(code, table, row, table_rows, tables, TABLE)
    tl.store(x_hat + place, fma(integer, step, zero), mask=mask)


@triton.jit(do_not_specialize=['rows', 'channels', 'inner', 'tables', 'table_rows'])
def gelu_backward_kernel(
    grad, x,  # (rows, columns) float32, float16 or bfloat16
    grad_x, x_hat,  # (rows, columns) float32
    parts,  # as store_sums writes them
    scale, offset, table,  # as in gelu_kernel
    rows, columns, channels, inner, tables, table_rows,
    CODE_MIN: tl.constexpr, CODE_MAX: tl.constexpr, LEVEL_BITS: tl.constexpr,
    OFFSET: tl.constexpr, TABLE: tl.constexpr, PER_COLUMN: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of the input of GELU, its output on the grid, and sums as above."""
    row_block, column_block, row, column, place, mask = tile_of(rows, columns, WIDE, ROWS, BLOCK)
    step, zero, inverse, shift = grid_of(
        scale, offset, row, column, columns, inner, channels, OFFSET, PER_COLUMN
    )
    above = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    activated, phi = _gelu(value)
    steps = fma(activated, inverse, shift)
    code = code_of(steps, CODE_MIN, CODE_MAX)
    integer = integer_of(code, table, row, table_rows, tables, TABLE)
    outside = is_outside(steps, CODE_MIN, CODE_MAX)
    of_x, of_scale, of_offset = shares(above, outside, integer, integer - steps)
    slope = phi + value * (_DENSITY * tl.exp(-0.5 * value * value))
    tl.store(grad_x + place, of_x * slope, mask=mask)
    tl.store(x_hat + place, fma(integer, step, zero), mask=mask)
    store_sums(
        parts, of_scale, of_offset, row_block, column_block, row, column, rows, columns,
        PER_COLUMN, ROWS, BLOCK,
    )  # fmt: skip
