"""The ops of a deployed model in ONNX: int4 between QuantizeLinear and DequantizeLinear.

A packed layer becomes::

    activations: Gather columns, Mul inverse, Add shift, QuantizeLinear, DequantizeLinear (scale 1)
    weight:      int4 codes, DequantizeLinear (blocks, scale = group multiplier)
    output:      MatMul of both, Sub correction, Mul row scale, Add bias

The activation scale is folded into the weight, so the code itself is what is multiplied: both
sides of the MatMul hold integers, and float32 adds them exactly as long as the sum stays below
2**24. These are the integers of :mod:`gplq_mm.ops.reference`. A block of DequantizeLinear must be
neighbouring columns, so the input's columns are brought into the stored order, in which groups
are neighbours. Between the layers of an MLP that order is given to the rows of the first layer.
A weight of more than 4 bits is a byte ``multiplier * code``, without blocks and without order.
Chosen levels are bytes too: QuantizeLinear gives a position, Gather the level, DequantizeLinear
(scale 1) what is multiplied.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir
import torch
from onnxscript import opset21 as op
from torch import Tensor
from torch.export import ExportedProgram

from ...ops.reference import LAYER_FIELDS
from ...quant.packing import unpack_multiplier_panels, unpack_panels


@dataclass
class _Layer:
    """A packed layer as ONNX needs it, K columns in the order of ``columns``.

    Attributes:
        codes: int8 ``(N, K)``.
        multiplier: float32 ``(N, G)``, or None where all are 1.
        columns: int64 ``(K,)``: which input column each column meets; None for all in order.
        inverse, shift: float32 ``(K,)``, the activation grid.
        limits: Smallest and largest activation code.
        group_size: Columns that share a multiplier.
        bits: 4 or 8, of a stored weight code.
        row_scale, bias, correction: float32 ``(N,)``.
        table: uint8 ``(64,)``, the levels of the activation's codes, or ``(0,)`` for none.
    """

    codes: Tensor
    multiplier: Tensor | None
    columns: Tensor | None
    inverse: Tensor
    shift: Tensor
    limits: tuple[int, int]
    group_size: int
    bits: int
    row_scale: Tensor
    bias: Tensor
    correction: Tensor
    table: Tensor

    @classmethod
    def of(cls, tensors: list[Tensor], grid: list[int]) -> '_Layer':
        """From the ``layer`` and ``grid`` of an op."""
        packed = dict(zip(LAYER_FIELDS, tensors, strict=True))
        low, high, group_size = grid
        rows, position = packed['row_scale'].shape[0], packed['position'].long()
        codes = unpack_panels(packed['weight'], rows)
        multiplier = unpack_multiplier_panels(packed['multiplier'], rows)
        integers = codes * multiplier.repeat_interleave(group_size, 1)[:, : codes.shape[1]]
        sums = integers.long().sum(1)
        columns = position.argsort()
        if packed['weight'].dtype != torch.uint8 or bool((multiplier == 1).all()):
            # A byte holds multiplier and code together.
            codes, multiplier, columns = integers.to(torch.int8)[:, position], None, None
        elif torch.equal(columns, torch.arange(len(columns))):
            columns = None
        order = slice(None) if columns is None else columns
        return cls(
            codes=codes,
            multiplier=None if multiplier is None else multiplier.float(),
            columns=columns,
            inverse=packed['inverse'][order],
            shift=packed['shift'][order],
            limits=(low, high),
            group_size=group_size,
            bits=4 if packed['weight'].dtype == torch.uint8 else 8,
            row_scale=packed['row_scale'],
            bias=packed['bias'],
            # The op's codes start at 0, those of the graph at the smallest code.
            correction=(packed['correction'].long() + low * sums).float(),
            table=packed['table'],
        )

    def take_rows(self, rows: Tensor | None) -> None:
        """Brings the outputs into the order of ``rows``, in place."""
        if rows is None:
            return
        for name in ('codes', 'multiplier', 'row_scale', 'bias', 'correction'):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[rows])


def _full_range(bits: int, signed: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


class Translation:
    """How the ops of a program are written in ONNX.

    Args:
        program: The program; the packed weights are taken from it, since ONNX has another layout.
    """

    def __init__(self, program: ExportedProgram):
        signature = program.graph_signature
        targets = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        stored = {**program.state_dict, **program.constants}
        self.tensors = {name: stored[target].detach().cpu() for name, target in targets.items()}

    def table(self) -> dict[Callable, Callable]:
        """Op -> function of ONNX values. A list of tensors arrives as a list of values."""
        ops = torch.ops.gplq_mm

        # Plain functions: torch keeps notes on them, which a bound method does not take.
        def linear(x, layer, grid):
            return self.linear(x, self.layer(layer, grid))

        def linear_add(x, layer, grid, residual, gamma):
            return self.add(residual, self.linear(x, self.layer(layer, grid)), gamma)

        def norm_linear(x, norm_weight, norm_bias, eps, layer, grid):
            x = self.norm(x, norm_weight, norm_bias, eps)
            return self.linear(x, self.layer(layer, grid))

        def mlp(x, norm_weight, norm_bias, eps, layer1, grid1, layer2, grid2, gamma):
            first, second = self.layer(layer1, grid1), self.layer(layer2, grid2)
            first.take_rows(second.columns)
            second.columns = None
            hidden = self.linear(self.norm(x, norm_weight, norm_bias, eps), first)
            return self.add(x, self.linear(op.Gelu(hidden), second), gamma)

        def conv2d(x, layer, grid, geometry):
            return self.conv2d(x, self.layer(layer, grid), geometry)

        def attention(
            qkv, heads, scale, grids, limits, tables, row_relative, bias, mask, rows, out_rows
        ):  # fmt: skip
            windows = qkv if rows is None else op.Gather(qkv, rows, axis=0)
            levels = [self.tensors[table.name] for table in tables]
            grids = self.tensors[grids.name]
            quantizers = list(zip(grids, limits[::2], limits[1::2], levels, strict=True))
            out = self.attention(windows, heads, scale, quantizers, row_relative, bias, mask)
            return out if rows is None else self.scatter(qkv, rows, out, out_rows)

        return {
            ops.int4_linear.default: linear,
            ops.int4_linear_add.default: linear_add,
            ops.int4_norm_linear.default: norm_linear,
            ops.int4_mlp.default: mlp,
            ops.int4_conv2d.default: conv2d,
            ops.int4_attention.default: attention,
        }

    # -- values ---------------------------------------------------------------------------

    def layer(self, values: list, grid: list[int]) -> _Layer:
        return _Layer.of([self.tensors[value.name] for value in values], list(grid))

    def constant(self, value: Tensor | float | list[int]):
        """Constant of the value's own type; a list holds int64."""
        return op.Constant(value=onnx_ir.tensor(np.asarray(value)))

    def integers(self, value: Tensor, bits: int, signed: bool):
        """Constant of 4- or 8-bit integers."""
        kind = f'{"" if signed else "U"}INT{bits}'
        dtype = onnx_ir.DataType[kind]
        array = value.numpy().astype(dtype.numpy())
        return op.Constant(value=onnx_ir.Tensor(array, dtype=dtype))

    # -- parts ----------------------------------------------------------------------------

    def codes(self, x, inverse: Tensor, shift: Tensor, limits: tuple[int, int], table: Tensor):
        """Activation codes or levels in float32, through a 4- or 8-bit tensor; a table is
        ``(64,)``, ``(heads, 64)`` or empty."""
        signed = limits[0] < 0
        steps = op.Add(op.Mul(x, self.constant(inverse)), self.constant(shift))
        bits = 4 if limits == _full_range(4, signed) else 8
        if limits != _full_range(bits, signed):
            # ONNX Runtime 1.32 does not load Clip in front of 4 bits: narrower codes take a byte.
            low, high = (self.constant(np.float32(limit)) for limit in limits)
            steps = op.Clip(steps, low, high)
        one = self.constant(np.float32(1))
        zero = self.integers(torch.tensor(0), bits, signed)
        codes = op.QuantizeLinear(steps, one, zero)
        if table.numel():
            index = op.Cast(codes, to=onnx_ir.DataType.INT64)
            if table.dim() == 2:
                heads, size = table.shape
                begins = torch.arange(0, heads * size, size)[:, None, None]
                index = op.Add(index, self.constant(begins))
            codes = op.Gather(self.constant(table.flatten()), index)
        return op.DequantizeLinear(codes, one)

    def weight(self, layer: _Layer, axis: int):
        """``multiplier * code`` in float32: ``(N, K)`` with the columns on axis 1, or its
        transpose with them on axis 0."""
        turn = (lambda t: t.T.contiguous()) if axis == 0 else (lambda t: t)
        codes = self.integers(turn(layer.codes), layer.bits, signed=True)
        if layer.multiplier is None:
            return op.DequantizeLinear(codes, self.constant(np.float32(1)))
        scale = self.constant(turn(layer.multiplier))
        return op.DequantizeLinear(codes, scale, axis=axis, block_size=layer.group_size)

    def rescale(self, sums, layer: _Layer, shape: tuple[int, ...]):
        """``(sums - correction) * row_scale + bias``, rows on the axis that ``shape`` says."""
        if layer.correction.any():
            sums = op.Sub(sums, self.constant(layer.correction.reshape(shape)))
        scaled = op.Mul(sums, self.constant(layer.row_scale.reshape(shape)))
        return op.Add(scaled, self.constant(layer.bias.reshape(shape)))

    def linear(self, x, layer: _Layer):
        if layer.columns is not None:
            x = op.Gather(x, self.constant(layer.columns), axis=-1)
        codes = self.codes(x, layer.inverse, layer.shift, layer.limits, layer.table)
        return self.rescale(op.MatMul(codes, self.weight(layer, axis=0)), layer, (-1,))

    def norm(self, x, weight, bias, eps: float):
        # Its other outputs are mean and deviation.
        return op.LayerNormalization(x, weight, bias, axis=-1, epsilon=eps)[0]

    def add(self, residual, out, gamma):
        return op.Add(residual, out if gamma is None else op.Mul(out, gamma))

    def conv2d(self, x, layer: _Layer, geometry: list[int]):
        kernel, stride, padding, dilation = (list(geometry[i : i + 2]) for i in (0, 2, 4, 6))
        rows, columns = layer.codes.shape
        taps = kernel[0] * kernel[1]
        shape = [rows, columns // taps, *kernel]
        # A grid is one of channels, the same for every tap; its order is that of the columns.
        natural = layer.inverse, layer.shift
        if layer.columns is not None:
            natural = tuple(t[layer.columns.argsort()] for t in natural)
        inverse, shift = (t.reshape(-1, taps)[:, 0].reshape(-1, 1, 1) for t in natural)
        if any(padding):
            # Before the codes: a real zero gets the code that stands for it.
            x = op.Pad(x, self.constant([0, 0, *padding, 0, 0, *padding]))
        codes = self.codes(x, inverse, shift, layer.limits, layer.table)
        weight = self.weight(layer, axis=1)
        if layer.columns is not None:
            weight = op.Gather(weight, self.constant(layer.columns.argsort()), axis=1)
        weight = op.Reshape(weight, self.constant(shape))
        sums = op.Conv(codes, weight, strides=stride, dilations=dilation, kernel_shape=kernel)
        return self.rescale(sums, layer, (-1, 1, 1))

    def attention(
        self, qkv, heads: int, scale: float, quantizers: list, row_relative: bool, bias, mask
    ):
        """Attention of ``(B, N, 3C)`` to ``(B, N, C)``."""
        parts = op.Reshape(qkv, self.constant([0, 0, 3, heads, -1]))
        parts = op.Split(op.Transpose(parts, perm=[2, 0, 3, 1, 4]), axis=0, num_outputs=3)
        query, key, value = (
            self.on_grid(op.Squeeze(part, self.constant([0])), *quantizer)
            for part, quantizer in zip(parts, quantizers[:3], strict=True)
        )
        scores = op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2]))
        scores = op.Mul(scores, self.constant(np.float32(scale)))
        if bias is not None:
            scores = op.Add(scores, bias)
        if mask is not None:
            windows = op.Concat(
                self.constant([-1]), op.Shape(mask, end=1), op.Shape(scores, start=1), axis=0
            )
            flat = op.Shape(scores)
            scores = op.Add(op.Reshape(scores, windows), op.Unsqueeze(mask, self.constant([1])))
            scores = op.Reshape(scores, flat)
        last = self.constant([-1])
        if row_relative:
            numerator = op.Exp(op.Sub(scores, op.ReduceMax(scores, last, keepdims=1)))
            denominator = op.ReduceSum(numerator, last, keepdims=1)
            out = op.Div(op.MatMul(self.on_grid(numerator, *quantizers[3]), value), denominator)
        else:
            out = op.MatMul(self.on_grid(op.Softmax(scores, axis=-1), *quantizers[3]), value)
        out = op.Transpose(out, perm=[0, 2, 1, 3])
        return op.Reshape(out, self.constant([0, 0, -1]))

    def on_grid(self, x, grid: Tensor, low: int, high: int, table: Tensor):
        """``(B, heads, N, d)`` on its grid ``(2, heads)`` of scale and offset."""
        scale, offset = grid[0][:, None, None], grid[1][:, None, None]
        inverse = scale.reciprocal()
        codes = self.codes(x, inverse, offset * -inverse, (low, high), table)
        values = op.Mul(codes, self.constant(scale))
        return op.Add(values, self.constant(offset)) if offset.any() else values

    def scatter(self, qkv, rows, out, out_rows):
        """Windows ``(W, N, C)`` back to rows ``(out_rows, C)``."""
        # Every row is written once, except a padding row behind them, which is cut off again.
        blank = op.Split(qkv, axis=1, num_outputs=3)[0]
        indices = op.Unsqueeze(op.Cast(rows, to=onnx_ir.DataType.INT64), self.constant([-1]))
        result = op.ScatterND(blank, indices, out)
        if isinstance(out_rows, int):
            end = self.constant([out_rows])
        else:
            end = op.Reshape(out_rows, self.constant([1]))
        return op.Slice(result, self.constant([0]), end, self.constant([0]))
