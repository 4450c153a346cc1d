"""Activations to codes on CUDA, in one pass over memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import LAUNCH, MANY_PROGRAMS, levels_of
from .triton_layer import TritonLayer

# Values of a tile that a program keeps in registers, in each half of a row.
QUANTIZE_TILE = 2048
# A program keeps what it read of the columns for several tiles of rows.
MAX_STEPS = 8


@triton.jit
def _load_values(
    x, row, column, mask, row_stride, stride_c, stride_h, stride_w, height, width, out_h, out_w,
    GEOMETRY: tl.constexpr,
):  # fmt: skip
    """Values (ROWS, BLOCK) float32 of input columns; zero where masked."""
    if GEOMETRY is None:
        address = row.to(tl.int64)[:, None] * row_stride + column[None, :]
    else:
        # A row is an output pixel, a column (channel, kernel row, kernel column).
        kernel_w: tl.constexpr = GEOMETRY[1]
        taps: tl.constexpr = GEOMETRY[0] * GEOMETRY[1]
        channel = column // taps
        tap_y = (column % taps) // kernel_w * GEOMETRY[6] - GEOMETRY[4]
        tap_x = column % kernel_w * GEOMETRY[7] - GEOMETRY[5]
        image = row // (out_w * out_h)
        in_y = (row // out_w % out_h * GEOMETRY[2])[:, None] + tap_y[None, :]
        in_x = (row % out_w * GEOMETRY[3])[:, None] + tap_x[None, :]
        mask = mask & (in_y >= 0) & (in_y < height) & (in_x >= 0) & (in_x < width)
        address = image.to(tl.int64)[:, None] * row_stride + (channel * stride_c)[None, :]
        address += in_y * stride_h + in_x * stride_w
    return tl.load(x + address, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=['rows', 'steps'])
def quantize_kernel(
    x,  # (rows, columns), or an image (B, C, H, W) with GEOMETRY
    out,  # uint8 (rows, half) packed by halves, or int8 (rows, out_columns)
    source,  # int32: input column of each stored column; read with GATHER
    inverse, shift,  # float32, stored order
    table,  # uint8 (64,): levels of the codes, or None
    norm_weight, norm_bias, eps,  # LayerNorm over the input columns; read with NORM
    rows, columns, half, out_columns,
    steps,  # tiles of ROWS that a program works through
    row_stride, stride_c, stride_h, stride_w, height, width, out_h, out_w,
    CODE_MIN: tl.constexpr, CODE_MAX: tl.constexpr,
    OFFSET: tl.constexpr,  # taken off a code that is stored as a byte
    PACKED: tl.constexpr, NORM: tl.constexpr, GATHER: tl.constexpr,
    GEOMETRY: tl.constexpr,  # kernel, stride, padding, dilation (h, w each), or None
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Codes of activations in stored column order, one pass over memory.

    Columns are gathered where they are read: a row lies in the L1 cache after the first touch,
    and what is written is contiguous. A program with NORM holds whole rows in registers.
    """
    low = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    high = half + low
    inside = low < half
    ok_low = inside & (low < columns)
    ok_high = inside & (high < columns)
    low_column = tl.load(source + low, mask=ok_low, other=0) if GATHER else low
    high_column = tl.load(source + high, mask=ok_high, other=0) if GATHER else high
    # A column that pads K meets zero weights; its code only has to lie in the range.
    low_inverse = tl.load(inverse + low, mask=ok_low, other=0.0)[None, :]
    low_shift = tl.load(shift + low, mask=ok_low, other=CODE_MIN)[None, :]
    high_inverse = tl.load(inverse + high, mask=ok_high, other=0.0)[None, :]
    high_shift = tl.load(shift + high, mask=ok_high, other=CODE_MIN)[None, :]
    if NORM:
        low_weight = tl.load(norm_weight + low_column, mask=ok_low, other=0.0)[None, :]
        low_bias = tl.load(norm_bias + low_column, mask=ok_low, other=0.0)[None, :]
        high_weight = tl.load(norm_weight + high_column, mask=ok_high, other=0.0)[None, :]
        high_bias = tl.load(norm_bias + high_column, mask=ok_high, other=0.0)[None, :]
        count = columns.to(tl.float32)
    for step in range(steps):
        row = (tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)
        ok_row = (row < rows)[:, None]
        x_low = _load_values(
            x, row, low_column, ok_row & ok_low[None, :], row_stride,
            stride_c, stride_h, stride_w, height, width, out_h, out_w, GEOMETRY,
        )  # fmt: skip
        x_high = _load_values(
            x, row, high_column, ok_row & ok_high[None, :], row_stride,
            stride_c, stride_h, stride_w, height, width, out_h, out_w, GEOMETRY,
        )  # fmt: skip
        if NORM:
            mean = tl.div_rn(tl.sum(x_low, 1) + tl.sum(x_high, 1), count)[:, None]
            x_low = tl.where(ok_low[None, :], x_low - mean, 0.0)
            x_high = tl.where(ok_high[None, :], x_high - mean, 0.0)
            squares = tl.sum(x_low * x_low, 1) + tl.sum(x_high * x_high, 1)
            rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, count) + eps))[:, None]
            x_low = x_low * rstd * low_weight + low_bias
            x_high = x_high * rstd * high_weight + high_bias
        low_code = levels_of(x_low, low_inverse, low_shift, CODE_MIN, CODE_MAX, table)
        high_code = levels_of(x_high, high_inverse, high_shift, CODE_MIN, CODE_MAX, table)
        to = out + row.to(tl.int64)[:, None] * out_columns + low[None, :]
        mask = ok_row & inside[None, :]
        if PACKED:
            tl.store(to, (low_code | (high_code << 4)).to(tl.uint8), mask=mask)
        else:
            # Truncating keeps the low byte: right for uint8 and int8 alike.
            tl.store(to, (low_code - OFFSET).to(tl.int8), mask=mask)
            mask = mask & (high < out_columns)[None, :]
            tl.store(to + half, (high_code - OFFSET).to(tl.int8), mask=mask)


