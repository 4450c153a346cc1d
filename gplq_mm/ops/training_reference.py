"""Plain-torch implementation of the ops of training: fake quantization that keeps codes.

In all of them ``scale`` is float32 with at most one axis longer than 1, broadcastable to the
input, ``offset`` has its shape or is None (a symmetric grid), and ``grid`` is
``[code_min, code_max, level_bits]``. Quantized values and states are those of
:mod:`gplq_mm.quant.code_state`. Backward ops give ``(grad_x, grad_scale, grad_offset)``; inside of
the grid the gradient passes straight through, and that of the scale is the rounding residual;
outside they are 0 and the code, and the offset gets what the input lost (LSQ, LSQ+).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant.code_state import decode_state, encode_state, is_inside
from ..quant.functional import dequantize, quantize, to_steps
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


def fake_quant(
    x: Tensor, scale: Tensor, offset: Tensor | None, grid: list[int]
) -> tuple[Tensor, Tensor]:
    """``x`` on the grid, float32, and its state; both of the shape of ``x``, contiguous."""
    training_checks.check_quantized(x, scale, offset, grid)
    return encode_state(x.float().contiguous(), scale, offset, *grid)


def fake_quant_values(
    state: Tensor, scale: Tensor, offset: Tensor | None, grid: list[int]
) -> Tensor:
    """What :func:`fake_quant` gave, from its state."""
    training_checks.check_state(state, grid)
    training_checks.check_learned_grid(state.shape, scale, offset, grid, state.device)
    return dequantize(decode_state(state, *grid)[0], scale, offset)


def _gradients(
    grad: Tensor, codes: Tensor, residual: Tensor, outside: Tensor, scale: Tensor
) -> Gradients:
    grad_x = grad.masked_fill(outside, 0.0)
    grad_scale = (grad * torch.where(outside, codes, residual)).sum_to_size(scale.shape)
    return grad_x, grad_scale, (grad - grad_x).sum_to_size(scale.shape)


def fake_quant_backward(
    grad: Tensor, state: Tensor, scale: Tensor, offset: Tensor | None, grid: list[int]
) -> Gradients:
    """Gradients of :func:`fake_quant` from that of its first output, float32."""
    training_checks.check_state(state, grid)
    training_checks.check_quantized(grad, scale, offset, grid)
    training_checks.check_same_shape('grad', grad, 'state', state)
    return _gradients(grad.float().contiguous(), *decode_state(state, *grid), scale)


def gelu_fake_quant(x: Tensor, scale: Tensor, offset: Tensor | None, grid: list[int]) -> Tensor:
    """``gelu(x)`` on the grid, float32, shape of ``x``. Backward needs ``x`` alone."""
    training_checks.check_gelu(x, scale, offset, grid)
    activated = F.gelu(x.float().contiguous())
    return dequantize(quantize(activated, scale, offset, *grid[:2]), scale, offset)


def gelu_fake_quant_backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, grid: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`gelu_fake_quant`, float32; its output is the second of the four."""
    training_checks.check_gelu(x, scale, offset, grid)
    training_checks.check_same_shape('grad', grad, 'the input', x)
    x, grad = x.float().contiguous(), grad.float().contiguous()
    activated = F.gelu(x)
    steps = to_steps(activated, scale, offset)
    codes = quantize(activated, scale, offset, *grid[:2])
    outside = ~is_inside(steps, *grid[:2])
    grad_x, grad_scale, grad_offset = _gradients(grad, codes, codes - steps, outside, scale)
    grad_x = torch.ops.aten.gelu_backward(grad_x, x)
    return grad_x, dequantize(codes, scale, offset), grad_scale, grad_offset


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
        scale, offset, grid: As everywhere here; no scale a column.
        row_relative: Whether the numerators ``exp(score - row maximum)`` are quantized instead
            of the probabilities.

    Returns:
        Denominators, float32 ``(B, heads, N, 1)``.
    """
    training_checks.check_scores(scores, bias, mask, scale, offset, grid)
    numerators = _numerators(scores, factor, bias, mask)
    total = numerators.sum(-1, keepdim=True)
    quantized = numerators if row_relative else numerators / total
    scores.copy_(dequantize(quantize(quantized, scale, offset, *grid[:2]), scale, offset))
    return total


def softmax_fake_quant_backward_(
    grad: Tensor,
    scores: Tensor,
    factor: float,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: Tensor,
    offset: Tensor | None,
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
        factor, bias, mask, scale, offset, grid, row_relative: As there.

    Returns:
        Gradients of scale and offset.
    """
    training_checks.check_scores(scores, bias, mask, scale, offset, grid)
    training_checks.check_score_gradient(grad, scores)
    numerators = _numerators(scores, factor, bias, mask)
    total = numerators.sum(-1, keepdim=True)
    probs = numerators if row_relative else numerators / total
    steps = to_steps(probs, scale, offset)
    codes = quantize(probs, scale, offset, *grid[:2])
    quantized = dequantize(codes, scale, offset)
    outside = ~is_inside(steps, *grid[:2])
    grad_probs, grad_scale, grad_offset = _gradients(grad, codes, codes - steps, outside, scale)
    if row_relative:
        taken = (grad * quantized).sum(-1, keepdim=True) / total
    else:
        taken = (grad_probs * probs).sum(-1, keepdim=True)
    grad.copy_(probs * (grad_probs - taken))
    scores.copy_(quantized)
    return grad_scale, grad_offset
