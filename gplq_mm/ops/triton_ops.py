"""The ops of :mod:`.library` on CUDA tensors, through the Triton kernels.

Importing this module needs triton. Nothing here reads a value from the device: a call only
enqueues kernels, so after the first call of a shape (which compiles, tunes and packs) it can be
captured in a CUDA graph.
"""

import torch
from torch import Tensor

from . import checks
from .reference import gelu, layer_norm
from .triton_attention import int4_attention
from .triton_common import table_or_none
from .triton_gemm import multiply
from .triton_layer import TritonLayer, prepared_layer, prepared_mlp
from .triton_quantize import launch_quantize, quantize

__all__ = [
    'gelu',
    'int4_accumulate',
    'int4_attention',
    'int4_conv2d',
    'int4_linear',
    'int4_linear_add',
    'int4_mlp',
    'int4_norm_linear',
    'layer_norm',
    'quantize_codes',
]


def _rows_of(x: Tensor) -> int:
    return x.numel() // x.shape[-1] if x.shape[-1] else x.shape[:-1].numel()


def _new(x: Tensor, layer: TritonLayer, dtype: torch.dtype) -> Tensor:
    return torch.empty(*x.shape[:-1], layer.rows, dtype=dtype, device=x.device)


def _prepare(x: Tensor, layer: list[Tensor], grid: list[int]) -> TritonLayer:
    prepared = prepared_layer(layer, grid, x.device)
    checks.check_input(x, prepared.columns)
    return prepared


def quantize_codes(
    x: Tensor, inverse: Tensor, shift: Tensor, grid: list[int], table: Tensor
) -> Tensor:
    checks.check_quantize(x, inverse, shift, grid, table)
    columns = inverse.shape[0]
    x = x.contiguous()
    out = torch.empty_like(x, dtype=torch.uint8)
    if x.numel():
        rows = _rows_of(x)
        limits, half = (grid[0], grid[1], 0), -(-columns // 2)
        with torch.cuda.device_of(x):
            launch_quantize(
                x,
                out,
                rows,
                columns,
                half,
                None,
                inverse,
                shift,
                limits,
                table_or_none(table),
                False,
            )
    return out


def int4_accumulate(x: Tensor, layer: list[Tensor], grid: list[int]) -> Tensor:
    with torch.cuda.device_of(x):
        prepared = _prepare(x, layer, grid)
        codes = quantize(x.contiguous(), prepared, _rows_of(x))
        return multiply(codes, prepared, _new(x, prepared, torch.int32))


def int4_linear(x: Tensor, layer: list[Tensor], grid: list[int]) -> Tensor:
    with torch.cuda.device_of(x):
        prepared = _prepare(x, layer, grid)
        codes = quantize(x.contiguous(), prepared, _rows_of(x))
        return multiply(codes, prepared, _new(x, prepared, x.dtype))


def int4_linear_add(
    x: Tensor, layer: list[Tensor], grid: list[int], residual: Tensor, gamma: Tensor | None
) -> Tensor:
    with torch.cuda.device_of(x):
        prepared = _prepare(x, layer, grid)
        checks.check_residual(x, residual, prepared.rows)
        checks.check_gamma(gamma, prepared.rows, x.device)
        codes = quantize(x.contiguous(), prepared, _rows_of(x))
        out = _new(x, prepared, residual.dtype)
        return multiply(codes, prepared, out, gamma=gamma, residual=residual.contiguous())


def int4_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    layer: list[Tensor],
    grid: list[int],
) -> Tensor:
    with torch.cuda.device_of(x):
        prepared = _prepare(x, layer, grid)
        checks.check_norm(norm_weight, norm_bias, prepared.columns, x.device)
        norm = (norm_weight.float(), norm_bias.float(), eps)
        codes = quantize(x.contiguous(), prepared, _rows_of(x), norm)
        return multiply(codes, prepared, _new(x, prepared, x.dtype))


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
    with torch.cuda.device_of(x):
        first, inverse, shift, second = prepared_mlp(layer1, grid1, layer2, grid2, x.device)
        checks.check_input(x, first.columns)
        checks.check_norm(norm_weight, norm_bias, first.columns, x.device)
        checks.check_gamma(gamma, second.rows, x.device)
        x = x.contiguous()
        rows = _rows_of(x)
        codes = quantize(x, first, rows, (norm_weight.float(), norm_bias.float(), eps))
        hidden = torch.empty(rows, second.row_bytes, dtype=torch.int8, device=x.device)
        multiply(codes, first, hidden, gelu=True, follow=(inverse, shift, second))
        out = _new(x, second, x.dtype)
        return multiply(hidden, second, out, gamma=gamma, residual=x)


def int4_conv2d(x: Tensor, layer: list[Tensor], grid: list[int], geometry: list[int]) -> Tensor:
    with torch.cuda.device_of(x):
        prepared = prepared_layer(layer, grid, x.device)
        checks.check_conv(x, prepared.columns, geometry)
        kernel, stride, padding, dilation = (geometry[i : i + 2] for i in (0, 2, 4, 6))
        out_h, out_w = (
            (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
            for i in (0, 1)
        )
        rows = x.shape[0] * out_h * out_w
        codes = quantize(x, prepared, rows, image=(tuple(geometry), (out_h, out_w)))
        out = torch.empty(x.shape[0], out_h, out_w, prepared.rows, dtype=x.dtype, device=x.device)
        return multiply(codes, prepared, out).permute(0, 3, 1, 2)
