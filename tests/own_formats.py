"""Formats of a user's own, and how tests register them for a moment."""

import torch

from gplq_mm.quant import Format, IntegerFormat
from gplq_mm.registry import FORMATS


class EvenScale(IntegerFormat):
    """Integers; scales are multiples of 1/64."""

    weight = None

    def cover(self, low, high):
        scale, offset = super().cover(low, high)
        even = (scale * 64).ceil() / 64
        return even, (offset / even).round() * even if self.zero_point == 'integer' else offset

    def constrain(self, scale):
        even = (scale.detach() * 64).round().clamp(min=1) / 64
        return even + (scale - scale.detach())


class SquareRoot(Format):
    """Code q stands for ``scale * q**2``. For values that are not negative."""

    activation = dict(zero_point='none', signed=False)
    sites = ('linear', 'probs')

    def cover(self, low, high):
        return high.clamp(min=1e-8) / self.qmax**2, torch.zeros_like(high)

    def codes(self, x, scale, offset):
        return (x / scale).clamp(min=0).sqrt().round().clamp(max=self.qmax)

    def values(self, codes, scale, offset):
        return codes.square() * scale


def register_for(monkeypatch) -> None:
    """Registers ``'even_scale'`` and ``'square_root'`` until the end of a test."""
    monkeypatch.setitem(FORMATS.module_dict, 'even_scale', EvenScale)
    monkeypatch.setitem(FORMATS.module_dict, 'square_root', SquareRoot)
