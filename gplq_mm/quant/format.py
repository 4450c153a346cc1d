"""What a code stands for, of activations and of weights.

Whoever looks for scales, rounds or trains asks the format of a spec (``spec.code_format``). A
format holds nothing of a tensor: scale and offset are handed to it.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from ..registry import FORMATS
from .functional import (
    dequantize_log_sqrt2,
    fake_quantize,
    fake_quantize_log_sqrt2,
    quantize,
    quantize_log_sqrt2,
    round_steps_,
    to_steps,
)

# Kinds of sites that have an activation.
SITES = ('linear', 'conv', 'q', 'k', 'v', 'probs')
# Ranges of observed values that are narrower count as this wide.
TINY_RANGE = 1e-8


class Format:
    """What the codes ``qmin..qmax`` stand for.

    A subclass that is registered in ``gplq_mm.registry.FORMATS`` can be named in a policy.

    Args:
        bits: Width of a code.
        zero_point: ``'none'``, ``'float'`` or ``'integer'``, as in :class:`.spec.ActSpec`.
        signed: Whether codes without a zero-point start below 0.
        largest: Magnitude that no code exceeds, or None.
    """

    # Widths of a code that it has.
    widths: Collection[int] = range(2, 9)
    # Settings of the specs that the format leaves no choice in; None: it is not meant for them.
    activation: dict | None = {}
    weight: dict | None = None
    # Kinds of sites whose activations may have it.
    sites: tuple[str, ...] = SITES
    # Whether a code q stands for ``scale * q + offset``: products are those of integers then,
    # scales can be folded into the weight that follows, and a frozen layer can be deployed.
    is_integer_product: bool = False
    # Whether the scale of an activation is a parameter of training.
    learns_scale: bool = True
    # Whether codes stand for chosen integers. Then `codes`, `nearest` and `fake_quantize` are given
    # their table as a last argument (:func:`.functional.look_up`).
    has_levels: bool = False
    # Columns with a scale of their own in the format; None: scales are those of the spec.
    block_size: int | None = None

    def __init__(
        self,
        bits: int,
        zero_point: str = 'none',
        signed: bool = True,
        largest: int | None = None,
    ):
        self.bits = bits
        self.zero_point = zero_point
        self.signed = signed
        self.qmin, self.qmax = 0, 2**bits - 1
        if zero_point == 'none' and signed:
            self.qmin, self.qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        if largest is not None:
            self.qmin, self.qmax = max(self.qmin, -largest), min(self.qmax, largest)

    def cover(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Grid that covers ``[low, high]``; where calibration looks for its scales.

        Args:
            low, high: Ends of the range, ``(channels,)``.

        Returns:
            Scale (positive) and offset, ``(channels,)`` each. The offset of a symmetric grid is
            zero, and that of an integer zero-point a multiple of the scale.
        """
        raise NotImplementedError

    def codes(self, x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        """Codes of ``x`` in its own floating dtype; a new tensor.

        Args:
            x: Values, any shape.
            scale, offset: Of :meth:`cover`, broadcastable to ``x``.
        """
        raise NotImplementedError

    def values(self, codes: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        """What codes stand for; they may be overwritten. Arguments as in :meth:`codes`."""
        raise NotImplementedError

    def nearest(self, x: Tensor, scale: Tensor, offset: Tensor | None, *table: Tensor) -> Tensor:
        """Values that ``x`` is rounded to, without gradients; arguments as in :meth:`codes`."""
        return self.values(self.codes(x, scale, offset, *table), scale, offset)

    def round_(self, steps: Tensor) -> Tensor:
        """Codes of values that are given in units of the scale, in place; for weights."""
        raise NotImplementedError

    def codes_at(self, weight: Tensor, step: Tensor) -> Tensor:
        """Codes of a weight at given steps of a code, a new tensor."""
        return self.round_(to_steps(weight, step, None))

    def fake_quantize(
        self, x: Tensor, scale: Tensor, offset: Tensor | None, grad_scale: float
    ) -> Tensor:
        """:meth:`nearest` of ``x`` for training: here the gradient passes straight through.

        Args:
            x, scale, offset: As in :meth:`codes`.
            grad_scale: Factor on the gradients of scale and offset, if they have any.

        Returns:
            Shape and dtype of ``x``.
        """
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            value = self.nearest(x.float(), scale, offset).to(x.dtype)
        # The difference is exactly zero; it carries the gradient.
        return value + (x - x.detach())

    def clips(self, x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        """Which values of ``x`` lie beyond the outermost ones; bool, shape of ``x``."""
        raise NotImplementedError

    def constrain(self, scale: Tensor) -> Tensor:
        """The scale in force for a learned one; differentiable."""
        return scale

    def bytes(self, rows: int, columns: int) -> int:
        """Bytes of the codes of a weight ``(rows, columns)`` in a file, with scales that belong to
        the format: two codes to a byte up to 4 bits."""
        return rows * ((columns + 1) // 2 if self.bits <= 4 else columns)


@FORMATS.register_module(name='integer')
class IntegerFormat(Format):
    """Equidistant: code q stands for ``scale * q + offset`` (LSQ, LSQ+)."""

    weight = {}
    is_integer_product = True

    def cover(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if self.zero_point == 'none':
            reach = torch.maximum(high, -low) if self.signed else high
            return reach.clamp(min=TINY_RANGE) / self.qmax, torch.zeros_like(high)
        if self.zero_point == 'integer':
            low, high = low.clamp(max=0), high.clamp(min=0)
        # A constant channel: any scale will do as long as it can be represented beside its
        # offset in float32.
        floor = torch.maximum(low.abs(), high.abs()) * 1e-6
        scale = torch.maximum(high - low, floor.clamp(min=TINY_RANGE)) / (self.qmax - self.qmin)
        if self.zero_point == 'integer':
            zero_point = (-low / scale).round().clamp(self.qmin, self.qmax)
            return scale, -scale * zero_point
        return scale, low

    def round_(self, steps: Tensor) -> Tensor:
        return round_steps_(steps, self.qmin, self.qmax)

    def codes(self, x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        return quantize(x, scale, offset, self.qmin, self.qmax)

    def values(self, codes: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        codes.mul_(scale)
        return codes if offset is None else codes.add_(offset)

    def fake_quantize(
        self, x: Tensor, scale: Tensor, offset: Tensor | None, grad_scale: float
    ) -> Tensor:
        return fake_quantize(x, scale, offset, self.qmin, self.qmax, grad_scale)

    def clips(self, x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        steps = x if offset is None else x - offset
        return (steps < (self.qmin - 0.5) * scale) | (steps > (self.qmax + 0.5) * scale)


@FORMATS.register_module(name='log_sqrt2')
class LogSqrt2Format(Format):
    """Zero and powers of sqrt(2) up to the scale, for attention probabilities (RepQ-ViT, eq. 9)."""

    activation = dict(zero_point='none', signed=False)
    sites = ('probs',)

    def cover(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return high.clamp(min=TINY_RANGE), torch.zeros_like(high)

    def codes(self, x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        return quantize_log_sqrt2(x, scale, self.qmax)

    def values(self, codes: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        return dequantize_log_sqrt2(codes, scale, self.qmax)

    def fake_quantize(
        self, x: Tensor, scale: Tensor, offset: Tensor | None, grad_scale: float
    ) -> Tensor:
        return fake_quantize_log_sqrt2(x, scale, self.qmax, grad_scale)

    def clips(self, x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        return x > scale
