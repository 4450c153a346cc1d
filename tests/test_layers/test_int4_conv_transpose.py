"""A packed transposed convolution computes the integers of its simulation."""

import pytest
import torch
from builders import calibrated
from packed_models import round_layer
from torch import nn

from gplq_mm.layers import DeployError, Int4ConvTranspose2d, QuantConvTranspose2d
from gplq_mm.quant import ActSpec, SiteSpec, WeightSpec


def make(act: ActSpec, weight: WeightSpec | None = None, bias: bool = True, rounded: bool = True):
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(6, 5, (2, 3), stride=(2, 3), bias=bias)
    x = torch.randn(4, 6, 7, 4) * torch.linspace(0.3, 2, 6)[:, None, None] + 0.4
    spec = SiteSpec(act, weight or WeightSpec())
    layer = calibrated(QuantConvTranspose2d.from_float(layer, spec, 'site'), x)
    return (round_layer(layer) if rounded else layer), x


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('zero_point', ['none', 'float', 'integer'])
@pytest.mark.parametrize('granularity', ['tensor', 'channel'])
def test_accumulators_are_equal_and_outputs_close(granularity, zero_point, bias):
    act = ActSpec(zero_point=zero_point, granularity=granularity, observer='minmax')
    layer, x = make(act, bias=bias)
    packed = Int4ConvTranspose2d.from_quantized(layer)
    with torch.no_grad():
        expected = layer.accumulate(1.5 * x)
        found = packed.accumulate(1.5 * x)
        assert found.dtype == torch.int32
        assert torch.equal(found.double(), expected.double())
        torch.testing.assert_close(packed(1.5 * x), layer(1.5 * x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('bits', [2, 8])
def test_other_widths(bits):
    layer, x = make(ActSpec(bits=bits), WeightSpec(bits=bits))
    packed = Int4ConvTranspose2d.from_quantized(layer)
    with torch.no_grad():
        assert torch.equal(packed.accumulate(x).double(), layer.accumulate(x).double())


def test_shapes_and_memory():
    layer, x = make(ActSpec())
    packed = Int4ConvTranspose2d.from_quantized(layer)
    with torch.no_grad():
        out = packed(x)
        assert out.shape == (4, 5, 14, 12)
        assert torch.equal(packed(x.to(memory_format=torch.channels_last)), out)
        assert packed(x[:0]).shape == (0, 5, 14, 12)
        assert packed(x.half()).dtype == torch.float16


def test_before_stage_2():
    layer, _ = make(ActSpec(), rounded=False)
    with pytest.raises(DeployError, match='not quantized yet'):
        Int4ConvTranspose2d.from_quantized(layer)
