"""Packed transposed convolution."""

import torch
from torch import Tensor

from ..ops import library as _library  # noqa: F401  (defines the ops)
from .int4_weight import Int4WeightLayer

_linear = torch.ops.gplq_mm.int4_linear.default
_accumulate = torch.ops.gplq_mm.int4_accumulate.default


class Int4ConvTranspose2d(Int4WeightLayer):
    """The product of every input pixel with the whole kernel, laid out as a cell of the output.

    Input ``(N, in, H, W)`` of any floating dtype, output ``(N, out, H * kh, W * kw)`` of the same.
    """

    sizes = ('in_channels', 'out_channels', 'kernel_size')

    def forward(self, x: Tensor) -> Tensor:
        return self._cells(_linear(_pixels(x), self.operands(), self.grid))

    def accumulate(self, x: Tensor) -> Tensor:
        """int32 ``(N, out, H * kh, W * kw)``."""
        return self._cells(_accumulate(_pixels(x), self.operands(), self.grid))

    def _cells(self, products: Tensor) -> Tensor:
        """``(N, H, W, out * kh * kw)`` to ``(N, out, H * kh, W * kw)``."""
        n, height, width, _ = products.shape
        kh, kw = self.kernel_size
        cells = products.view(n, height, width, self.out_channels, kh, kw)
        cells = cells.permute(0, 3, 1, 4, 2, 5)
        return cells.reshape(n, self.out_channels, height * kh, width * kw)

    def _shape_repr(self) -> str:
        return f'{self.in_channels} -> {self.out_channels}, kernel {self.kernel_size}'


def _pixels(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()
