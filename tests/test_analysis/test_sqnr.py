"""SQNR of every layer, against definitions in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from builders import build_quantized, images

from gplq_mm.analysis import layer_sqnr
from gplq_mm.layers import QuantAttention, QuantConv2d, quant_layers, quantizers_disabled
from gplq_mm.ptq import RoundToNearest, quantize_weights

BATCHES = [images(4, seed=4), images(1, seed=5), images(3, seed=6)]
KINDS = ('vit', 'swin', 'resnet')


def quantized(kind, **kwargs):
    model = build_quantized(kind, **kwargs)
    quantize_weights(model, [images(6, seed=2)], model, RoundToNearest())
    return model


def decibels(exact: torch.Tensor, value: torch.Tensor) -> float:
    return 10 * math.log10(exact.square().sum() / (value - exact).square().sum())


def inputs_of(model, layer) -> torch.Tensor:
    """What a layer is given by the float model."""
    inputs = []
    handle = layer.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    with quantizers_disabled(model):
        for batch in BATCHES:
            model(batch)
    handle.remove()
    return torch.cat(inputs)


def product(layer, x, weight, bias):
    if isinstance(layer, QuantConv2d):
        return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)
    return F.linear(x, weight, bias)


@torch.no_grad()
@pytest.mark.parametrize('kind', KINDS)
def test_layers_against_float64(kind):
    model = quantized(kind)
    result = layer_sqnr(model, BATCHES, model)
    for name, layer in quant_layers(model).items():
        x = inputs_of(model, layer).double()
        latent = layer.weight.double()
        bias = None if layer.bias is None else layer.bias.double()
        exact = product(layer, x, latent, bias)
        x_hat = layer.act_quantizer(x.float()).double()
        weight = layer.dequantized_weight().double()
        # The stored bias belongs to codes; that of real values holds no zero-points.
        offset = layer.column_grid()[1].double()
        if layer.act_quantizer.spec.zero_point == 'integer':
            offset = torch.zeros_like(offset)
        real = layer.weight_quantizer.bias.double() - weight.flatten(1) @ offset
        expected = {
            'weights': product(layer, x, weight, real),
            'activations': product(layer, x_hat, latent, bias),
            'both': product(layer, x_hat, weight, real),
        }
        assert set(result[name]) == set(expected), name
        for case, value in expected.items():
            found = result[name][case]
            assert found['sqnr_db'] == pytest.approx(decibels(exact, value), abs=0.02), (name, case)
            assert found['mse'] == pytest.approx((value - exact).square().mean().item(), rel=5e-3)


@torch.no_grad()
@pytest.mark.parametrize('kind', ['vit', 'swin'])
def test_attention_against_float64(kind):
    model = quantized(kind)
    result = layer_sqnr(model, BATCHES, model)
    attentions = [m for m in model.modules() if isinstance(m, QuantAttention)]
    attention = attentions[1]
    name = attention.q.site.removesuffix('.q')
    calls, attend = [], attention.attend
    attention.__dict__['attend'] = lambda *args, **kwargs: (
        calls.append((args, kwargs)) or attend(*args, **kwargs)
    )
    with quantizers_disabled(model):
        for batch in BATCHES:
            model(batch)
    del attention.__dict__['attend']
    noise = signal = 0.0
    for args, kwargs in calls:
        query, key, value, scale, *rest = args
        bias = rest[0] if rest else kwargs.get('bias')
        mask = rest[1] if len(rest) > 1 else kwargs.get('mask')
        scores = query.double() @ key.double().transpose(-2, -1) * scale
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        exact = scores.softmax(-1) @ value.double()
        rounded = attend(*args, **kwargs)
        noise += (rounded - exact).square().sum()
        signal += exact.square().sum()
    assert set(result[name]) == {'activations'}
    assert result[name]['activations']['sqnr_db'] == pytest.approx(
        10 * math.log10(signal / noise), abs=0.02
    )
    names = {m.q.site.removesuffix('.q') for m in attentions}
    assert names | set(quant_layers(model)) == set(result)


@torch.no_grad()
def test_sizes_of_batches_do_not_matter():
    model = quantized('vit')
    images_of_all = torch.cat(BATCHES)
    first = layer_sqnr(model, BATCHES, model)
    second = layer_sqnr(model, [images_of_all[:7], images_of_all[7:]], model)
    for name, cases in first.items():
        for case, errors in cases.items():
            assert errors == pytest.approx(second[name][case], rel=1e-4), (name, case)


@torch.no_grad()
def test_it_leaves_no_trace():
    model = quantized('vit', compensation=dict(type='QwT'))
    before = model(BATCHES[0])
    layer_sqnr(model, BATCHES, model)
    assert torch.equal(model(BATCHES[0]), before)
    for module in model.modules():
        assert not {'attend', 'forward'} & set(module.__dict__)


@torch.no_grad()
def test_without_quantized_weights():
    model = build_quantized('vit', freeze=False)
    result = layer_sqnr(model, BATCHES, model)
    assert all(set(cases) == {'activations'} for cases in result.values())


@torch.no_grad()
def test_more_bits_are_about_six_decibels():
    # Per tensor and min-max: the grid is the range, and two bits more make the step 63 / 15 times
    # as small. The noise of one layer on few images is not quite uniform.
    means = []
    for bits in (4, 6):
        policy = dict(activation=dict(bits=bits, granularity='tensor', observer='minmax'))
        model = build_quantized('vit', policy=policy)
        values = [
            cases['activations']['sqnr_db']
            for name, cases in layer_sqnr(model, BATCHES, model).items()
            if name in quant_layers(model) and 'head' not in name and 'patch' not in name
        ]
        means.append(sum(values) / len(values))
    assert means[1] - means[0] == pytest.approx(20 * math.log10(63 / 15), abs=1.5)
