"""Plain-torch implementation of the ops of training: fake quantization that keeps codes.

In all of them ``scale`` is float32 with at most one axis longer than 1, broadcastable to the
input, ``offset`` has its shape or is None (a symmetric grid), and ``grid`` is
``[code_min, code_max, level_bits]``. States are those of :mod:`gplq_mm.quant.code_state`. A code
stands for the integer that ``table`` has for it, uint8 ``(64,)`` or ``(heads, 64)`` for an input
``(..., heads, N, d)``, and for itself where the table is empty.

Backward ops give ``(grad_x, grad_scale, grad_offset)``; inside of the grid the gradient passes
straight through, and that of the scale is the integer less ``(x - offset) / scale``; outside they
are 0 and the integer, and the offset gets what the input lost (LSQ, LSQ+).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant.code_state import decode_state, encode_state, is_inside
from ..quant.functional import dequantize, look_up, quantize, to_steps
from . import training_checks

__all__ = [
    'fake_quant',
    'fake_quant_backward',
    'fake_quant_values',
    'gelu_fake_quant',
    'gelu_fake_quant_backward',
    'softmax_fake_quant_',
    'softmax_fake_quant_backward_',
]

Gradients = tuple[Tensor, Tensor, Tensor]


def _integers(codes: Tensor, table: Tensor) -> Tensor:
    """What codes stand for, in their dtype; NaN stays."""
    return look_up(codes, table if table.numel() else None)


def fake_quant(
    x: Tensor, scale: Tensor, offset: Tensor | None, table: Tensor, grid: list[int]
) -> tuple[Tensor, Tensor]:
    """``x`` on the grid, float32, and its state; both of the shape of ``x``, contiguous."""
    training_checks.check_quantized(x, scale, offset, table, grid)
    codes, state = encode_state(x.float().contiguous(), scale, offset, *grid)
    return dequantize(_integers(codes, table), scale, offset), state


def fake_quant_values(
    state: Tensor, scale: Tensor, offset: Tensor | None, table: Tensor, grid: list[int]
) -> Tensor:
    """What :func:`fake_quant` gave, from its state."""
    training_checks.check_state(state, grid)
    training_checks.check_learned_grid(state.shape, scale, offset, table, grid, state.device)
    codes, _, _ = decode_state(state, *grid)
    return dequantize(_integers(codes, table), scale, offset)


def _gradients(
    grad: Tensor, integers: Tensor, residual: Tensor, outside: Tensor, scale: Tensor
) -> Gradients:
    """From the gradient of quantized values, integers, and what these exceed the input by."""
    grad_x = grad.masked_fill(outside, 0.0)
    grad_scale = (grad * torch.where(outside, integers, residual)).sum_to_size(scale.shape)
    return grad_x, grad_scale, (grad - grad_x).sum_to_size(scale.shape)


def fake_quant_backward(
    grad: Tensor,
    state: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    table: Tensor,
    grid: list[int],
) -> Gradients:
    """Gradients of :func:`fake_quant` from that of its first output, float32."""
    training_checks.check_state(state, grid)
    training_checks.check_quantized(grad, scale, offset, table, grid)
    training_checks.check_same_shape('grad', grad, 'state', state)
    codes, residual, outside = decode_state(state, *grid)
    integers = _integers(codes, table)
    residual = residual + (integers - codes)
    return _gradients(grad.float().contiguous(), integers, residual, outside, scale)


def gelu_fake_quant(
    x: Tensor, scale: Tensor, offset: Tensor | None, table: Tensor, grid: list[int]
) -> Tensor:
    """``gelu(x)`` on the grid, float32, shape of ``x``. Backward needs ``x`` alone."""
    training_checks.check_gelu(x, scale, offset, table, grid)
    codes = quantize(F.gelu(x.float().contiguous()), scale, offset, *grid[:2])
    return dequantize(_integers(codes, table), scale, offset)


def gelu_fake_quant_backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, table: Tensor, grid: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`gelu_fake_quant`, float32; its output is the second of the four."""
    training_checks.check_gelu(x, scale, offset, table, grid)
    training_checks.check_same_shape('grad', grad, 'the input', x)
    x, grad = x.float().contiguous(), grad.float().contiguous()
    activated = F.gelu(x)
    steps = to_steps(activated, scale, offset)
    integers = _integers(quantize(activated, scale, offset, *grid[:2]), table)
    outside = ~is_inside(steps, *grid[:2])
    grad_x, *of_grid = _gradients(grad, integers, integers - steps, outside, scale)
    grad_x = torch.ops.aten.gelu_backward(grad_x, x)
    return grad_x, dequantize(integers, scale, offset), *of_grid


