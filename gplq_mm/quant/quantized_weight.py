"""The result of weight quantization: integers and what turns them back into a weight."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight matrix ``(out, K)`` as ``row_scale * multiplier * code``.

    Attributes:
        codes: int8 ``(out, K)``, columns in stored order.
        row_scale: float32 ``(out,)``, real value of one integer step of ``multiplier * code``.
        multiplier: uint8 ``(out, G)``, one integer per row and group, 1..15;
            ``G = ceil(K / group_size)``. With float group scales float32, the scale of a group
            in units of the row's.
        permutation: int64 ``(K,)``: stored column j is column ``permutation[j]`` of the weight.
        group_size: Number of neighbouring stored columns that share a multiplier.
    """

    codes: Tensor
    row_scale: Tensor
    multiplier: Tensor
    permutation: Tensor
    group_size: int

    def expand_multiplier(self) -> Tensor:
        """Multiplier of every stored column, ``(out, K)``."""
        return self.multiplier.repeat_interleave(self.group_size, 1)[:, : self.codes.shape[1]]

    def integers(self) -> Tensor:
        """``multiplier * code`` in the order of the weight's own columns, int16 ``(out, K)``.

        With float group scales these are no integers, and float32.
        """
        factors = self.expand_multiplier()
        dtype = factors.dtype if factors.is_floating_point() else torch.int16
        stored = self.codes.to(dtype) * factors.to(dtype)
        result = torch.empty_like(stored)
        result[:, self.permutation] = stored
        return result

    def dequantize(self) -> Tensor:
        """Real weight in its own column order, float32 ``(out, K)``."""
        return self.integers().to(self.row_scale.dtype) * self.row_scale[:, None]