def launch_quantize(
    x: Tensor,
    out: Tensor,
    rows: int,
    columns: int,
    half: int,
    source: Tensor | None,
    inverse: Tensor,
    shift: Tensor,
    limits: tuple[int, int, int],
    table: Tensor | None,
    packed: bool,
    norm: tuple[Tensor, Tensor, float] | None = None,
    image: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
) -> None:
    """Runs quantize_kernel; ``image`` is ``(geometry, (out_h, out_w))`` of an NCHW input."""
    if norm is None:
        block = min(triton.next_power_of_2(half), 256)
    else:
        block = triton.next_power_of_2(half)
    tile_rows = max(1, min(QUANTIZE_TILE // block, triton.next_power_of_2(rows)))
    strides, size, geometry = (columns, 0, 0, 0), (0, 0, 1, 1), None
    if image is not None:
        geometry, out_size = image
        strides, size = x.stride(), (*x.shape[2:], *out_size)
    tiles = triton.cdiv(rows, tile_rows)
    steps = max(1, min(MAX_STEPS, tiles // MANY_PROGRAMS))
    grid = (triton.cdiv(tiles, steps), triton.cdiv(half, block))
    quantize_kernel[grid](
        x,
        out,
        x if source is None else source,
        inverse,
        shift,
        table,
        *((x, x, 0.0) if norm is None else norm),
        rows,
        columns,
        half,
        out.shape[-1],
        steps,
        *strides,
        *size,
        CODE_MIN=limits[0],
        CODE_MAX=limits[1],
        OFFSET=limits[2],
        PACKED=packed,
        NORM=norm is not None,
        GATHER=source is not None,
        GEOMETRY=geometry,
        ROWS=tile_rows,
        BLOCK=block,
        num_warps=16 if block > QUANTIZE_TILE else 8,
        **LAUNCH,
    )


def quantize(
    x: Tensor, layer: TritonLayer, rows: int, norm: tuple | None = None, image: tuple | None = None
) -> Tensor:
    """Codes of activations as gemm_kernel reads them, int8 ``(rows, layer.row_bytes)``."""
    out = torch.empty(rows, layer.row_bytes, dtype=torch.int8, device=x.device)
    if rows:
        launch_quantize(
            x,
            out.view(torch.uint8) if layer.packed else out,
            rows,
            layer.columns,
            layer.half,
            layer.source,
            layer.inverse,
            layer.shift,
            (layer.code_min, layer.code_max, layer.offset),
            layer.table,
            layer.packed,
            norm,
            image,
        )
    return out
