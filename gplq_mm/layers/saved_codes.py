"""Quantized products that keep codes for backward instead of floats.

A fake-quantized layer, written plainly, keeps its input, the quantized input and intermediate
results of the rounding. All that backward needs of them is the code of every value, which gives
the exact quantized input for the gradient of the weight, and a few bits of rounding residual for
the gradient of the scale: a byte a value (:mod:`gplq_mm.quant.code_state`). Gradients of weights
and inputs are those of the plain formulation; those of scales have the resolution of the residual.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import training as _training  # noqa: F401  (defines the ops)
from ..quant import ActQuantizer


class Convolution(NamedTuple):
    """Geometry of a convolution, transposed or not, without groups."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool = False


def _product_dtype(x: Tensor) -> torch.dtype:
    """What a product with ``x`` is computed in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _table(quantizer: ActQuantizer) -> Tensor:
    """Table of the quantizer as the ops take it: empty where codes are the integers."""
    table = quantizer.table()
    return quantizer.scale.new_empty(0, dtype=torch.uint8) if table is None else table


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Convolution | None):
    if geometry is None:
        return F.linear(x, weight, bias)
    stride, padding, dilation, transposed = geometry
    nothing = [0] * len(stride)
    return torch.ops.aten.convolution(
        x, weight, bias, stride, padding, dilation, transposed, nothing, 1
    )


def _cuts_patches(x: Tensor, weight: Tensor, geometry: Convolution) -> bool:
    """Whether every input pixel enters one output pixel, as in a patch embedding."""
    kernel = tuple(weight.shape[2:])
    return (
        not geometry.transposed
        and tuple(geometry.stride) == kernel
        and not any(geometry.padding)
        and max(geometry.dilation) == 1
        and all(size % cell == 0 for size, cell in zip(x.shape[2:], kernel, strict=True))
    )


def _patches_backward(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the input of a convolution that cuts patches: one matrix product. The general
    one of a CPU, with a kernel of 16, takes ten times as long."""
    _, channels, height, width = weight.shape
    batch, _, rows, columns = grad.shape
    pixels = grad.permute(0, 2, 3, 1).reshape(-1, grad.shape[1]) @ weight.flatten(1)
    pixels = pixels.view(batch, rows, columns, channels, height, width).permute(0, 3, 1, 4, 2, 5)
    return pixels.reshape(batch, channels, rows * height, columns * width)


