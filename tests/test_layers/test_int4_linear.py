"""A packed linear layer computes the integers of its simulation."""

import copy

import pytest
import torch
from builders import calibrated
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import quantized_layer, round_layer
from torch import nn

from gplq_mm.layers import DeployError, Int4Linear, QuantLinear
from gplq_mm.quant import ActSpec, SiteSpec, WeightSpec

act_specs = st.builds(
    ActSpec,
    bits=st.sampled_from([2, 3, 4, 8]),
    zero_point=st.sampled_from(['none', 'float', 'integer']),
    signed=st.booleans(),
    granularity=st.sampled_from(['tensor', 'channel']),
    observer=st.just('minmax'),
) | st.builds(
    ActSpec,
    bits=st.sampled_from([2, 4]),
    granularity=st.sampled_from(['tensor', 'channel']),
    format=st.just('levels'),
)
weight_specs = st.builds(
    WeightSpec,
    bits=st.sampled_from([2, 3, 4, 5, 8]),
    group_size=st.sampled_from([1, 7, 32, 1000]),
    observer=st.just('minmax'),
)


def inputs(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.2, 3.0, columns)
    return torch.randn(rows, columns, generator=generator) * scale + 0.3


def make(rows=6, columns=40, bias=True, act=None, weight=None, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(columns, rows, bias=bias)
    x = inputs(32, columns, seed)
    return quantized_layer(layer, x, act or ActSpec(), weight or WeightSpec())


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.booleans(),
    act_specs,
    weight_specs,
    st.integers(0, 9),
)
def test_accumulators_are_equal_and_outputs_close(rows, columns, bias, act, weight, seed):
    layer = make(rows, columns, bias, act, weight, seed)
    packed = Int4Linear.from_quantized(layer)
    # Beyond the calibrated range too.
    x = 2 * inputs(5, columns, seed + 100)
    with torch.no_grad():
        assert torch.equal(packed.accumulate(x).double(), layer.accumulate(x).double())
        torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('shape', [(40,), (0, 40), (2, 3, 40), (2, 0, 3, 40)])
def test_any_leading_shape(shape):
    layer = make()
    packed = Int4Linear.from_quantized(layer)
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), layer(x))
        assert packed.accumulate(x).shape == (*shape[:-1], 6)
        assert packed.accumulate(x).dtype == torch.int32


def test_strided_input():
    layer = make()
    x = torch.randn(3, 5, 40)[:, 2]
    with torch.no_grad():
        torch.testing.assert_close(Int4Linear.from_quantized(layer)(x), layer(x))


@pytest.mark.parametrize(('bits', 'dtype'), [(2, torch.uint8), (4, torch.uint8), (5, torch.int8)])
def test_weights_up_to_four_bits_share_a_byte(bits, dtype):
    packed = Int4Linear.from_quantized(make(weight=WeightSpec(bits=bits)))
    assert packed.weight.dtype == dtype
    assert packed.weight.shape == (1, 40, 32 if dtype == torch.uint8 else 64)


def test_half_precision_moves_nothing_but_the_activations():
    packed = Int4Linear.from_quantized(make())
    before = {key: value.clone() for key, value in packed.state_dict().items()}
    packed.half()
    for key, value in packed.state_dict().items():
        assert value.dtype == before[key].dtype
        assert torch.equal(value, before[key])
    assert packed(torch.randn(2, 40).half()).dtype == torch.float16


def test_no_parameters_and_a_complete_state():
    packed = Int4Linear.from_quantized(make(seed=1))
    other = Int4Linear.from_quantized(make(seed=2))
    x = torch.randn(4, 40)
    assert not list(packed.parameters())
    assert not torch.equal(packed(x), other(x))
    other.load_state_dict(packed.state_dict())
    assert torch.equal(packed(x), other(x))
    assert torch.equal(copy.deepcopy(packed)(x), packed(x))


def test_a_copy_is_independent():
    packed = Int4Linear.from_quantized(make())
    clone = copy.deepcopy(packed)
    x = torch.randn(4, 40)
    expected = packed(x)
    clone.bias.zero_()
    assert torch.equal(packed(x), expected)


def test_before_stage_2():
    layer = QuantLinear.from_float(nn.Linear(8, 4), SiteSpec(ActSpec(), WeightSpec()), 'blk.fc')
    with pytest.raises(DeployError, match=r'blk\.fc.*Stage 2'):
        Int4Linear.from_quantized(layer)


def test_raw_layout():
    layer = make(weight=WeightSpec(layout='raw'))
    with pytest.raises(DeployError, match=r'layout "raw".*folded'):
        Int4Linear.from_quantized(layer)


def test_learning_activations():
    layer = QuantLinear.from_float(nn.Linear(8, 4), SiteSpec(ActSpec(), WeightSpec()), 'fc')
    round_layer(calibrated(layer, torch.randn(9, 8), freeze=False))
    with pytest.raises(DeployError, match='LEARNING'):
        Int4Linear.from_quantized(layer)


@pytest.mark.parametrize('part', ['act_quantizer', 'weight_quantizer'])
def test_switched_off(part):
    layer = make()
    getattr(layer, part).enabled = False
    with pytest.raises(DeployError, match='switched off'):
        Int4Linear.from_quantized(layer)


def test_sums_that_leave_32_bits():
    columns = 2**31 // (127 * 255) + 2
    layer = make(1, columns, act=ActSpec(bits=8, observer='minmax'))
    with pytest.raises(DeployError, match='32 bits'):
        Int4Linear.from_quantized(layer)
