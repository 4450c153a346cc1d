"""Packed linear layer."""

import torch
from torch import Tensor

from ..ops import library as _library  # noqa: F401  (defines the ops)
from .int4_weight import Int4WeightLayer

_linear = torch.ops.gplq_mm.int4_linear.default
_accumulate = torch.ops.gplq_mm.int4_accumulate.default


class Int4Linear(Int4WeightLayer):
    """Quantizes its input, multiplies integers and rescales, in one op.

    Input ``(..., in_features)`` of any floating dtype, output ``(..., out_features)`` of the same.
    """

    sizes = ('in_features', 'out_features')

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x.contiguous(), self.operands(), self.grid)

    def accumulate(self, x: Tensor) -> Tensor:
        """int32 ``(..., out_features)``."""
        return _accumulate(x.contiguous(), self.operands(), self.grid)

    def _shape_repr(self) -> str:
        return f'{self.in_features} -> {self.out_features}'
