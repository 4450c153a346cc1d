"""Transposed convolutions of mask heads: one matrix product for every input pixel."""

import pytest
import torch
from builders import calibrated
from torch import nn

from gplq_mm.layers import QuantConvTranspose2d, quantize_model, quantizers_disabled
from gplq_mm.ptq import RoundToNearest, quantize_weights
from gplq_mm.quant import PolicyError, QuantPolicy


def quantized(policy: dict, bias: bool = True) -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(nn.ConvTranspose2d(6, 5, (2, 3), stride=(2, 3), bias=bias))
    x = torch.randn(3, 6, 7, 4) + 0.5
    quantize_model(model, QuantPolicy(**policy))
    calibrated(model, x)
    return model, x


@torch.no_grad()
def test_without_quantizers_it_is_the_float_layer():
    model, x = quantized({})
    layer = model[0]
    assert isinstance(layer, QuantConvTranspose2d)
    with quantizers_disabled(model):
        expected = nn.functional.conv_transpose2d(x, layer.weight, layer.bias, layer.stride)
        assert torch.equal(model(x), expected)
    assert torch.equal(layer.from_matrix(layer.weight_matrix()), layer.weight)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('policy', [{}, dict(preset='paper')])
@torch.no_grad()
def test_the_integer_product_is_that_of_the_dequantized_weight(policy, bias):
    """Neighbouring rows of the matrix are neighbouring pixels: any mix-up shows here."""
    model, x = quantized(policy, bias)
    quantize_weights(model, [x], model, RoundToNearest())
    layer = model[0]
    x_hat, weight = layer.act_quantizer(x), layer.dequantized_weight()
    given = layer(x)
    plain = nn.functional.conv_transpose2d(x_hat, weight, layer.bias, layer.stride)
    if layer.is_folded:
        # Its bias also corrects the mean error of every row, a constant for a place in the cell.
        cells = (given - plain).unflatten(-1, (4, 3)).unflatten(-3, (7, 2))
        error = cells - cells.mean((0, 2, 4), keepdim=True)
        torch.testing.assert_close(error, torch.zeros_like(error), rtol=0, atol=1e-5)
    else:
        torch.testing.assert_close(given, plain)


def test_overlapping_outputs_are_refused():
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3, stride=2))
    with pytest.raises(PolicyError, match=r"'\^0\$'.*ConvTranspose2d"):
        quantize_model(model, QuantPolicy())
