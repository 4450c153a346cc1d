"""MXFP4 and NVFP4 are what their definitions say, for activations and for weights."""

import pytest
import torch
from weight_cases import correlated_moment, output_error, squared_error

from gplq_mm.ptq import GPTQ, RoundToNearest, search_group_scales
from gplq_mm.quant import (
    ActQuantizer,
    ActSpec,
    LearnedWeightQuantizer,
    MXFP4Format,
    NVFP4Format,
    PolicyError,
    QuantPolicy,
    WeightSpec,
)

NAMES = ('mxfp4', 'nvfp4')
SCALES = {'mxfp4': torch.float8_e8m0fnu, 'nvfp4': torch.float8_e4m3fn}


def e2m1(bits: int) -> float:
    """Value of the four bits of a ``float4_e2m1fn``: sign, two of exponent (bias 1), mantissa."""
    exponent, mantissa = bits >> 1 & 3, bits & 1
    magnitude = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
    return -magnitude if bits & 8 else magnitude


# In ascending order; of two neighbours the one with an even mantissa takes the tie.
POSITIVE = torch.tensor([e2m1(bits) for bits in range(8)], dtype=torch.float64)


def nearest_e2m1(x: torch.Tensor) -> torch.Tensor:
    """By comparison with all values; any shape, float64."""
    distance = (x.abs()[..., None] - POSITIVE).abs()
    tied = distance == distance.amin(-1, keepdim=True)
    even = tied & (torch.arange(8) % 2 == 0)
    bits = torch.where(even.any(-1), even.int().argmax(-1), tied.int().argmax(-1))
    return POSITIVE[bits].copysign(x)


def act_spec(name, **changes):
    return ActSpec(format=name, **{**FORMATS[name].activation, **changes})


def weight_spec(name, **changes):
    return WeightSpec(format=name, **{**FORMATS[name].weight, **changes})


FORMATS = {'mxfp4': MXFP4Format, 'nvfp4': NVFP4Format}


def is_a_scale(scale: torch.Tensor, name: str) -> bool:
    """Whether torch's dtype of the format's scales holds all of them."""
    return torch.equal(scale.float().to(SCALES[name]).float(), scale.float())


def quantizer_for(name, x):
    quantizer = ActQuantizer(act_spec(name), (1,), 'fc.input')
    quantizer.observe()
    quantizer(x)
    quantizer.observer.end_pass()
    quantizer.finish_observing()
    return quantizer


@pytest.mark.parametrize('name', NAMES)
def test_elements_are_those_of_float4_e2m1(name):
    x = torch.arange(-2000, 2001) / 250  # all ties, and beyond the largest
    code_format = act_spec(name).code_format
    assert torch.equal(code_format.round_(2 * x).double(), 2 * nearest_e2m1(x.double()))
    assert not code_format.is_integer_product


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('columns', [1, 16, 32, 70])
def test_activations_are_rounded_block_by_block(name, columns):
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(3, 5, columns, generator=generator) * torch.logspace(-3, 2, 5)[:, None]
    x[0, 0] = 0
    quantizer = quantizer_for(name, x)
    out, code_format = quantizer(x), quantizer.format
    size = code_format.block_size
    largest = x.double().abs().max()
    tensor = largest / (448 * 6) if name == 'nvfp4' else torch.tensor(1.0).double()
    torch.testing.assert_close(quantizer.scale.double(), tensor.expand(1), rtol=1e-6, atol=0)
    tensor = quantizer.scale.double()
    for start in range(0, columns, size):
        block = x[..., start : start + size].double()
        most = block.abs().amax(-1, keepdim=True) / tensor
        if name == 'mxfp4':
            # OCP MX 1.0, 6.3: a power of two, by the exponent of the largest value.
            scale = torch.exp2(most.clamp(min=2.0**-100).log2().floor() - 2)
        else:
            scale = (most / 6).clamp(2.0**-9, 448).float().to(torch.float8_e4m3fn).double()
        expected = nearest_e2m1(block / (scale * tensor)) * scale * tensor
        torch.testing.assert_close(
            out[..., start : start + size].double(), expected, rtol=1e-6, atol=1e-12
        )
    codes = quantizer.codes(x)
    assert torch.equal(code_format.round_(codes.clone()), codes)


