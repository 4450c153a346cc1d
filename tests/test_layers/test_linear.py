"""QuantLinear: before Stage 2, after it, and the integers of the deployed product."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gplq_mm.layers import QuantLinear
from gplq_mm.ptq import RoundToNearest
from gplq_mm.quant import ActSpec, NotCalibratedError, QuantizedWeight, SiteSpec, WeightSpec

ZERO_POINTS = ('none', 'float', 'integer')


def make(
    columns=33, rows=7, act=None, weight=None, bias=True, batch=64, seed=0
) -> tuple[QuantLinear, torch.Tensor]:
    """Calibrated, frozen layer and its calibration input, whose channels differ in spread."""
    torch.manual_seed(seed)
    layer = nn.Linear(columns, rows, bias=bias)
    x = torch.randn(batch, columns) * torch.logspace(-1, 0.7, columns) + torch.randn(columns)
    spec = SiteSpec(ActSpec(**(act or {})), WeightSpec(**(weight or {})))
    twin = QuantLinear.from_float(layer, spec, 'fc')
    quantizer = twin.act_quantizer
    quantizer.observe()
    for _ in range(quantizer.observer.num_passes):
        twin(x)
        quantizer.observer.end_pass()
    quantizer.finish_observing()
    quantizer.freeze()
    return twin, x


def round_weight(layer, x=None) -> QuantizedWeight:
    """Rounds to nearest; with ``x`` the bias also makes the mean output exact."""
    matrix, permutation = layer.foldable()
    value = RoundToNearest()(matrix, layer.weight_quantizer.spec, permutation)
    mean = None if x is None else layer.operand_rows(x).double().mean(0)
    layer.set_quantized_weight(value, mean)
    return value


def integer_weight(value: QuantizedWeight) -> torch.Tensor:
    """multiplier * code in the weight's own column order, int64, by plain loops."""
    rows, columns = value.codes.shape
    result = torch.zeros(rows, columns, dtype=torch.int64)
    for j in range(columns):
        group = j // value.group_size
        result[:, value.permutation[j]] = (
            value.codes[:, j].long() * value.multiplier[:, group].long()
        )
    return result


def integer_operand(quantizer, x) -> torch.Tensor:
    """Codes, int64, computed from the parameters in float32; centred for an integer zero-point."""
    scale = quantizer.scale.detach()
    zero_point = getattr(quantizer, 'zero_point', None)
    offset = quantizer.offset.detach() if quantizer.offset is not None else torch.zeros(())
    if zero_point is not None:
        offset = -scale * zero_point
    codes = ((x.double() - offset.double()) / scale.double()).round()
    codes = codes.clamp(*quantizer.spec.code_range)
    return (codes - (0 if zero_point is None else zero_point)).long()


def test_shares_parameters_and_keys():
    layer = nn.Linear(8, 4)
    twin = QuantLinear.from_float(layer, SiteSpec(ActSpec(), WeightSpec()), 'fc')
    assert twin.weight is layer.weight
    assert twin.bias is layer.bias
    assert set(layer.state_dict()) <= set(twin.state_dict())
    assert isinstance(twin, nn.Linear)


def test_keeps_the_training_mode():
    layer = nn.Linear(8, 4).eval()
    assert not QuantLinear.from_float(layer, SiteSpec(ActSpec(), WeightSpec()), 'fc').training


def test_uncalibrated_layer_refuses_to_compute():
    twin = QuantLinear.from_float(nn.Linear(8, 4), SiteSpec(ActSpec(), WeightSpec()), 'block.fc')
    with pytest.raises(NotCalibratedError, match=r'block\.fc'):
        twin(torch.randn(2, 8))


@pytest.mark.parametrize('zero_point', ZERO_POINTS)
@pytest.mark.parametrize('granularity', ['tensor', 'channel'])
def test_stage_one_is_linear_of_the_fake_quantized_input(zero_point, granularity):
    layer, x = make(act=dict(zero_point=zero_point, granularity=granularity))
    x_hat = layer.act_quantizer(x)
    assert not torch.equal(x_hat, x)
    torch.testing.assert_close(layer(x), F.linear(x_hat, layer.weight, layer.bias))
    assert layer.act_quantizer.scale.numel() == (33 if granularity == 'channel' else 1)


@pytest.mark.parametrize('zero_point', ZERO_POINTS)
@pytest.mark.parametrize('granularity', ['tensor', 'channel'])
@pytest.mark.parametrize('bits', [4, 8])
@pytest.mark.parametrize(('columns', 'group'), [(33, 32), (64, 32), (7, 3), (1, 32), (70, 16)])
def test_accumulators_are_exactly_the_integers(zero_point, granularity, bits, columns, group):
    layer, x = make(
        columns,
        act=dict(bits=bits, zero_point=zero_point, granularity=granularity),
        weight=dict(bits=bits, group_size=group),
    )
    value = round_weight(layer)
    operand, weight = integer_operand(layer.act_quantizer, x), integer_weight(value)
    assert weight.abs().max() <= 127
    assert torch.equal(layer.operand(x).long(), operand)
    assert torch.equal(layer.accumulate(x).long(), operand @ weight.T)
    assert torch.equal(layer.accumulate(x), layer.accumulate(x).round())


