"""Formats of a user's own in packed models."""

import pytest
import torch
from builders import images
from own_formats import register_for
from packed_models import assert_close_but_for_flips, quantized_classifier, run_config

from gplq_mm.deploy import DeployError, convert, load, save
from gplq_mm.layers import QuantAttention, quant_layers
from gplq_mm.quant import PolicyError
from gplq_mm.registry import FORMATS


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    register_for(monkeypatch)


@torch.no_grad()
def test_integers_need_their_format_no_more(tmp_path, monkeypatch):
    own = dict(format='even_scale')
    simulated = quantized_classifier('vit', dict(activation=own, q=own, k=own, v=own))
    expected = simulated(images(4))
    path = tmp_path / 'vit.safetensors'
    save(simulated, run_config('vit'), path)
    monkeypatch.delitem(FORMATS.module_dict, 'even_scale')
    loaded = load(path)
    assert loaded.deploy_report.simulated == {}
    assert_close_but_for_flips(loaded(images(4)), expected)


@torch.no_grad()
def test_probabilities_of_another_format_stay_simulated(tmp_path, monkeypatch):
    own = dict(format='square_root', row_relative=False)
    simulated = quantized_classifier('vit', dict(probs=own))
    expected = simulated(images(4))
    path = tmp_path / 'vit.safetensors'
    save(simulated, run_config('vit'), path)
    loaded = load(path)
    assert all('square_root' in reason for reason in loaded.deploy_report.simulated.values())
    assert sum(isinstance(module, QuantAttention) for module in loaded.modules()) == 2
    assert_close_but_for_flips(loaded(images(4)), expected)
    monkeypatch.delitem(FORMATS.module_dict, 'square_root')
    with pytest.raises(DeployError, match=r"'square_root' is not one of .*custom_imports"):
        load(path)


def test_a_layer_of_another_format_is_a_simulation():
    own = dict(format='square_root', zero_point='none')
    rule = dict(pattern=r'layers\.0\.ffn\.layers\.1$', activation=own)
    with pytest.raises(PolicyError, match=r'layers\.0\.ffn.*square_root.*layout="raw"'):
        quantized_classifier('vit', dict(rules=[rule]))
    simulated = quantized_classifier('vit', dict(rules=[{**rule, 'weight': dict(layout='raw')}]))
    layer = simulated.backbone.layers[0].ffn.layers[1]
    x = torch.rand(4, layer.in_features)
    with torch.no_grad():
        rounded = layer.act_quantizer(x) @ layer.dequantized_weight().T + layer.bias
        torch.testing.assert_close(layer(x), rounded)
    with pytest.raises(DeployError, match='square_root is a simulation'):
        convert(simulated)


@torch.no_grad()
@pytest.mark.parametrize('kind', ['vit', 'swin'])
@pytest.mark.parametrize(
    'policy',
    [
        dict(activation=dict(format='mxfp4'), weight=dict(format='nvfp4')),
        dict(activation=dict(format='nvfp4'), weight=dict(format='mxfp4')),
        dict(weight=dict(format='mxfp4')),
    ],
)
def test_block_scaled_formats_are_simulations(kind, policy):
    simulated = quantized_classifier(kind, policy)
    layer = next(
        layer for name, layer in quant_layers(simulated).items() if name.endswith('ffn.layers.1')
    )
    x = torch.randn(4, layer.in_features)
    rounded = layer.act_quantizer(x) @ layer.dequantized_weight().T + layer.bias
    torch.testing.assert_close(layer(x), rounded)
    assert simulated(images(2)).isfinite().all()
    with pytest.raises(DeployError, match=r'fp4 is a simulation.*format="integer"'):
        convert(simulated)
    with pytest.raises(DeployError, match='fp4 is a simulation'):
        save(simulated, run_config(kind), 'never_written.safetensors')
