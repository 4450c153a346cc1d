"""QuantConv2d: geometry, zero padding, and the integers of the deployed product."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gplq_mm.layers import QuantConv2d
from gplq_mm.ptq import RoundToNearest
from gplq_mm.quant import ActSpec, PolicyError, SiteSpec, WeightSpec

GEOMETRIES = {
    'patch': dict(kernel_size=4, stride=4),
    'padded': dict(kernel_size=3, padding=1),
    'strided': dict(kernel_size=3, padding=1, stride=2),
    'dilated': dict(kernel_size=3, padding=2, dilation=2),
    'oblong': dict(kernel_size=(3, 1), padding=(1, 0), stride=(1, 2)),
    'pointwise': dict(kernel_size=1),
}


def make(geometry='padded', act=None, weight=None, bias=True):
    """Calibrated, frozen layer and its calibration input, which is asymmetric around zero."""
    conv = nn.Conv2d(3, 6, bias=bias, **GEOMETRIES[geometry])
    x = torch.randn(4, 3, 12, 12) * torch.tensor([0.3, 1.0, 3.0])[:, None, None] + 0.8
    spec = SiteSpec(ActSpec(**(act or {})), WeightSpec(**(weight or {})))
    layer = QuantConv2d.from_float(conv, spec, 'stem')
    quantizer = layer.act_quantizer
    quantizer.observe()
    for _ in range(quantizer.observer.num_passes):
        layer(x)
        quantizer.observer.end_pass()
    quantizer.finish_observing()
    quantizer.freeze()
    return layer, x


def round_weight(layer, x=None):
    matrix, permutation = layer.foldable()
    value = RoundToNearest()(matrix, layer.weight_quantizer.spec, permutation)
    layer.set_quantized_weight(value, None if x is None else layer.operand_rows(x).double().mean(0))
    return value


def integer_conv(layer, value, x):
    """int64 sum over taps, by explicit loops over the output positions."""
    quantizer = layer.act_quantizer
    scale = quantizer.scale.detach().double()
    zero_point = getattr(quantizer, 'zero_point', None)
    offset = torch.zeros(()).double() if quantizer.offset is None else quantizer.offset.double()
    if zero_point is not None:
        offset = (-quantizer.scale * zero_point).double()
    codes = ((x.double() - offset) / scale).round().clamp(*quantizer.spec.code_range)
    if zero_point is not None:
        codes = codes - zero_point
    (ph, pw), (sh, sw), (dh, dw) = layer.padding, layer.stride, layer.dilation
    kh, kw = layer.kernel_size
    codes = F.pad(codes.long(), (pw, pw, ph, ph))
    weight = torch.zeros(value.codes.shape, dtype=torch.int64)
    for j in range(weight.shape[1]):
        weight[:, value.permutation[j]] = (
            value.codes[:, j].long() * value.multiplier[:, j // value.group_size].long()
        )
    height = (codes.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (codes.shape[3] - dw * (kw - 1) - 1) // sw + 1
    out = torch.zeros(len(x), len(weight), height, width, dtype=torch.int64)
    for i in range(height):
        for j in range(width):
            top, left = i * sh, j * sw
            patch = codes[:, :, top : top + dh * kh : dh, left : left + dw * kw : dw]
            out[:, :, i, j] = patch.reshape(len(x), -1) @ weight.T
    return out


def test_shares_parameters_keys_and_geometry():
    conv = nn.Conv2d(3, 6, 3, stride=2, padding=1, dilation=2)
    layer = QuantConv2d.from_float(conv, SiteSpec(ActSpec(), WeightSpec()), 'stem')
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias
    assert set(conv.state_dict()) <= set(layer.state_dict())
    for name in ('stride', 'padding', 'dilation', 'kernel_size', 'in_channels', 'out_channels'):
        assert getattr(layer, name) == getattr(conv, name)
    assert 'kernel_size=(3, 3)' in repr(layer)


def test_padding_turns_a_float_zero_point_into_an_integer_one():
    padded, _ = make('padded')
    assert padded.act_quantizer.spec.zero_point == 'integer'
    assert make('patch')[0].act_quantizer.spec.zero_point == 'float'
    symmetric, _ = make('padded', act=dict(zero_point='none'))
    assert symmetric.act_quantizer.spec.zero_point == 'none'


@pytest.mark.parametrize('geometry', GEOMETRIES)
@pytest.mark.parametrize('granularity', ['tensor', 'channel'])
def test_stage_one_is_the_convolution_of_the_fake_quantized_input(geometry, granularity):
    layer, x = make(geometry, act=dict(granularity=granularity))
    x_hat = layer.act_quantizer(x)
    expected = F.conv2d(
        x_hat, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation
    )
    torch.testing.assert_close(layer(x), expected)
    assert not torch.equal(x_hat, x)


@pytest.mark.parametrize('geometry', GEOMETRIES)
@pytest.mark.parametrize('zero_point', ['none', 'float', 'integer'])
@pytest.mark.parametrize('granularity', ['tensor', 'channel'])
def test_accumulators_are_exactly_the_integers(geometry, zero_point, granularity):
    layer, x = make(
        geometry,
        act=dict(zero_point=zero_point, granularity=granularity),
        weight=dict(group_size=8),
    )
    value = round_weight(layer)
    expected = integer_conv(layer, value, x)
    assert expected.unique().numel() > 10
    assert torch.equal(layer.accumulate(x).long(), expected)


@pytest.mark.parametrize('geometry', ['padded', 'patch'])
def test_eight_bit_accumulators_are_exact(geometry):
    layer, x = make(geometry, act=dict(bits=8), weight=dict(bits=8))
    value = round_weight(layer)
    assert torch.equal(layer.accumulate(x).long(), integer_conv(layer, value, x))


@pytest.mark.parametrize('geometry', GEOMETRIES)
@pytest.mark.parametrize('zero_point', ['none', 'float', 'integer'])
@pytest.mark.parametrize('bias', [True, False])
def test_output_equals_the_dequantized_product(geometry, zero_point, bias):
    layer, x = make(geometry, act=dict(zero_point=zero_point), bias=bias)
    round_weight(layer)
    expected = F.conv2d(
        layer.act_quantizer(x).double(),
        layer.dequantized_weight().double(),
        layer.bias.double() if bias else None,
        layer.stride,
        layer.padding,
        layer.dilation,
    )
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('geometry', ['padded', 'patch'])
def test_bias_makes_the_mean_output_exact(geometry):
    layer, x = make(geometry)
    expected = layer(x).double().mean((0, 2, 3))
    round_weight(layer)
    uncorrected = layer(x).double().mean((0, 2, 3))
    round_weight(layer, x)
    torch.testing.assert_close(layer(x).double().mean((0, 2, 3)), expected, rtol=1e-5, atol=1e-5)
    assert (uncorrected - expected).abs().max() > 1e-4


def test_operand_rows_times_the_weight_matrix_is_the_convolution():
    layer, x = make('strided')
    round_weight(layer)
    rows = layer.operand_rows(x) @ layer.weight_quantizer.integers().T
    accumulator = layer.accumulate(x).permute(0, 2, 3, 1).reshape(rows.shape)
    torch.testing.assert_close(rows, accumulator)


def test_latent_weight_is_unchanged():
    layer, x = make()
    weight = layer.weight.clone()
    round_weight(layer, x)
    layer(x)
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize(
    'options', [dict(groups=3), dict(padding='same'), dict(padding=1, padding_mode='reflect')]
)
def test_convolutions_that_have_no_twin_are_refused(options):
    conv = nn.Conv2d(3, 6, 3, **options)
    with pytest.raises(PolicyError, match=r'body\.dw.*exclude'):
        QuantConv2d.from_float(conv, SiteSpec(ActSpec(), WeightSpec()), 'body.dw')