@pytest.mark.parametrize('zero_point', ZERO_POINTS)
@pytest.mark.parametrize('bias', [True, False])
def test_output_equals_the_dequantized_product(zero_point, bias):
    layer, x = make(70, act=dict(zero_point=zero_point), bias=bias)
    round_weight(layer)
    x_hat = layer.act_quantizer(x).double()
    expected = x_hat @ layer.dequantized_weight().double().T
    if bias:
        expected = expected + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    # It is a rounded weight, near the latent one and not equal to it.
    assert not torch.equal(layer.dequantized_weight(), layer.weight)
    error = (layer.dequantized_weight() - layer.weight).norm() / layer.weight.norm()
    assert error < 0.5


def test_large_sums_stay_exact():
    act = dict(bits=8, zero_point='none', granularity='tensor', observer='minmax')
    layer, _ = make(4097, 3, act=act, weight=dict(bits=8, observer='minmax'), batch=4)
    x = torch.full((2, 4097), 1e6)  # every code is the largest
    value = round_weight(layer)
    value = QuantizedWeight(
        torch.full_like(value.codes, 127),
        value.row_scale,
        torch.ones_like(value.multiplier),
        value.permutation,
        value.group_size,
    )
    layer.set_quantized_weight(value, None)
    assert layer.accumulate(x).long().unique().tolist() == [4097 * 127 * 127]


@pytest.mark.parametrize('zero_point', ZERO_POINTS)
@pytest.mark.parametrize('bits', [4, 8])
def test_operands_are_integers_up_to_their_bound(zero_point, bits):
    layer, _ = make(act=dict(zero_point=zero_point, bits=bits))
    operand = layer.operand(torch.linspace(-100, 100, 999)[:, None].expand(-1, 33))
    assert torch.equal(operand, operand.round())
    assert operand.abs().max() == layer.largest_operand()


def test_operands_of_the_raw_layout_have_no_integer_bound():
    assert make(weight=dict(layout='raw'))[0].largest_operand() is None


def test_raw_layout_rounds_the_weight_itself():
    layer, x = make(33, weight=dict(layout='raw'))
    value = round_weight(layer, x)
    expected = F.linear(layer.act_quantizer(x), value.dequantize(), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.dequantized_weight(), value.dequantize())
    assert value.multiplier.unique().tolist() == [1]


@pytest.mark.parametrize('zero_point', ZERO_POINTS)
def test_bias_makes_the_mean_output_exact(zero_point):
    layer, x = make(33, act=dict(zero_point=zero_point))
    expected = F.linear(layer.act_quantizer(x), layer.weight, layer.bias).double().mean(0)
    round_weight(layer)
    uncorrected = layer(x).double().mean(0)
    round_weight(layer, x)
    torch.testing.assert_close(layer(x).double().mean(0), expected, rtol=1e-5, atol=1e-5)
    assert (uncorrected - expected).abs().max() > 1e-3


def test_stage_two_leaves_the_latent_weight_alone():
    layer, x = make()
    weight, bias = layer.weight.clone(), layer.bias.clone()
    round_weight(layer, x)
    layer(x)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.bias, bias)
    quantized = layer(x)
    layer.weight_quantizer.enabled = False
    torch.testing.assert_close(layer(x), F.linear(layer.act_quantizer(x), weight, bias))
    layer.weight_quantizer.enabled = True
    assert torch.equal(layer(x), quantized)


def test_quantized_weight_without_activation_quantizer():
    layer, x = make()
    round_weight(layer)
    layer.act_quantizer.enabled = False
    expected = F.linear(x, layer.dequantized_weight(), layer.bias)
    torch.testing.assert_close(layer(x), expected)


def test_folded_columns_are_sorted_by_activation_scale():
    layer, _ = make(33)
    matrix, permutation = layer.foldable()
    scale = layer.act_quantizer.scale.detach()
    torch.testing.assert_close(matrix, layer.weight * scale)
    assert (scale[permutation].diff() >= 0).all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_autocast_and_low_precision_do_not_change_the_integers(dtype):
    layer, x = make(33)
    round_weight(layer)
    x = x.to(dtype)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, layer(x.float()).to(dtype))


def test_any_number_of_leading_axes():
    layer, x = make(33)
    round_weight(layer)
    torch.testing.assert_close(layer(x.reshape(2, 4, 8, 33)).reshape(64, 7), layer(x))
    assert layer.operand_rows(x.reshape(2, 4, 8, 33)).shape == (64, 33)


def test_state_dict_carries_the_integers_to_a_fresh_layer():
    layer, x = make(33)
    round_weight(layer, x)
    other, _ = make(33, seed=5)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
