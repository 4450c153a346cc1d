"""Rounding, and nothing else: the only place in the package that rounds a number to a code.

Notation: ``x_hat = scale * q + offset`` with an integer code ``q`` in ``[qmin, qmax]``. With
``offset = 0`` this is LSQ (Esser et al., ICLR 2020), with a learned offset LSQ+ (Bhalgat et al.,
CVPR-W 2020); an integer zero-point z is ``offset = -scale * z``.
"""

import torch
from torch import Tensor

# The ends of a grid belong to it: a value this far beyond them, in steps, still counts as inside.
# A few ulp of an 8-bit code in float32.
TOLERANCE = 1e-4
# Positions 0..63 of the fine grid that chosen levels are looked up from.
POSITIONS = 64


def to_steps(x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """``(x - offset) / scale`` in a single pass over ``x``; shapes as in :func:`quantize`."""
    inverse = scale.reciprocal()
    if offset is None:
        return x * inverse
    return torch.addcmul(offset * -inverse, x, inverse)


def quantize(x: Tensor, scale: Tensor, offset: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """Rounds half to even and clamps.

    Args:
        x: Real values, any floating dtype.
        scale: Real value of an integer step, positive, broadcastable to ``x``.
        offset: Real value of code 0, broadcastable to ``x``, or None for zero.
        qmin: Smallest code.
        qmax: Largest code.

    Returns:
        Integer codes in the floating dtype of ``x``, same shape.
    """
    return round_steps_(to_steps(x, scale, offset), qmin, qmax)


def round_steps_(steps: Tensor, qmin: int, qmax: int) -> Tensor:
    """Codes of values that are given in units of their step, half to even; in place."""
    return steps.round_().clamp_(qmin, qmax)


def look_up(positions: Tensor, table: Tensor | None) -> Tensor:
    """Integers that stand in a table; the positions themselves without one.

    Args:
        positions: Whole numbers in a floating dtype, or NaN, which stays.
        table: uint8 ``(P,)``, or ``(heads, P)`` for positions ``(..., heads, N, d)``, or None.

    Returns:
        Shape and dtype of ``positions``.
    """
    if table is None:
        return positions
    index = positions.nan_to_num(nan=0.0).to(torch.int32)
    if table.dim() == 2:
        heads, size = table.shape
        index += torch.arange(0, heads * size, size, dtype=index.dtype, device=index.device)[
            :, None, None
        ]
    # The difference is zero, or NaN.
    return table.flatten().to(positions.dtype)[index].add_(positions - positions)


def round_e2m1_(halves: Tensor) -> Tensor:
    """Nearest e2m1 of values that are given in halves, half to even mantissas; in place.

    An e2m1 is 0, 0.5, 1, 1.5, 2, 3, 4 or 6 with a sign; what lies beyond 6 becomes 6.
    """
    magnitude = halves.abs()
    gap = (magnitude >= 4).to(halves.dtype).add_(magnitude >= 8, alpha=2).add_(1)
    return halves.div_(gap).round_().mul_(gap).clamp_(-12, 12)


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """Real values of codes; shapes and dtypes as in :func:`quantize`."""
    return codes * scale if offset is None else torch.addcmul(offset, codes, scale)


def _pass_inside(grad: Tensor, steps: Tensor, qmin: int, qmax: int) -> Tensor:
    """``grad`` where ``qmin <= steps <= qmax``, else 0; one pass (hardtanh's own is open-ended)."""
    low, high = qmin - TOLERANCE, qmax + TOLERANCE
    return torch.ops.aten.hardtanh_backward(grad, steps, low, high)


class _FakeQuantize(torch.autograd.Function):
    """Straight-through in x; LSQ/LSQ+ gradients for scale and offset.

    Inside the range d x_hat / d scale = q - (x - offset) / scale and d x_hat / d offset = 0;
    outside they are q and 1. With a table q is what stands there. Only x is kept for backward, the
    codes are computed again. The passes over memory are what it costs, so both directions are
    written with few of them.
    """

    @staticmethod
    def forward(ctx, x, scale, offset, qmin, qmax, grad_scale, table):
        ctx.save_for_backward(x, scale, offset, table)
        ctx.limits = (qmin, qmax, grad_scale)
        integers = look_up(quantize(x, scale, offset, qmin, qmax), table)
        return dequantize(integers, scale, offset)

    @staticmethod
    def backward(ctx, grad):
        x, scale, offset, table = ctx.saved_tensors
        qmin, qmax, grad_scale = ctx.limits
        steps = to_steps(x, scale, offset)
        grad_x = _pass_inside(grad, steps, qmin, qmax)
        grad_s = grad_o = None
        if offset is not None and ctx.needs_input_grad[2]:
            grad_o = (
                grad.sum_to_size(offset.shape) - grad_x.sum_to_size(offset.shape)
            ) * grad_scale
        if ctx.needs_input_grad[1]:
            # sum of grad * q over all, minus grad * steps over what lies inside.
            unrounded = grad_x * steps
            integers = look_up(round_steps_(steps, qmin, qmax), table)
            grad_s = integers.mul_(grad).sub_(unrounded).sum_to_size(scale.shape) * grad_scale
        return grad_x if ctx.needs_input_grad[0] else None, grad_s, grad_o, *[None] * 4


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    qmin: int,
    qmax: int,
    grad_scale: float = 1.0,
    table: Tensor | None = None,
) -> Tensor:
    """Quantizes and dequantizes, differentiable in ``x``, ``scale`` and ``offset``.

    Computed in float32 at least, whatever the autocast state, and returned in the dtype of
    ``x``: a code must not depend on the precision of the matmuls around it.

    Args:
        x, scale, offset, qmin, qmax: As in :func:`quantize`.
        grad_scale: Factor on the gradients of scale and offset (LSQ: 1 / sqrt(n * qmax)).
        table: Integers that codes stand for, as in :func:`look_up`; None for the codes themselves.

    Returns:
        Real values on the grid, shape and dtype of ``x``.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        out = _FakeQuantize.apply(
            x.to(dtype),
            scale.to(dtype),
            None if offset is None else offset.to(dtype),
            qmin,
            qmax,
            grad_scale,
            table,
        )
    return out.to(x.dtype)


def quantize_log_sqrt2(x: Tensor, scale: Tensor, qmax: int) -> Tensor:
    """Codes of non-negative values on the grid ``scale * 2**(-q/2)`` (RepQ-ViT, eq. 9) and zero.

    Zero has a code of its own. Most of a softmax's outputs are close to zero and there are
    hundreds in a row, so if the smallest power stood for them their sum could exceed the rest of
    the row. RepQ-ViT's code counts zero beside 2**bits powers; here it is one of the 2**bits
    codes, so that a code has ``bits`` bits.

    Args:
        x: Values >= 0.
        scale: Largest representable value, positive, broadcastable to ``x``.
        qmax: Largest code; it stands for zero and for all that is nearer to it, in the exponent,
            than to the power of code qmax - 1.

    Returns:
        Codes 0..qmax in the dtype of ``x``.
    """
    # log2(0) is -inf, which is clamped to the last code whatever the number of bits.
    return (x / scale).clamp_(min=0).log2_().mul_(-2).round_().clamp_(0, qmax)


def dequantize_log_sqrt2(codes: Tensor, scale: Tensor, qmax: int) -> Tensor:
    """Values ``scale * 2**(-q/2)``; zero for code ``qmax``."""
    return torch.where(codes == qmax, 0, torch.exp2(codes * -0.5)) * scale


class _FakeQuantizeLogSqrt2(torch.autograd.Function):
    """Up to scale the estimate is x_hat ~ x: gradient 1 for x and 0 for scale. Above it x_hat is
    scale."""

    @staticmethod
    def forward(ctx, x, scale, qmax, grad_scale):
        ctx.save_for_backward(x, scale)
        ctx.grad_scale = grad_scale
        return dequantize_log_sqrt2(quantize_log_sqrt2(x, scale, qmax), scale, qmax)

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        above = x > scale
        grad_x = grad * ~above if ctx.needs_input_grad[0] else None
        grad_s = None
        if ctx.needs_input_grad[1]:
            grad_s = (grad * above).sum_to_size(scale.shape) * ctx.grad_scale
        return grad_x, grad_s, None, None


def fake_quantize_log_sqrt2(x: Tensor, scale: Tensor, qmax: int, grad_scale: float = 1.0) -> Tensor:
    """Differentiable round trip through :func:`quantize_log_sqrt2`; float32 at least inside."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        out = _FakeQuantizeLogSqrt2.apply(x.to(dtype), scale.to(dtype), qmax, grad_scale)
    return out.to(x.dtype)
