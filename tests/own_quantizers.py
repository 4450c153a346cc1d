"""Quantizers of a user's own, and how tests register them for a moment."""

import torch

from gplq_mm.quant import ActQuantizer
from gplq_mm.registry import QUANTIZERS


class EvenScale(ActQuantizer):
    """Uniform; scales are multiples of 1/64."""

    @classmethod
    def cover(cls, spec, low, high):
        scale, offset = super().cover(spec, low, high)
        even = (scale * 64).ceil() / 64
        return even, (offset / even).round() * even if spec.zero_point == 'integer' else offset

    def effective_scale(self):
        scale = super().effective_scale()
        even = (scale.detach() * 64).round().clamp(min=1) / 64
        return even + (scale - scale.detach())


class SquareRoot(ActQuantizer):
    """Not uniform: code q stands for ``scale * q**2``. For values that are not negative."""

    sites = ('linear', 'probs')
    has_signed_codes = False

    @classmethod
    def cover(cls, spec, low, high):
        return high.clamp(min=1e-8) / spec.code_range[1] ** 2, torch.zeros_like(high)

    @classmethod
    def nearest(cls, spec, x, scale, offset):
        codes = (x / scale).clamp(min=0).sqrt().round().clamp(max=spec.code_range[1])
        return codes.square() * scale

    def fake_quantize(self, x):
        hat = self.nearest(self.spec, x.detach(), self.grid()[0].detach(), None)
        return hat + (x - x.detach())

    def codes(self, x):
        return (x.float() / self.grid()[0]).clamp(min=0).sqrt().round().clamp(max=self.qmax)


def register_for(monkeypatch) -> None:
    """Registers ``'even_scale'`` and ``'square_root'`` until the end of a test."""
    monkeypatch.setitem(QUANTIZERS.module_dict, 'even_scale', EvenScale)
    monkeypatch.setitem(QUANTIZERS.module_dict, 'square_root', SquareRoot)