def _numerators(scores: Tensor, factor: float, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    scores = scores * factor
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        batch, *rest = scores.shape
        scores = (scores.view(-1, len(mask), *rest) + mask[:, None]).view(batch, *rest)
    return (scores - scores.amax(-1, keepdim=True)).exp_()


def softmax_fake_quant_(
    scores: Tensor,
    factor: float,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: Tensor,
    offset: Tensor | None,
    table: Tensor,
    grid: list[int],
    row_relative: bool,
) -> Tensor:
    """Quantized probabilities of attention, in place of the scores.

    Args:
        scores: float32 ``(B, heads, N, M)``, contiguous; ``factor * scores + bias + mask`` enters
            the softmax.
        factor: Factor on the scores.
        bias: float32 ``(heads, N, M)`` or None.
        mask: float32 ``(windows, N, M)``, added to item ``i % windows`` of the batch, or None.
        scale, offset, table, grid: As everywhere here; no scale a column.
        row_relative: Whether the numerators ``exp(score - row maximum)`` are quantized instead
            of the probabilities.

    Returns:
        Denominators, float32 ``(B, heads, N, 1)``.
    """
    training_checks.check_scores(scores, bias, mask, scale, offset, table, grid)
    numerators = _numerators(scores, factor, bias, mask)
    total = numerators.sum(-1, keepdim=True)
    quantized = numerators if row_relative else numerators / total
    codes = quantize(quantized, scale, offset, *grid[:2])
    scores.copy_(dequantize(_integers(codes, table), scale, offset))
    return total


def softmax_fake_quant_backward_(
    grad: Tensor,
    scores: Tensor,
    factor: float,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: Tensor,
    offset: Tensor | None,
    table: Tensor,
    grid: list[int],
    row_relative: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`softmax_fake_quant_`, whose output is computed again, in place.

    With ``row_relative`` the product of numerators and values is divided by the denominator.
    ``grad`` is then that of the numerators with the quotient already in it, and what reaches the
    scores through the denominator is added here.

    Args:
        grad: float32, of the quantized numbers, contiguous; becomes that of
            ``factor * scores + bias + mask``.
        scores: As there, before that function; become the quantized numbers.
        factor, bias, mask, scale, offset, table, grid, row_relative: As there.

    Returns:
        Gradients of scale and offset.
    """
    training_checks.check_scores(scores, bias, mask, scale, offset, table, grid)
    training_checks.check_score_gradient(grad, scores)
    numerators = _numerators(scores, factor, bias, mask)
    total = numerators.sum(-1, keepdim=True)
    probs = numerators if row_relative else numerators / total
    steps = to_steps(probs, scale, offset)
    integers = _integers(quantize(probs, scale, offset, *grid[:2]), table)
    quantized = dequantize(integers, scale, offset)
    outside = ~is_inside(steps, *grid[:2])
    grad_probs, *of_grid = _gradients(grad, integers, integers - steps, outside, scale)
    if row_relative:
        taken = (grad * quantized).sum(-1, keepdim=True) / total
    else:
        taken = (grad_probs * probs).sum(-1, keepdim=True)
    grad.copy_(probs * (grad_probs - taken))
    scores.copy_(quantized)
    return tuple(of_grid)
