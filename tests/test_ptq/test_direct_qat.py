"""Where the weight scales of direct QAT start."""

import pytest
import torch
from builders import build_quantized

from gplq_mm.layers import learn_weights, quant_layers, weights_are_learned
from gplq_mm.ptq import RoundToNearest, init_learned_weights, search_row_scale


def build(layout='raw', granularity='row', freeze=False):
    model = build_quantized('vit', dict(weight=dict(layout=layout)), freeze=freeze)
    learn_weights(model, granularity)
    return model


@pytest.mark.parametrize('layout', ['raw', 'folded'])
@torch.no_grad()
def test_starts_where_rounding_to_nearest_ends(layout):
    model = build(layout, freeze=True)
    assert not weights_are_learned(model)
    init_learned_weights(model)
    assert weights_are_learned(model)
    for name, layer in quant_layers(model).items():
        matrix, order = layer.foldable()
        expected = RoundToNearest()(matrix, layer.weight_quantizer.spec, order)
        layer.freeze_learned_weight()
        value = layer.weight_quantizer.value
        assert torch.equal(value.codes, expected.codes), name
        assert torch.equal(value.row_scale, expected.row_scale), name
        assert torch.equal(value.multiplier, expected.multiplier), name
        assert torch.equal(value.permutation, expected.permutation), name


def test_one_scale_for_a_layer():
    model = build(granularity='tensor')
    init_learned_weights(model)
    for layer in quant_layers(model).values():
        learned = layer.weight_quantizer.learned
        expected = search_row_scale(layer.weight.detach().reshape(1, -1), learned.spec)
        assert learned.scale().flatten().tolist() == expected.tolist()


@pytest.mark.parametrize('granularity', ['row', 'tensor'])
def test_rule_of_lsq(granularity):
    model = build(granularity=granularity)
    init_learned_weights(model, 'lsq')
    for layer in quant_layers(model).values():
        weight = layer.weight.detach().flatten(1).abs()
        mean = weight.mean(1) if granularity == 'row' else weight.mean().reshape(1)
        largest = 2 ** (layer.weight_quantizer.spec.bits - 1) - 1
        scale = layer.weight_quantizer.learned.scale().detach().flatten()
        torch.testing.assert_close(scale, 2 * mean / largest**0.5)


@pytest.mark.parametrize('init', ['observer', 'lsq'])
def test_a_row_of_zeros(init):
    model = build()
    layer = next(iter(quant_layers(model).values()))
    with torch.no_grad():
        layer.weight[0] = 0
    init_learned_weights(model, init)
    assert (layer.weight_quantizer.learned.scale() > 0).all()
    assert not layer.training_weight()[0].any()


def test_bad_rules():
    with pytest.raises(ValueError, match='observer, lsq'):
        init_learned_weights(build(), 'max')
    with pytest.raises(ValueError, match=r'policy\.weight\.layout="raw"'):
        init_learned_weights(build('folded'), 'lsq')
