"""Layers in direct QAT: what they multiply by while they learn, and after."""

import pytest
import torch
from torch import nn

from gplq_mm.layers import (
    QuantConv2d,
    QuantConvTranspose2d,
    QuantLinear,
    freeze_learned_weights,
    learn_weights,
    learned_parameters,
    quantizers_disabled,
    weights_disabled,
)
from gplq_mm.ptq import init_learned_weights
from gplq_mm.quant import ActSpec, NotCalibratedError, SiteSpec, WeightSpec

KINDS = {
    'linear': (QuantLinear, lambda: nn.Linear(9, 6), (7, 9)),
    'conv': (QuantConv2d, lambda: nn.Conv2d(3, 6, 3, padding=1), (2, 3, 8, 8)),
    'conv_transpose': (QuantConvTranspose2d, lambda: nn.ConvTranspose2d(3, 6, 2, 2), (2, 3, 4, 4)),
}


def make(kind, layout='raw', granularity='row', frozen=False):
    """A model of one learned layer, and an input."""
    quantized, build, shape = KINDS[kind]
    spec = SiteSpec(ActSpec(), WeightSpec(layout=layout, group_size=4))
    layer = quantized.from_float(build(), spec, kind)
    model = nn.Sequential(layer)
    learn_weights(model, granularity)
    x = torch.randn(shape) * torch.linspace(0.5, 2.0, shape[1]).view(-1, *[1] * (len(shape) - 2))
    quantizer = layer.act_quantizer
    quantizer.observe()
    with weights_disabled(model):
        for _ in range(quantizer.observer.num_passes):
            model(x)
            quantizer.observer.end_pass()
    quantizer.finish_observing()
    init_learned_weights(model)
    if frozen:
        quantizer.freeze()
    return model, layer, x


@pytest.mark.parametrize('kind', KINDS)
def test_without_direct_qat_it_is_the_parameter(kind):
    quantized, build, _ = KINDS[kind]
    layer = quantized.from_float(build(), SiteSpec(ActSpec(), WeightSpec()), kind)
    assert layer.training_weight() is layer.weight


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
    ('layout', 'granularity'), [('raw', 'row'), ('raw', 'tensor'), ('folded', 'row')]
)
def test_weight_is_on_its_grid(kind, layout, granularity):
    _, layer, _ = make(kind, layout, granularity)
    weight = layer.training_weight().detach()
    assert weight.shape == layer.weight.shape
    matrix = layer.as_matrix(weight)
    if layout == 'folded':
        matrix = matrix * layer.column_grid()[0]
    codes = matrix / layer.weight_quantizer.learned.step()
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert codes.round().abs().max() <= 8
    error = (weight - layer.weight).norm() / layer.weight.norm()
    assert 0 < error < 0.3


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('layout', ['raw', 'folded'])
def test_everything_learns(kind, layout):
    model, layer, x = make(kind, layout)
    x = 2 * x  # beyond what was calibrated, so that offsets have a gradient
    model(x).square().sum().backward()
    assert len(learned_parameters(model)) == 2 + (layer.act_quantizer.offset is not None)
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    # Straight through: the weight's gradient is that of the product, where it is not clipped.
    weight = layer.training_weight().detach().requires_grad_()
    layer._multiply(layer.act_quantizer(x), weight, layer.bias).square().sum().backward()
    inside = layer.weight.grad != 0
    assert inside.float().mean() > 0.8
    torch.testing.assert_close(layer.weight.grad[inside], weight.grad[inside])


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('layout', ['raw', 'folded'])
@torch.no_grad()
def test_the_saved_integers_compute_what_was_simulated(kind, layout):
    model, layer, x = make(kind, layout, frozen=True)
    simulated, weight = model(x), layer.training_weight()
    freeze_learned_weights(model)
    assert layer.weight_is_quantized
    if layout == 'raw':
        assert torch.equal(layer.dequantized_weight(), weight)
        assert torch.equal(model(x), simulated)
    torch.testing.assert_close(layer.dequantized_weight(), weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(model(x), simulated, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_switches():
    model, layer, x = make('linear')
    learned = model(x)
    with weights_disabled(model):
        assert layer.training_weight() is layer.weight
        assert not torch.equal(model(x), learned)
    with quantizers_disabled(model):
        assert torch.equal(model(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert torch.equal(model(x), learned)


def test_freezing_needs_frozen_activations():
    model, _, _ = make('linear')
    with pytest.raises(NotCalibratedError, match='is LEARNING'):
        freeze_learned_weights(model)
