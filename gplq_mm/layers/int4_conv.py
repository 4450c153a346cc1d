"""Packed convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import library as _library  # noqa: F401  (defines the ops)
from .int4_weight import Int4WeightLayer

_conv2d = torch.ops.gplq_mm.int4_conv2d.default
_accumulate = torch.ops.gplq_mm.int4_accumulate.default


class Int4Conv2d(Int4WeightLayer):
    """Quantizes its input, multiplies integers and rescales, in one op.

    Input ``(N, in, H, W)``, output ``(N, out, H', W')`` of the same dtype and memory format.
    """

    sizes = ('in_channels', 'out_channels', 'kernel_size', 'stride', 'padding', 'dilation')

    def forward(self, x: Tensor) -> Tensor:
        geometry = [*self.kernel_size, *self.stride, *self.padding, *self.dilation]
        out = _conv2d(x, self.operands(), self.grid, geometry)
        # The op writes channels last. Readers such as mmcv's RoIAlign take the memory of a map as
        # they expect it, so it is that of the input, as with torch's own convolution.
        return out.contiguous() if x.is_contiguous() else out

    def accumulate(self, x: Tensor) -> Tensor:
        """int32 ``(N, out, H', W')``."""
        columns = F.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)
        sums = _accumulate(columns.transpose(1, 2).contiguous(), self.operands(), self.grid)
        size = [
            (extent + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for extent, kernel, stride, padding, dilation in zip(
                x.shape[2:],
                self.kernel_size,
                self.stride,
                self.padding,
                self.dilation,
                strict=True,
            )
        ]
        return sums.transpose(1, 2).reshape(x.shape[0], self.out_channels, *size)

    def _shape_repr(self) -> str:
        return (
            f'{self.in_channels} -> {self.out_channels}, kernel {tuple(self.kernel_size)}, '
            f'stride {tuple(self.stride)}'
        )
