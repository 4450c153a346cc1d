"""Schemas and fake kernels of the ops that training uses; :mod:`.training_reference`,
:mod:`.training_attention` and :mod:`.training_mlp` say what they compute.

They have no autograd formula of their own: :mod:`gplq_mm.layers.saved_codes` calls forward and
backward ops from its autograd functions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..quant.code_state import state_dtype
from . import training_attention, training_mlp, training_reference
from .library import announced, register

__all__ = ['SCHEMAS']

# What a quantizer is, and four of them in attention or two in an MLP.
_GRID = 'Tensor scale, Tensor? offset, Tensor table, int[] grid'
_GRIDS = 'Tensor[] scales, Tensor?[] offsets, Tensor[] tables, int[] grids'
# What becomes of scores before the softmax.
_ADDED = 'float factor, Tensor? bias, Tensor? mask'

SCHEMAS = {
    # (values float32, state), both of the shape of x
    'fake_quant': f'(Tensor x, {_GRID}) -> (Tensor, Tensor)',
    # values float32
    'fake_quant_values': f'(Tensor state, {_GRID}) -> Tensor',
    # gradients of x, scale and offset
    'fake_quant_backward': f'(Tensor grad, Tensor state, {_GRID}) -> (Tensor, Tensor, Tensor)',
    'gelu_fake_quant': f'(Tensor x, {_GRID}) -> Tensor',
    # gradient of x, values, gradients of scale and offset
    'gelu_fake_quant_backward': (
        f'(Tensor grad, Tensor x, {_GRID}) -> (Tensor, Tensor, Tensor, Tensor)'
    ),
    # in place: scores become quantized numbers (B, heads, N, M); denominators (B, heads, N, 1)
    'softmax_fake_quant_': f'(Tensor(a!) scores, {_ADDED}, {_GRID}, bool row_relative) -> Tensor',
    # in place: grad becomes that of the scores before the factor, and scores quantized numbers;
    # gradients of scale and offset
    'softmax_fake_quant_backward_': (
        f'(Tensor(a!) grad, Tensor(b!) scores, {_ADDED}, {_GRID}, bool row_relative) '
        '-> (Tensor, Tensor)'
    ),
    # output, states of q, k and v, denominators
    'attention_fake_quant': (
        f'(Tensor query, Tensor key, Tensor value, {_ADDED}, {_GRIDS}, bool row_relative) '
        '-> (Tensor, Tensor, Tensor, Tensor, Tensor)'
    ),
    # gradients of q, k, v and the bias, then of the four scales and the four offsets
    'attention_fake_quant_backward': (
        f'(Tensor grad, Tensor[] states, Tensor total, {_ADDED}, {_GRIDS}, bool row_relative) '
        '-> Tensor[]'
    ),
    # output, state of x, input of the GELU
    'mlp_fake_quant': (
        f'(Tensor x, Tensor[] weights, Tensor?[] biases, {_GRIDS}) -> (Tensor, Tensor, Tensor)'
    ),
    # gradients of x, the weights, the biases, the scales and the offsets
    'mlp_fake_quant_backward': (
        f'(Tensor grad, Tensor state, Tensor hidden, Tensor[] weights, {_GRIDS}) -> Tensor[]'
    ),
}

# The library owns the registrations: it must live as long as the process.
_LIBRARY = torch.library.Library('gplq_mm', 'FRAGMENT')


def _real(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def _reals(*like: Tensor) -> tuple[Tensor, ...]:
    return tuple(map(_real, like))


def _fake_fake_quant(x, scale, offset, table, grid):
    return _real(x), x.new_empty(x.shape, dtype=state_dtype(*grid))


def _fake_attention(
    query, key, value, factor, bias, mask, scales, offsets, tables, grids, row_relative
) -> tuple[Tensor, ...]:
    states = [
        x.new_empty(x.shape, dtype=state_dtype(*grids[3 * i : 3 * i + 3]))
        for i, x in enumerate((query, key, value))
    ]
    batch, heads, queries, _ = query.shape
    out = query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
    return out, *states, query.new_empty(*query.shape[:-1], 1, dtype=torch.float32)


def _fake_attention_backward(
    grad, states, total, factor, bias, mask, scales, offsets, tables, grids, row_relative
) -> list[Tensor]:
    inputs = [state.new_empty(state.shape, dtype=grad.dtype) for state in states]
    added = grad.new_empty(0) if bias is None else _real(bias)
    return [*inputs, added, *_reals(*scales, *scales)]


def _fake_mlp(x, weights, biases, scales, offsets, tables, grids):
    state = x.new_empty(x.shape, dtype=state_dtype(*grids[:3]))
    out, hidden = (x.new_empty(x.shape[0], weights[i].shape[0]) for i in (1, 0))
    return out, state, hidden


def _fake_mlp_backward(
    grad, state, hidden, weights, scales, offsets, tables, grids
) -> list[Tensor]:
    first, second = (grad.new_empty(weight.shape) for weight in weights)
    biases = (grad.new_empty(weight.shape[0]) for weight in weights)
    return [grad.new_empty(state.shape), first, second, *biases, *_reals(*scales, *scales)]


_FAKES = {
    'fake_quant': _fake_fake_quant,
    'fake_quant_values': lambda state, *_: _real(state),
    'fake_quant_backward': lambda grad, state, scale, *_: (_real(grad), *_reals(scale, scale)),
    'gelu_fake_quant': lambda x, *_: _real(x),
    'gelu_fake_quant_backward': lambda grad, x, scale, *_: _reals(x, x, scale, scale),
    'softmax_fake_quant_': lambda scores, *_: scores.new_empty(*scores.shape[:-1], 1),
    'softmax_fake_quant_backward_': lambda grad, scores, factor, bias, mask, scale, *_: _reals(
        scale, scale
    ),
    'attention_fake_quant': _fake_attention,
    'attention_fake_quant_backward': _fake_attention_backward,
    'mlp_fake_quant': _fake_mlp,
    'mlp_fake_quant_backward': _fake_mlp_backward,
}


def _plain(name: str) -> Callable:
    # These are made of the other ops and of matrix products, on every device.
    composed = getattr(training_attention, name, getattr(training_mlp, name, None))
    return composed or announced(getattr(training_reference, name), 'training ops')


register(_LIBRARY, SCHEMAS, _FAKES, _plain)
