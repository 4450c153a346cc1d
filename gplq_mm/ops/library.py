"""Schemas, checks and fake kernels of ``torch.ops.gplq_mm.*``.

Every op is defined here with the plain-torch implementation of :mod:`.reference`. Compiled CPU
kernels and Triton kernels override it for their device. What the arguments mean stands in
:mod:`.reference`.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import native, reference

__all__ = ['SCHEMAS', 'announced', 'register']

SCHEMAS = {
    # codes or levels, uint8, shape of x
    'quantize_codes': (
        '(Tensor x, Tensor inverse, Tensor shift, int[] grid, Tensor table) -> Tensor'
    ),
    # LayerNorm over the last axis; GELU
    'layer_norm': '(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor',
    'gelu': '(Tensor x) -> Tensor',
    # exact integer accumulators, int32 (..., N)
    'int4_accumulate': '(Tensor x, Tensor[] layer, int[] grid) -> Tensor',
    # (..., K) -> (..., N)
    'int4_linear': '(Tensor x, Tensor[] layer, int[] grid) -> Tensor',
    # residual + gamma * linear(x)
    'int4_linear_add': (
        '(Tensor x, Tensor[] layer, int[] grid, Tensor residual, Tensor? gamma) -> Tensor'
    ),
    # linear(layer_norm(x))
    'int4_norm_linear': (
        '(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor[] layer, int[] grid) '
        '-> Tensor'
    ),
    # x + gamma * fc2(gelu(fc1(layer_norm(x))))
    'int4_mlp': (
        '(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor[] layer1, '
        'int[] grid1, Tensor[] layer2, int[] grid2, Tensor? gamma) -> Tensor'
    ),
    # NCHW -> NCHW in channels-last memory; geometry: kernel, stride, padding, dilation (h, w each)
    'int4_conv2d': '(Tensor x, Tensor[] layer, int[] grid, int[] geometry) -> Tensor',
    # qkv (B, N, 3C) -> (B, N, C); with rows (W, N): qkv (R, 3C) -> (out_rows, C), and a row index
    # of out_rows or more is read (padding) but not written.
    'int4_attention': (
        '(Tensor qkv, int heads, float scale, Tensor grids, int[] limits, Tensor[] tables, '
        'bool row_relative, Tensor? bias, Tensor? mask, Tensor? rows, SymInt out_rows) -> Tensor'
    ),
}

# The library owns the registrations: it must live as long as the process.
_LIBRARY = torch.library.Library('gplq_mm', 'DEF')


def _fake_like(x, *_args):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_linear(x, layer, dtype=None):
    return x.new_empty(*x.shape[:-1], layer[5].shape[0], dtype=dtype)


def _fake_conv2d(x, layer, grid, geometry):
    kernel, stride, padding, dilation = (geometry[i : i + 2] for i in (0, 2, 4, 6))
    height, width = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )
    return x.new_empty(x.shape[0], height, width, layer[5].shape[0]).permute(0, 3, 1, 2)


def _fake_attention(
    qkv, heads, scale, grids, limits, tables, row_relative, bias, mask, rows, out_rows
) -> Tensor:
    channels = qkv.shape[-1] // 3
    if rows is None:
        return qkv.new_empty(*qkv.shape[:-1], channels)
    return qkv.new_empty(out_rows, channels)


_FAKES = {
    'quantize_codes': lambda x, *_args: torch.empty_like(x, dtype=torch.uint8),
    'layer_norm': _fake_like,
    'gelu': _fake_like,
    'int4_accumulate': lambda x, layer, grid: _fake_linear(x, layer, torch.int32),
    'int4_linear': lambda x, layer, grid: _fake_linear(x, layer),
    'int4_linear_add': lambda x, layer, grid, residual, gamma: _fake_like(residual),
    'int4_norm_linear': lambda x, weight, bias, eps, layer, grid: _fake_linear(x, layer),
    'int4_mlp': _fake_like,
    'int4_conv2d': _fake_conv2d,
    'int4_attention': _fake_attention,
}


def announced(function: Callable, what: str = 'int4 ops') -> Callable:
    """The reference as what runs for want of a kernel: it says so once."""

    @functools.wraps(function)
    def run(x: Tensor, *args):
        native.announce_reference(x.device, what)
        return function(x, *args)

    return run


def register(
    library: torch.library.Library,
    schemas: dict[str, str],
    fakes: dict[str, Callable],
    plain: Callable[[str], Callable],
) -> None:
    """Defines ops with what computes them in plain torch, ``plain(name)``, and their fakes."""
    for name, schema in schemas.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, plain(name), 'CompositeExplicitAutograd')
        torch.library.register_fake(f'gplq_mm::{name}', fakes[name], lib=library)


register(_LIBRARY, SCHEMAS, _FAKES, lambda name: announced(getattr(reference, name)))
native.load()
