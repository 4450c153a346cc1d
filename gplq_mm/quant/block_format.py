"""Formats with a scale for every few neighbours along K: MXFP4 and NVFP4. Simulated only.

Elements are e2m1: a sign and 0, 0.5, 1, 1.5, 2, 3, 4 or 6. A code here is an element in halves, an
integer from -12 to 12, and its step half of the block's scale; so codes of weights are kept as
those of integers are. Block scales of weights are searched and stay; those of activations follow
the values, block by block along the last axis.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import FORMATS
from .format import TINY_RANGE, Format
from .functional import round_e2m1_

LARGEST_ELEMENT = 6.0
E4M3 = torch.float8_e4m3fn
LARGEST_E4M3, LEAST_E4M3 = 448.0, 2.0**-9
# Exponents of an e8m0.
LARGEST_E8M0 = 127


class BlockFormat(Format):
    """e2m1 elements in blocks with a scale each, times one scale of the tensor.

    Attributes:
        block_size: Columns of a block; the last one of a row may be short.
        tensor_bytes: Bytes of the scale of the tensor in a file.
    """

    widths = (4,)
    activation = dict(
        bits=4, zero_point='none', granularity='tensor', observer='minmax', reparametrize=False
    )
    # Along the last axis: products of a convolution, and with the values of an attention, do not
    # sum along it.
    sites = ('linear', 'q', 'k', 'probs')
    learns_scale = False
    block_size: int
    tensor_bytes = 0

    def __init__(self, *_args):
        super().__init__(bits=4, zero_point='none', signed=True)
        self.qmin, self.qmax = -12, 12

    def tensor_scale(self, largest: Tensor) -> Tensor:
        """Real value of a block scale of 1, for a tensor of magnitudes up to ``largest``."""
        raise NotImplementedError

    def block_scale(self, largest: Tensor) -> Tensor:
        """Scale that the format's conversion gives a block of magnitudes up to ``largest``, which
        are in units of :meth:`tensor_scale`."""
        raise NotImplementedError

    def scales_around(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The largest block scale not above, and the smallest not below a wanted one, as far as
        the format reaches."""
        raise NotImplementedError

    def cover(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return self.tensor_scale(torch.maximum(high, -low)), torch.zeros_like(high)

    def round_(self, steps: Tensor) -> Tensor:
        return round_e2m1_(steps)

    def _steps(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` in steps, ``(..., blocks, block_size)``, and the step ``(..., blocks, 1)``."""
        padded = F.pad(x, (0, -x.shape[-1] % self.block_size))
        blocks = padded.unflatten(-1, (-1, self.block_size))
        step = self.block_scale(blocks.abs().amax(-1, keepdim=True) / scale) * (scale / 2)
        return blocks / step, step

    def codes(self, x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        return self.round_(self._steps(x, scale)[0]).flatten(-2)[..., : x.shape[-1]]

    def nearest(self, x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        steps, step = self._steps(x, scale)
        return self.round_(steps).mul_(step).flatten(-2)[..., : x.shape[-1]]

    def clips(self, x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        # Half of the distance of the outermost elements beyond the last of them.
        beyond = self._steps(x, scale)[0].abs() > 2 * (LARGEST_ELEMENT + 1)
        return beyond.flatten(-2)[..., : x.shape[-1]]

    def bytes(self, rows: int, columns: int) -> int:
        blocks = -(-columns // self.block_size)
        return super().bytes(rows, columns) + rows * blocks + self.tensor_bytes


@FORMATS.register_module(name='mxfp4')
class MXFP4Format(BlockFormat):
    """Blocks of 32 with an e8m0 scale, a power of two (OCP Microscaling Formats 1.0)."""

    weight = dict(bits=4, layout='raw', group_size=32, group_scale='float')
    block_size = 32

    def tensor_scale(self, largest: Tensor) -> Tensor:
        return torch.ones_like(largest)

    @staticmethod
    def _power(exponent: Tensor) -> Tensor:
        # The bits of an e8m0 are its exponent plus 127.
        bits = exponent.clamp(-LARGEST_E8M0, LARGEST_E8M0) + LARGEST_E8M0
        return bits.to(torch.uint8).view(torch.float8_e8m0fnu).float()

    def block_scale(self, largest: Tensor) -> Tensor:
        # The power of two of the largest value to that of the largest element, 4 (section 6.3);
        # frexp gives one exponent more.
        return self._power(torch.frexp(largest).exponent - 3)

    def scales_around(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        mantissa, exponent = torch.frexp(wanted)
        return self._power(exponent - 1), self._power(exponent - (mantissa == 0.5).int())


@FORMATS.register_module(name='nvfp4')
class NVFP4Format(BlockFormat):
    """Blocks of 16 with an e4m3 scale, and one float32 a tensor."""

    weight = dict(bits=4, layout='raw', group_size=16, group_scale='float')
    block_size = 16
    tensor_bytes = 4

    def tensor_scale(self, largest: Tensor) -> Tensor:
        return largest.clamp(min=TINY_RANGE) / (LARGEST_E4M3 * LARGEST_ELEMENT)

    @staticmethod
    def _rounded(scale: Tensor) -> Tensor:
        return scale.clamp(LEAST_E4M3, LARGEST_E4M3).to(E4M3)

    def block_scale(self, largest: Tensor) -> Tensor:
        return self._rounded(largest / LARGEST_ELEMENT).to(largest.dtype)

    def scales_around(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        wanted = wanted.clamp(LEAST_E4M3, LARGEST_E4M3)
        nearest = self._rounded(wanted)
        # Positive numbers are in the order of their bits.
        bits, value = nearest.view(torch.uint8), nearest.to(wanted.dtype)
        below, above = bits - (value > wanted).byte(), bits + (value < wanted).byte()
        return below.view(E4M3).to(wanted.dtype), above.view(E4M3).to(wanted.dtype)
