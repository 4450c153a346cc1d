"""A packed convolution computes the integers of its simulation."""

import pytest
import torch
from packed_models import quantized_layer
from torch import nn

from gplq_mm.layers import Int4Conv2d
from gplq_mm.quant import ActSpec, WeightSpec

GEOMETRIES = {
    'padded': dict(kernel_size=3, padding=1),
    'strided': dict(kernel_size=3, stride=2, padding=1),
    'patches': dict(kernel_size=4, stride=4),
    'pointwise': dict(kernel_size=1),
    'dilated': dict(kernel_size=3, dilation=2, padding=(2, 0)),
    'uneven': dict(kernel_size=(1, 5), stride=(2, 1), padding=(0, 3), bias=False),
}


def make(geometry: dict, act: ActSpec, weight: WeightSpec | None = None):
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 9, **geometry)
    x = torch.randn(4, 5, 12, 11) * torch.linspace(0.3, 2, 5)[:, None, None] + 0.4
    return quantized_layer(layer, x, act, weight or WeightSpec()), x


@pytest.mark.parametrize('zero_point', ['none', 'float', 'integer'])
@pytest.mark.parametrize('granularity', ['tensor', 'channel'])
@pytest.mark.parametrize('geometry', GEOMETRIES.values(), ids=GEOMETRIES)
def test_accumulators_are_equal_and_outputs_close(geometry, granularity, zero_point):
    act = ActSpec(zero_point=zero_point, granularity=granularity, observer='minmax')
    layer, x = make(geometry, act)
    packed = Int4Conv2d.from_quantized(layer)
    with torch.no_grad():
        expected = layer.accumulate(1.5 * x)
        found = packed.accumulate(1.5 * x)
        assert found.dtype == torch.int32
        assert torch.equal(found.double(), expected.double())
        torch.testing.assert_close(packed(1.5 * x), layer(1.5 * x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('bits', [2, 8])
def test_other_widths(bits):
    layer, x = make(GEOMETRIES['padded'], ActSpec(bits=bits), WeightSpec(bits=bits))
    packed = Int4Conv2d.from_quantized(layer)
    with torch.no_grad():
        assert torch.equal(packed.accumulate(x).double(), layer.accumulate(x).double())


def test_shapes_and_memory():
    layer, x = make(GEOMETRIES['strided'], ActSpec())
    packed = Int4Conv2d.from_quantized(layer)
    with torch.no_grad():
        out = packed(x)
        assert out.shape == layer(x).shape
        assert out.is_contiguous()
        last = packed(x.to(memory_format=torch.channels_last))
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(last, out)
        assert packed(x[:0]).shape == (0, 9, 6, 6)


def test_padding_is_the_code_of_zero_when_the_range_lies_above_it():
    """Inputs that never reach zero: the grid of an integer zero-point still holds it."""
    torch.manual_seed(0)
    x = torch.rand(2, 5, 6, 6) + 3
    layer = quantized_layer(
        nn.Conv2d(5, 4, 3, padding=1), x, ActSpec(zero_point='integer'), WeightSpec()
    )
    packed = Int4Conv2d.from_quantized(layer)
    with torch.no_grad():
        assert torch.equal(packed.accumulate(x).double(), layer.accumulate(x).double())
