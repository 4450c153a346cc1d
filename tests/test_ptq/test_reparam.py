"""RepQ-ViT reparametrization: same function, same codes."""

import pytest
import torch
from torch import nn

from gplq_mm.ptq import reparametrize
from gplq_mm.quant.functional import dequantize, quantize


def layers(channels=12, outs=(5, 7), bias=True, dtype=torch.float64):
    norm = nn.LayerNorm(channels, bias=bias, dtype=dtype)
    linears = [nn.Linear(channels, out, bias=bias, dtype=dtype) for out in outs]
    nn.init.uniform_(norm.weight, 0.1, 3)
    if bias:
        nn.init.normal_(norm.bias)
    return norm, linears


def grid(channels=12):
    scale = torch.rand(channels, dtype=torch.float64).exp().mul(0.2)
    return scale, -scale * torch.randn(channels, dtype=torch.float64).mul(3).add(8)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('asymmetric', [True, False])
def test_function_and_codes_are_unchanged(bias, asymmetric):
    norm, linears = layers(bias=bias)
    scale, offset = grid()
    qmin, qmax = (0, 15) if asymmetric else (-8, 7)
    offset = offset if asymmetric else None
    x = torch.randn(200, 12, dtype=torch.float64) * 3
    with torch.no_grad():
        normed = norm(x)
        before = [linear(normed) for linear in linears]
        codes = quantize(normed, scale, offset, qmin, qmax)
        values = [linear(dequantize(codes, scale, offset)) for linear in linears]

        new_scale, new_offset = reparametrize(norm, linears, scale, offset)
        assert new_scale.shape == new_offset.shape == ()
        normed = norm(x)
        new_codes = quantize(normed, new_scale, new_offset, qmin, qmax)
        assert torch.equal(new_codes, codes)
        assert codes.unique().numel() == 16
        new_values = dequantize(new_codes, new_scale, new_offset)
        for linear, float_out, quant_out in zip(linears, before, values, strict=True):
            torch.testing.assert_close(linear(normed), float_out)
            # The error of the quantized layer is unchanged, too.
            torch.testing.assert_close(linear(new_values), quant_out)
    if not asymmetric and not bias:
        assert norm.bias is None
        assert all(linear.bias is None for linear in linears)


def test_new_grid_is_the_mean_of_the_old_ones():
    norm, (linear, _) = layers()
    scale, offset = grid()
    linear.bias = None
    one_scale, one_offset = reparametrize(norm, [linear], scale, offset)
    torch.testing.assert_close(one_scale, scale.mean())
    torch.testing.assert_close(-one_offset / one_scale, (-offset / scale).mean())
    assert linear.bias.shape == (5,)


def test_float32_parameters_stay_float32_and_keep_their_identity():
    norm, linears = layers(dtype=torch.float32)
    parameters = [norm.weight, norm.bias, linears[0].weight, linears[0].bias]
    x = torch.randn(50, 12)
    before = linears[0](norm(x))
    scale, offset = (value.float() for value in grid())
    reparametrize(norm, linears, scale, offset)
    torch.testing.assert_close(linears[0](norm(x)), before, rtol=1e-4, atol=1e-4)
    after = [norm.weight, norm.bias, linears[0].weight, linears[0].bias]
    assert all(a is b for a, b in zip(parameters, after, strict=True))
    assert all(parameter.dtype == torch.float32 for parameter in after)


def test_bad_input_is_refused():
    norm, linears = layers()
    scale, offset = grid()
    for arguments, message in (
        ((norm, linears, scale[:5]), 'scale must have shape'),
        ((norm, linears, scale, offset[:5]), 'offset must have shape'),
        ((norm, [nn.Linear(11, 3)], scale), 'does not read'),
        ((norm, linears, scale * 0), 'positive'),
        ((norm, [], scale), 'give the linear layers'),
        ((nn.LayerNorm(12, elementwise_affine=False), linears, scale), 'affine'),
    ):
        with pytest.raises(ValueError, match=message):
            reparametrize(*arguments)