@pytest.mark.parametrize('name', NAMES)
def test_gradients_pass_and_nothing_of_the_scale_learns(name):
    x = torch.randn(4, 40).requires_grad_()
    quantizer = quantizer_for(name, x.detach())
    assert not list(quantizer.parameters())
    assert not quantizer.keeps_codes(x)
    quantizer(x).backward(torch.ones(4, 40))
    assert torch.equal(x.grad, torch.ones(4, 40))
    other = ActQuantizer(act_spec(name), (1,))
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(x), quantizer(x))
    assert not quantizer.clips(x).float().mean() > 0.2


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('observer', ['minmax', 'percentile', 'mse'])
def test_scales_of_weights_are_those_of_the_format(name, observer):
    weight = torch.randn(6, 70, generator=torch.Generator().manual_seed(1)).pow(3)
    weight[2] = 0
    spec = weight_spec(name, observer=observer)
    row_scale, multiplier = search_group_scales(weight, spec)
    assert multiplier.shape == (6, -(-70 // spec.group_size))
    assert is_a_scale(multiplier, name)
    unit = weight.abs().max() / (448 * 6) if name == 'nvfp4' else torch.tensor(1.0)
    torch.testing.assert_close(row_scale, (unit / 2).expand(6))


@pytest.mark.parametrize('name', NAMES)
def test_mse_takes_the_best_scale_of_its_neighbourhood(name):
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(3))
    found = RoundToNearest()(weight, weight_spec(name))
    for factor in (0.25, 0.5, 2.0, 4.0):
        # No block wants a larger scale than an e4m3 can be.
        multiplier = (found.multiplier * factor).clamp(max=448).to(SCALES[name]).float()
        step = found.row_scale[:, None] * multiplier.repeat_interleave(found.group_size, 1)
        other = nearest_e2m1((weight / (2 * step)).double()) * 2 * step
        assert (
            squared_error(weight, found)
            <= ((other - weight) / weight.abs().amax(1, keepdim=True)).square().sum(1)
        ).all()
    widest = RoundToNearest()(weight, weight_spec(name, observer='minmax'))
    assert (squared_error(weight, found) <= squared_error(weight, widest) + 1e-6).all()
    # That covers everything, so no code is clipped.
    assert (widest.dequantize().abs() - weight.abs()).max() < 1


@pytest.mark.parametrize('name', NAMES)
def test_gptq_rounds_to_the_format(name):
    weight = torch.randn(24, 80, generator=torch.Generator().manual_seed(4))
    moment = correlated_moment(80, seed=5)
    spec = weight_spec(name)
    nearest, better = (m(weight, spec, None, moment) for m in (RoundToNearest(), GPTQ()))
    for value in (nearest, better):
        codes = value.codes.float()
        assert torch.equal(spec.code_format.round_(codes.clone()), codes)
        assert is_a_scale(value.multiplier, name)
        assert value.group_size == FORMATS[name].block_size
    errors = [output_error(weight, value.dequantize(), moment) for value in (nearest, better)]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize('name', NAMES)
def test_bytes(name):
    # Two elements and, for each block, one scale a byte.
    blocks, tensor = {'mxfp4': (3, 0), 'nvfp4': (5, 4)}[name]
    assert weight_spec(name).code_format.bytes(10, 70) == 10 * (35 + blocks) + tensor


def test_a_policy_chooses_them():
    policy = QuantPolicy(activation=dict(format='mxfp4'), weight=dict(format='nvfp4'))
    spec = policy.resolve('layers.0.ffn', 'linear')
    assert spec.activation == act_spec('mxfp4')
    assert spec.weight == weight_spec('nvfp4')
    # Operands of attentions keep their own, and eight bits are those of integers.
    assert policy.resolve('layers.0.attn.q', 'q').activation == QuantPolicy().activations['q']
    assert policy.resolve('head.fc', 'linear') == QuantPolicy().resolve('head.fc', 'linear')
    # So are those of the ends that a family names.
    for name, kind in (('classifier', 'linear'), ('embeddings.projection', 'conv')):
        assert policy.resolve(name, kind, is_end=True) == QuantPolicy().resolve('head.fc', 'linear')
    with pytest.raises(PolicyError, match=r'neck\.conv: the mxfp4 format is for linear, q, k'):
        policy.resolve('neck.conv', 'conv')


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(weight=dict(format='mxfp4', group_size=64)), r'weight\.group_size=64 .*=32'),
        (dict(activation=dict(format='nvfp4', bits=8)), r'activation\.bits=8 .*bits=4'),
        (dict(probs=dict(format='log_sqrt2', signed=True)), r'probs\.signed=True .*signed=False'),
    ],
)
def test_settings_that_contradict_the_format(settings, message):
    with pytest.raises(PolicyError, match=message):
        QuantPolicy(**settings)


def test_direct_qat_learns_integers_only():
    with pytest.raises(PolicyError, match=r'fc: direct QAT .*format="integer"'):
        LearnedWeightQuantizer(weight_spec('mxfp4'), (4, 64), 'row', 'fc')