def _multiply_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    geometry: Convolution | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias, as far as they are needed."""
    if geometry is not None:
        stride, padding, dilation, transposed = geometry
        nothing, sizes = [0] * len(stride), [grad.shape[1]]
        grad_x = None
        if needs[0] and _cuts_patches(x, weight, geometry):
            grad_x, needs = _patches_backward(grad, weight), (False, *needs[1:])
        grads = torch.ops.aten.convolution_backward(
            grad, x, weight, sizes, stride, padding, dilation, transposed, nothing, 1, list(needs)
        )
        return grads[0] if grad_x is None else grad_x, *grads[1:]
    rows = grad.reshape(-1, grad.shape[-1])
    grad_x = (rows @ weight).view(*grad.shape[:-1], -1) if needs[0] else None
    grad_weight = rows.T @ x.reshape(len(rows), -1) if needs[1] else None
    return grad_x, grad_weight, rows.sum(0) if needs[2] else None


class _CodedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale, offset, table, grid, factor, geometry):
        ops = torch.ops.gplq_mm
        dtype = _product_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            x_hat, state = ops.fake_quant(x, scale, offset, table, grid)
            out = _multiply(
                x_hat.to(dtype),
                weight.to(dtype),
                None if bias is None else bias.to(dtype),
                geometry,
            )
        ctx.save_for_backward(state, weight, scale, offset, table)
        ctx.settings = (grid, factor, geometry, x.dtype)
        return out

    @staticmethod
    def backward(ctx, grad):
        ops = torch.ops.gplq_mm
        state, weight, *parameters = ctx.saved_tensors
        grid, factor, geometry, input_dtype = ctx.settings
        quantizer = (*parameters, grid)
        needs = ctx.needs_input_grad
        learns = needs[0] or needs[3] or needs[4]
        x_hat = None
        # A convolution wants an input of the right shape even where its values play no part.
        if needs[1] or geometry is not None:
            x_hat = ops.fake_quant_values(state, *quantizer).to(grad.dtype)
        above, grad_weight, grad_bias = _multiply_backward(
            grad, x_hat, weight.to(grad.dtype), geometry, (learns, needs[1], needs[2])
        )
        del x_hat
        grad_x = grad_scale = grad_offset = None
        if learns:
            grad_x, grad_scale, grad_offset = ops.fake_quant_backward(above, state, *quantizer)
            grad_x, grad_scale = grad_x.to(input_dtype), grad_scale * factor
            grad_offset = grad_offset * factor if needs[4] else None
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_x, grad_weight, grad_bias, grad_scale, grad_offset, *[None] * 4


def coded_product(
    x: Tensor,
    quantizer: ActQuantizer,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Convolution | None = None,
) -> Tensor:
    """``product(quantizer(x), weight) + bias``, keeping the state of ``x`` for backward.

    Args:
        x: Input of the layer.
        quantizer: Of integers or levels, and calibrated (``quantizer.keeps_codes(x)`` says yes).
        weight: Of a Linear ``(out, in)`` or of a convolution.
        bias: ``(out,)`` or None.
        geometry: None for a Linear.
    """
    scale, offset = quantizer.grid()
    factor = quantizer._grad_scale(x)
    table = _table(quantizer)
    return _CodedProduct.apply(
        x, weight, bias, scale, offset, table, quantizer.state_grid, factor, geometry
    )


class _CodedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, weight1, bias1, scale1, offset1, weight2, bias2, scale2, offset2, tables, settings
    ):
        rows = x.reshape(-1, x.shape[-1]).to(_product_dtype(x))
        with torch.autocast(x.device.type, enabled=False):
            out, state, hidden = torch.ops.gplq_mm.mlp_fake_quant(
                rows,
                [weight1, weight2],
                [bias1, bias2],
                [scale1, scale2],
                [offset1, offset2],
                tables,
                settings[0],
            )
        kept = (state, hidden, weight1, weight2)
        ctx.save_for_backward(*kept, scale1, scale2, offset1, offset2, *tables)
        ctx.settings = (*settings, x.shape, x.dtype)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        state, hidden, weight1, weight2, *parameters = ctx.saved_tensors
        grids, factors, shape, dtype = ctx.settings
        grads = torch.ops.gplq_mm.mlp_fake_quant_backward(
            grad.reshape(-1, grad.shape[-1]),
            state,
            hidden,
            [weight1, weight2],
            parameters[:2],
            parameters[2:4],
            parameters[4:],
            grids,
        )
        x, of_weight1, of_weight2, of_bias1, of_bias2, *learned = grads
        results = (
            x.view(shape).to(dtype),
            of_weight1.to(weight1.dtype),
            of_bias1,
            learned[0] * factors[0],
            learned[2] * factors[0],
            of_weight2.to(weight2.dtype),
            of_bias2,
            learned[1] * factors[1],
            learned[3] * factors[1],
        )
        needs = ctx.needs_input_grad
        return *(part if needs[i] else None for i, part in enumerate(results)), None, None


def coded_mlp(
    x: Tensor,
    quantizers: tuple[ActQuantizer, ActQuantizer],
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """``linear2(quantizer2(gelu(linear1(quantizer1(x)))))``, keeping the state of ``x`` and
    the input of the GELU.

    Args:
        x: ``(..., in)``.
        quantizers: Of the inputs of both layers, as in :func:`coded_product`.
        weights: ``(hidden, in)`` and ``(out, hidden)``.
        biases: ``(hidden,)`` and ``(out,)``, or None.
    """
    first, second = quantizers
    # Only the number of hidden values counts; nothing of their size is made.
    hidden = x.new_empty(()).expand(*x.shape[:-1], len(weights[0]))
    (scale1, offset1), (scale2, offset2) = first.grid(), second.grid()
    factors = (first._grad_scale(x), second._grad_scale(hidden))
    return _CodedMlp.apply(
        x,
        weights[0],
        biases[0],
        scale1,
        offset1,
        weights[1],
        biases[1],
        scale2,
        offset2,
        [_table(first), _table(second)],
        ([*first.state_grid, *second.state_grid], factors),
    )


class _CodedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        query,
        key,
        value,
        bias,
        mask,
        tables,
        factor,
        grids,
        factors,
        row_relative,
        *parameters,
    ):
        scales, offsets = list(parameters[:4]), list(parameters[4:])
        dtype = _product_dtype(query)
        with torch.autocast(query.device.type, enabled=False):
            out, *kept = torch.ops.gplq_mm.attention_fake_quant(
                query.to(dtype),
                key,
                value,
                factor,
                bias,
                mask,
                scales,
                offsets,
                tables,
                grids,
                row_relative,
            )
        ctx.save_for_backward(*kept, bias, mask, *tables, *parameters)
        ctx.settings = (factor, grids, factors, row_relative, query.dtype)
        return out

    @staticmethod
    def backward(ctx, grad):
        # Read once: checkpointing gives every tensor out a single time.
        query, key, value, total, bias, mask, *quantizers = ctx.saved_tensors
        tables, scales, offsets = quantizers[:4], quantizers[4:8], quantizers[8:]
        factor, grids, factors, row_relative, dtype = ctx.settings
        grads = torch.ops.gplq_mm.attention_fake_quant_backward(
            grad,
            [query, key, value],
            total,
            factor,
            bias,
            mask,
            scales,
            offsets,
            tables,
            grids,
            row_relative,
        )
        inputs = [part.to(dtype) for part in grads[:3]]
        learned = [
            part * factors[i % 4] if needed else None
            for i, (part, needed) in enumerate(
                zip(grads[4:], ctx.needs_input_grad[10:], strict=True)
            )
        ]
        return *inputs, None if bias is None else grads[3], *[None] * 6, *learned


def coded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factor: float,
    quantizers: list[ActQuantizer],
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Softmax attention of quantized operands that keeps the states of q, k and v for backward.

    Args:
        query: ``(B, heads, N, d)``.
        key, value: ``(B, heads, M, d)``.
        factor: Factor on the scores.
        quantizers: Of q, k, v and the probabilities, as in :func:`coded_product`.
        bias: ``(heads, N, M)`` added to the scores, or None.
        mask: ``(windows, N, M)`` added to the scores of item ``i % windows``, or None.

    Returns:
        ``(B, heads, N, d)``.
    """
    grids = [quantizer.grid() for quantizer in quantizers]
    # Only the number of probabilities counts; nothing of their size is made.
    probs = query.new_empty(()).expand(*query.shape[:-1], key.shape[-2])
    factors = [
        quantizer._grad_scale(x)
        for quantizer, x in zip(quantizers, (query, key, value, probs), strict=True)
    ]
    return _CodedAttention.apply(
        query,
        key,
        value,
        None if bias is None else bias.float(),
        None if mask is None else mask.float(),
        [_table(quantizer) for quantizer in quantizers],
        factor,
        [number for quantizer in quantizers for number in quantizer.state_grid],
        factors,
        quantizers[3].row_relative,
        *(scale for scale, _ in grids),
        *(offset for _, offset in grids),
    )
