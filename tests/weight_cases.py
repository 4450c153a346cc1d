"""Weights to quantize, statistics of their inputs, and errors of the result."""

import torch
from hypothesis import strategies as st

from gplq_mm.quant import QuantizedWeight


@st.composite
def weights(draw):
    """Matrix with heavy tails, columns of different size, maybe zero rows and zero columns."""
    out, columns = draw(st.integers(1, 6)), draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(out, columns, generator=generator).pow(3)
    weight *= torch.rand(columns, generator=generator).mul(draw(st.integers(0, 6))).exp()
    if draw(st.booleans()):
        weight[draw(st.integers(0, out - 1))] = 0
    if draw(st.booleans()):
        start = draw(st.integers(0, columns - 1))
        weight[:, start : start + 40] = 0
    return weight * 10.0 ** draw(st.integers(-6, 6))


def squared_error(weight: torch.Tensor, quantized: QuantizedWeight, importance=1.0):
    """Squared error of every row, relative to its own power, ``(out,)``."""
    unit = weight.double().abs().amax(1, keepdim=True).clamp(min=1e-30)
    difference = (quantized.dequantize().double() - weight.double()) / unit
    return (difference.square() * importance).sum(1)


def correlated_moment(columns: int, seed: int, rank: int | None = None) -> torch.Tensor:
    """Second moment of inputs that share a few factors and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    mixing *= torch.linspace(0, -4, columns, dtype=torch.float64).exp()
    mixing = mixing[:, :rank]
    size = torch.randn(columns, 1, generator=generator, dtype=torch.float64).exp()
    return (mixing * size) @ (mixing * size).T


def output_error(weight: torch.Tensor, values: torch.Tensor, moment: torch.Tensor) -> float:
    """Squared error of the layer's output, summed over rows."""
    difference = (weight - values).double()
    return float(((difference @ moment.double()) * difference).sum())
