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

__all__ = ['SCHEMAS', 'announced']

SCHEMAS = {
    # codes uint8, shape of x
    'quantize_codes': '(Tensor x, Tensor inverse, Tensor shift, int[] grid) -> Tensor',
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
        '(Tensor qkv, int heads, float scale, Tensor grids, int[] limits, bool row_relative, '
        'Tensor? bias, Tensor? mask, Tensor? rows, SymInt out_rows) -> Tensor'
    ),
}

# The library owns the registrations: it must live as long as the process.
_LIBRARY = torch.library.Library('gplq_mm', 'DEF')


def _fake_quantize_codes(x, inverse, shift, grid):
    return torch.empty_like(x, dtype=torch.uint8)


def _fake_like(x, *_args):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_accumulate(x, layer, grid):
    return x.new_empty(*x.shape[:-1], layer[5].shape[0], dtype=torch.int32)


def _fake_linear(x, layer, grid):
    return x.new_empty(*x.shape[:-1], layer[5].shape[0])


def _fake_linear_add(x, layer, grid, residual, gamma):
    return torch.empty_like(residual, memory_format=torch.contiguous_format)


def _fake_norm_linear(x, norm_weight, norm_bias, eps, layer, grid):
    return x.new_empty(*x.shape[:-1], layer[5].shape[0])


def _fake_conv2d(x, layer, grid, geometry):
    kernel, stride, padding, dilation = (geometry[i : i + 2] for i in (0, 2, 4, 6))
    height, width = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )
    return x.new_empty(x.shape[0], height, width, layer[5].shape[0]).permute(0, 3, 1, 2)


def _fake_attention(
    qkv, heads, scale, grids, limits, row_relative, bias, mask, rows, out_rows
) -> Tensor:
    channels = qkv.shape[-1] // 3
    if rows is None:
        return qkv.new_empty(*qkv.shape[:-1], channels)
    return qkv.new_empty(out_rows, channels)


_FAKES = {
    'quantize_codes': _fake_quantize_codes,
    'layer_norm': _fake_like,
    'gelu': _fake_like,
    'int4_accumulate': _fake_accumulate,
    'int4_linear': _fake_linear,
    'int4_linear_add': _fake_linear_add,
    'int4_norm_linear': _fake_norm_linear,
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


def _register() -> None:
    for name, schema in SCHEMAS.items():
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, announced(getattr(reference, name)), 'CompositeExplicitAutograd')
        torch.library.register_fake(f'gplq_mm::{name}', _FAKES[name], lib=_LIBRARY)
    native.load()


_register()
