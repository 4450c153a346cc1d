"""Attention of training: quantized operands, a few bytes kept for backward.

What is kept of q, k and v is their state. Probabilities are computed again: one product more, in
place of several copies of ``(B, heads, N, N)``. Only a few items of the batch are worked on at a
time, so that on a CPU their scores stay in the cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..quant.code_state import state_dtype

__all__ = ['attention_fake_quant', 'attention_fake_quant_backward']

# Scores that are worked on at a time, by kind of device.
CHUNK = {'cpu': 1 << 18, 'cuda': 1 << 27}

OptionalTensors = list[Tensor | None]


def _chunks(batch: int, scores_of_item: int, windows: int, device: torch.device) -> Iterator[slice]:
    """Slices of the batch, each a multiple of the windows of a mask."""
    largest = CHUNK.get(device.type, CHUNK['cuda'])
    count = max(largest // max(scores_of_item * windows, 1), 1) * windows
    return (slice(i, min(i + count, batch)) for i in range(0, batch, count))


def _grid(grids: list[int], operand: int) -> list[int]:
    return grids[3 * operand : 3 * operand + 3]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of ``(B, heads, ., .)``, without the copies that broadcasting may make."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def attention_fake_quant(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factor: float,
    bias: Tensor | None,
    mask: Tensor | None,
    scales: list[Tensor],
    offsets: OptionalTensors,
    tables: list[Tensor],
    grids: list[int],
    row_relative: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``softmax(factor * q_hat @ k_hat.T + bias + mask)_hat @ v_hat``.

    Args:
        query: ``(B, heads, N, d)``; its dtype is that of the products.
        key, value: ``(B, heads, M, d)``.
        factor: Factor on the scores.
        bias: float32 ``(heads, N, M)`` or None.
        mask: float32 ``(windows, N, M)``, added to item ``i % windows`` of the batch, or None.
        scales, offsets: Of q, k, v and the probabilities; float32.
        tables: Of the four, as in :mod:`.training_reference`.
        grids: code_min, code_max and level_bits of the four, 12 integers.
        row_relative: As in :func:`.training_reference.softmax_fake_quant_`.

    Returns:
        Output ``(B, heads, N, d)`` of the dtype of ``query``; states of q, k and v; denominators
        of the softmax, float32 ``(B, heads, N, 1)``.
    """
    ops = torch.ops.gplq_mm
    dtype = query.dtype
    batch, heads, queries, _ = query.shape
    states = [
        torch.empty(x.shape, dtype=state_dtype(*_grid(grids, i)), device=x.device)
        for i, x in enumerate((query, key, value))
    ]
    # In memory a token's heads lie side by side, as the layer that follows reads them.
    out = query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
    totals = query.new_empty(*query.shape[:-1], 1, dtype=torch.float32)
    windows = 1 if mask is None else len(mask)
    for items in _chunks(batch, heads * queries * key.shape[2], windows, query.device):
        operands = []
        for i, x in enumerate((query, key, value)):
            x_hat, states[i][items] = ops.fake_quant.default(
                x[items], scales[i], offsets[i], tables[i], _grid(grids, i)
            )
            operands.append(x_hat.to(dtype))
        q, k, v = operands
        probs = _product(q, k.mT).float()
        totals[items] = ops.softmax_fake_quant_.default(
            probs,
            factor,
            bias,
            mask,
            scales[3],
            offsets[3],
            tables[3],
            _grid(grids, 3),
            row_relative,
        )
        product = _product(probs.to(dtype), v)
        out[items] = product.div_(totals[items]) if row_relative else product
    return out, *states, totals


def attention_fake_quant_backward(
    grad: Tensor,
    states: list[Tensor],
    total: Tensor,
    factor: float,
    bias: Tensor | None,
    mask: Tensor | None,
    scales: list[Tensor],
    offsets: OptionalTensors,
    tables: list[Tensor],
    grids: list[int],
    row_relative: bool,
) -> list[Tensor]:
    """Gradients of :func:`attention_fake_quant`.

    Args:
        grad: ``(B, heads, N, d)``; its dtype is that of the products.
        states: Of q, k and v.
        total: Denominators.
        factor, bias, mask, scales, offsets, tables, grids, row_relative: As there.

    Returns:
        Gradients of query, key and value (dtype of ``grad``), of the bias (empty without one), of
        the four scales, and of the four offsets (float32).
    """
    ops = torch.ops.gplq_mm
    dtype = grad.dtype
    inputs = [torch.empty(state.shape, dtype=dtype, device=grad.device) for state in states]
    grad_bias = grad.new_empty(0) if bias is None else torch.zeros_like(bias)
    learned = [[torch.zeros_like(scale) for scale in scales] for _ in range(2)]
    batch, heads, queries, _ = states[0].shape
    windows = 1 if mask is None else len(mask)
    for items in _chunks(batch, heads * queries * states[1].shape[2], windows, grad.device):
        q, k, v = (
            ops.fake_quant_values.default(
                state[items], scales[i], offsets[i], tables[i], _grid(grids, i)
            ).to(dtype)
            for i, state in enumerate(states)
        )
        above = grad[items]
        above = (above / total[items]).to(dtype) if row_relative else above
        # Contiguous: it enters two products.
        above = above.contiguous()
        probs = _product(q, k.mT).float()
        grad_scores = _product(above, v.mT).float()
        of_probs = ops.softmax_fake_quant_backward_.default(
            grad_scores,
            probs,
            factor,
            bias,
            mask,
            scales[3],
            offsets[3],
            tables[3],
            _grid(grids, 3),
            row_relative,
        )
        if bias is not None:
            grad_bias += grad_scores.sum(0)
        grad_scores = grad_scores.to(dtype)
        parts = (
            _product(grad_scores, k).mul_(factor),
            _product(grad_scores.mT, q).mul_(factor),
            _product(probs.to(dtype).mT, above),
        )
        for i, part in enumerate(parts):
            grad_x, *of_grid = ops.fake_quant_backward.default(
                part, states[i][items], scales[i], offsets[i], tables[i], _grid(grids, i)
            )
            inputs[i][items] = grad_x
            for kind in range(2):
                learned[kind][i] += of_grid[kind]
        for kind in range(2):
            learned[kind][3] += of_probs[kind]
    return [*inputs, grad_bias, *learned[0], *learned[1]]
