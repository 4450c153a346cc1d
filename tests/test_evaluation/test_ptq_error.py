"""Output error that weight quantization causes, layer by layer."""

import pytest
import torch
import torch.nn.functional as F
from builders import build_quantized, images

from gplq_mm.evaluation import layer_output_error
from gplq_mm.layers import quant_layers, quantizers_disabled, weights_disabled
from gplq_mm.ptq import RoundToNearest, quantize_weights

BATCHES = [images(seed=4), images(seed=5)]


def quantized(compensation=None):
    model = build_quantized('vit', compensation=compensation)
    quantize_weights(model, BATCHES, model, RoundToNearest())
    return model


@pytest.mark.parametrize('activations_quantized', [True, False])
@torch.no_grad()
def test_by_hand(activations_quantized):
    model = quantized(dict(type='QwT'))
    before = model(images())
    result = layer_output_error(model, BATCHES, model, activations_quantized)
    assert torch.equal(model(images()), before)  # it leaves no trace
    layers = quant_layers(model)
    assert set(result['layers']) == set(layers)
    name = 'backbone.layers.1.ffn.layers.1'
    layer, inputs = layers[name], []
    handle = layer.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    with weights_disabled(model) if activations_quantized else quantizers_disabled(model):
        for batch in BATCHES:
            model(batch)
    handle.remove()
    x = torch.cat(inputs)
    operand = layer.act_quantizer(x) if activations_quantized else x
    difference = layer(x) - F.linear(operand, layer.weight, layer.bias)
    assert result['layers'][name]['mae'] == pytest.approx(difference.abs().mean().item(), rel=1e-4)
    assert result['layers'][name]['mse'] == pytest.approx(
        difference.square().mean().item(), rel=1e-4
    )
    for key in ('mae', 'mse'):
        values = [value[key] for value in result['layers'].values()]
        assert min(values) > 0
        assert result[key] == pytest.approx(sum(values) / len(values))


def test_without_activation_error_less_is_left():
    model = quantized()
    full = layer_output_error(model, BATCHES, model, False)
    weights = layer_output_error(model, BATCHES, model, True)
    assert weights['mse'] < full['mse']


def test_needs_quantized_weights():
    model = build_quantized('vit')
    with pytest.raises(RuntimeError, match=r'patch_embed\.projection.*Stage 2'):
        layer_output_error(model, BATCHES, model, True)
