"""Plain-torch implementation of every op: the oracle of the kernels, and what runs where no
kernel was built.

A packed layer travels through the ops as a list of tensors and a list of integers:

``layer`` (in the order of :data:`LAYER_FIELDS`)
    inverse ``(K,)`` float32, shift ``(K,)`` float32: the activation grid; a code is
    ``clamp(round(x * inverse + shift), code_min, code_max) - code_min``, 0..255.
    table ``(64,)`` uint8, the last field, where a code stands for a chosen level: codes are then
    positions 0..63, and what is multiplied is the integer 0..63 that the table holds there, which
    ascend; ``(0,)`` where codes are the integers themselves.
    weight uint8 ``(P, K, 32)`` or int8 ``(P, K, 64)``, multiplier uint8 ``(P, G, 64)``: panels
    of 64 rows, see :mod:`gplq_mm.quant.packing`.
    position int32 ``(K,)``: input column k meets stored column ``position[k]``.
    row_scale ``(N,)`` float32, bias ``(N,)`` float32, correction ``(N,)`` int32: the output is
    ``(sum of code * multiplier * weight code - correction) * row_scale + bias``.
``grid``
    code_min, code_max, group_size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant import arithmetic
from ..quant.functional import look_up
from ..quant.packing import unpack_multiplier_panels, unpack_panels
from . import checks
from .attention_checks import check_attention
from .checks import LAYER_FIELDS

__all__ = ['LAYER_FIELDS']

# A sum of products that could exceed this is not exact in float32.
EXACT_FLOAT32 = 2**24


def _given(table: Tensor) -> Tensor | None:
    """A table of levels, or None for an empty one."""
    return table if table.numel() else None


def _codes(x: Tensor, inverse: Tensor, shift: Tensor, grid: list[int], table: Tensor) -> Tensor:
    """Codes from 0, or levels, as float32; the same operations as
    :func:`gplq_mm.quant.functional.quantize`.

    NaN, which no code can stand for, becomes 0 as in the kernels.
    """
    code_min, code_max = grid[:2]
    steps = torch.addcmul(shift, x.float(), inverse)
    steps = steps.round_().clamp_(code_min, code_max).sub_(code_min)
    steps.nan_to_num_(nan=0.0)
    return look_up(steps, _given(table))


def _integers(layer: list[Tensor], group_size: int) -> Tensor:
    """``multiplier * code`` in the order of the input columns, float32 ``(N, K)``."""
    _, _, weight, multiplier, position, row_scale, *_ = layer
    rows = row_scale.shape[0]
    codes = unpack_panels(weight, rows).float()
    factors = unpack_multiplier_panels(multiplier, rows).float()
    stored = codes * factors.repeat_interleave(group_size, 1)[:, : codes.shape[1]]
    return stored[:, position.long()]


def _accumulate(codes: Tensor, layer: list[Tensor], grid: list[int]) -> Tensor:
    """Exact accumulators of codes ``(..., K)``, int32 ``(..., N)``."""
    integers = _integers(layer, grid[2])
    worst = (grid[1] - grid[0]) * 127 * max(integers.shape[1], 1)
    dtype = torch.float32 if worst < EXACT_FLOAT32 else torch.float64
    sums = codes.to(dtype) @ integers.to(dtype).T
    return sums.to(torch.int32) - layer[7]


def quantize_codes(
    x: Tensor, inverse: Tensor, shift: Tensor, grid: list[int], table: Tensor
) -> Tensor:
    checks.check_quantize(x, inverse, shift, grid, table)
    return _codes(x, inverse, shift, grid, table).to(torch.uint8)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    checks.check_float(x)
    checks.require(x.dim() > 0, 'the input must have at least one axis.')
    checks.check_norm(weight, bias, x.shape[-1], x.device)
    return arithmetic.layer_norm(x.float(), weight.float(), bias.float(), eps).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    checks.check_float(x)
    return arithmetic.gelu(x.float()).to(x.dtype)


def int4_accumulate(x: Tensor, layer: list[Tensor], grid: list[int]) -> Tensor:
    checks.check_layer(layer, grid, x.device)
    checks.check_input(x, layer[0].numel())
    return _accumulate(_codes(x, layer[0], layer[1], grid, layer[8]), layer, grid)


def _rescale(accumulator: Tensor, layer: list[Tensor]) -> Tensor:
    return torch.addcmul(layer[6], accumulator.float(), layer[5])


def int4_linear(x: Tensor, layer: list[Tensor], grid: list[int]) -> Tensor:
    return _rescale(int4_accumulate(x, layer, grid), layer).to(x.dtype)


def int4_linear_add(
    x: Tensor, layer: list[Tensor], grid: list[int], residual: Tensor, gamma: Tensor | None
) -> Tensor:
    checks.check_layer(layer, grid, x.device)
    checks.check_input(x, layer[0].numel())
    checks.check_residual(x, residual, layer[5].numel())
    checks.check_gamma(gamma, layer[5].numel(), x.device)
    out = int4_linear(x.float(), layer, grid)
    if gamma is not None:
        out = out * gamma.float()
    return (residual.float() + out).to(residual.dtype)


def int4_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    layer: list[Tensor],
    grid: list[int],
) -> Tensor:
    checks.check_layer(layer, grid, x.device)
    checks.check_input(x, layer[0].numel())
    checks.check_norm(norm_weight, norm_bias, layer[0].numel(), x.device)
    normed = layer_norm(x.float(), norm_weight, norm_bias, eps)
    return int4_linear(normed, layer, grid).to(x.dtype)


def int4_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    layer1: list[Tensor],
    grid1: list[int],
    layer2: list[Tensor],
    grid2: list[int],
    gamma: Tensor | None,
) -> Tensor:
    checks.check_layer(layer1, grid1, x.device)
    checks.check_layer(layer2, grid2, x.device)
    checks.check_input(x, layer1[0].numel())
    checks.check_norm(norm_weight, norm_bias, layer1[0].numel(), x.device)
    checks.check_mlp(layer1[5].numel(), layer2[0].numel(), x.shape[-1], layer2[5].numel())
    checks.check_gamma(gamma, x.shape[-1], x.device)
    hidden = int4_norm_linear(x.float(), norm_weight, norm_bias, eps, layer1, grid1)
    hidden = arithmetic.gelu(hidden)
    return int4_linear_add(hidden, layer2, grid2, x, gamma)


def int4_conv2d(x: Tensor, layer: list[Tensor], grid: list[int], geometry: list[int]) -> Tensor:
    checks.check_layer(layer, grid, x.device)
    checks.check_conv(x, layer[0].numel(), geometry)
    kernel, stride, padding, dilation = (tuple(geometry[i : i + 2]) for i in (0, 2, 4, 6))
    size = tuple(
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )
    # Padding before quantization: a real zero gets the code of zero, as the grid then holds it.
    columns = F.unfold(x.float(), kernel, dilation, padding, stride).transpose(1, 2)
    out = int4_linear(columns.contiguous(), layer, grid)
    # Channels last: the rows of the product as they are.
    return out.reshape(x.shape[0], *size, out.shape[-1]).permute(0, 3, 1, 2).to(x.dtype)


def int4_attention(
    qkv: Tensor,
    heads: int,
    scale: float,
    grids: Tensor,
    limits: list[int],
    tables: list[Tensor],
    row_relative: bool,
    bias: Tensor | None,
    mask: Tensor | None,
    rows: Tensor | None,
    out_rows: int,
) -> Tensor:
    check_attention(qkv, heads, grids, limits, tables, bias, mask, rows, out_rows)
    channels = qkv.shape[-1] // 3
    flat = qkv.float().reshape(-1, 3 * channels)
    windows = qkv if rows is None else flat[rows.long()]
    batch, tokens, _ = windows.shape
    if batch * tokens == 0:
        return qkv.new_zeros(*(qkv.shape[:-1] if rows is None else (out_rows,)), channels)
    query, key, value = (
        windows.float().reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    )
    levels = [_given(table) for table in tables]
    out = arithmetic.attention(
        query, key, value, scale, grids, limits, row_relative, bias, mask, levels
    )
    out = out.transpose(1, 2).reshape(batch, tokens, channels).to(qkv.dtype)
    if rows is None:
        return out
    result = qkv.new_zeros(out_rows, channels)
    keep = rows.flatten() < out_rows
    return result.index_copy_(0, rows.flatten()[keep].long(), out.flatten(0, 1)[keep])
