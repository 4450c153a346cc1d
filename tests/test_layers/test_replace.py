"""The in-place swap: what is replaced, and what is refused."""

import pytest
import torch
from builders import build_float, calibrated, images
from mmcv.cnn.bricks.wrappers import Conv2d as MMCVConv2d
from mmpretrain.models.heads.margin_head import NormProduct
from torch import nn

from gplq_mm.layers import (
    QuantConv2d,
    QuantLinear,
    find_blocks,
    quant_layers,
    quantize_model,
    quantizers_disabled,
)
from gplq_mm.quant import PolicyError, QuantPolicy

COUNTS = {'vit': (9, 1, 2, 2), 'swin': (18, 1, 4, 4), 'resnet': (1, 10, 0, 4)}


@pytest.mark.parametrize('kind', COUNTS)
def test_everything_is_replaced_and_keeps_its_key(kind):
    model = build_float(kind)
    before, expected = dict(model.named_parameters()), model(images())
    report = quantize_model(model, QuantPolicy(), dict(type='QwT'))
    found = (len(report.linear), len(report.conv), len(report.attention), len(report.blocks))
    assert found == COUNTS[kind]
    assert set(report.linear + report.conv) == set(quant_layers(model))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            assert isinstance(module, QuantLinear | QuantConv2d)
    after = dict(model.named_parameters())
    assert all(after[key] is value for key, value in before.items())
    assert str(COUNTS[kind][0]) in str(report)
    with quantizers_disabled(model):
        torch.testing.assert_close(model(images()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('kind', ['vit', 'swin'])
def test_hidden_values_of_mlps_have_a_setting_of_their_own(kind):
    model = build_float(kind)
    quantize_model(model, QuantPolicy('gplq-levels', hidden=dict(format='integer', bits=8)))
    formats = {
        name: layer.act_quantizer.spec.format
        for name, layer in quant_layers(model).items()
        if layer.act_quantizer.spec.bits == 8
    }
    hidden = [name for name in formats if 'ffn' in name]
    assert len(hidden) == len(find_blocks(model))
    assert all(name.endswith('layers.1') for name in hidden)
    others = [layer for name, layer in quant_layers(model).items() if name not in formats]
    assert {layer.act_quantizer.spec.format for layer in others} == {'levels'}


@pytest.mark.parametrize('kind', COUNTS)
def test_ends_have_eight_bits_and_the_rest_four(kind):
    model = build_float(kind)
    quantize_model(model, QuantPolicy())
    bits = {
        name: (layer.act_quantizer.spec.bits, layer.weight_quantizer.spec.bits)
        for name, layer in quant_layers(model).items()
    }
    ends = {
        'vit': {'backbone.patch_embed.projection', 'head.layers.head'},
        'swin': {'backbone.patch_embed.projection', 'head.fc'},
        'resnet': {'backbone.conv1', 'head.fc'},
    }[kind]
    assert {name for name, value in bits.items() if value == (8, 8)} == ends
    assert set(bits.values()) == {(8, 8), (4, 4)}


@pytest.mark.parametrize(('kind', 'axis'), [('vit', -1), ('swin', -1), ('resnet', 1)])
def test_every_block_gets_a_compensation(kind, axis):
    model = build_float(kind)
    quantize_model(model, QuantPolicy(), dict(type='QwTv2'))
    assert find_blocks(model)
    for name in find_blocks(model):
        assert model.get_submodule(name).compensation.axis == axis


def test_excluded_layers_stay_float():
    model = build_float('vit')
    rules = [dict(pattern=r'layers\.0\.ffn', exclude=True)]
    report = quantize_model(model, QuantPolicy(rules=rules))
    assert report.excluded == ['backbone.layers.0.ffn.layers.0.0', 'backbone.layers.0.ffn.layers.1']
    assert type(model.get_submodule(report.excluded[0])) is not QuantLinear
    assert isinstance(model.backbone.layers[1].ffn.layers[1], QuantLinear)


@pytest.mark.parametrize(
    'pattern', ['nowhere', r'layers\.0\.ln1', r'layers\.0$', r'layers\.0\.attn$']
)
def test_a_rule_that_reaches_no_site_is_an_error(pattern):
    # Neither a norm nor a block is a site, nor an attention whose products and layers are: such a
    # rule would silently do nothing.
    with pytest.raises(PolicyError, match='matches no layer'):
        quantize_model(build_float('vit'), QuantPolicy(rules=[dict(pattern=pattern, exclude=True)]))


class Net(nn.Module):
    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


UNSUPPORTED = {
    'transposed': lambda: nn.ConvTranspose2d(3, 4, 2),
    'conv1d': lambda: nn.Conv1d(3, 4, 2),
    'grouped': lambda: nn.Conv2d(4, 4, 3, groups=4),
    'torch_attention': lambda: nn.MultiheadAttention(8, 2),
    'recurrent': lambda: nn.LSTM(3, 4),
    'normed': lambda: NormProduct(3, 4),
}


@pytest.mark.parametrize('name', UNSUPPORTED)
def test_layers_without_a_twin_are_refused_by_name_or_excluded(name):
    layers = {'fc': nn.Linear(3, 4), name: UNSUPPORTED[name]()}
    with pytest.raises(PolicyError, match=rf"r'\^{name}\$', exclude=True\)"):
        quantize_model(Net(**layers), QuantPolicy())
    report = quantize_model(Net(**layers), QuantPolicy(rules=[dict(pattern=name, exclude=True)]))
    assert report.linear == ['fc']


def test_all_unsupported_layers_are_named_at_once_with_the_rules_that_exclude_them():
    def build():
        stages = [Net(conv=nn.Conv1d(3, 3, 1), fc=nn.Linear(3, 3)) for _ in range(12)]
        return Net(stages=nn.ModuleList(stages), grouped=nn.Conv2d(4, 4, 3, groups=4))

    with pytest.raises(PolicyError, match=r'^13 layer') as caught:
        quantize_model(build(), QuantPolicy())
    message = str(caught.value)
    assert '12 x Conv1d, such as stages.0.conv' in message
    # The rules as they stand in the message are enough.
    rules = [
        eval(line.partition('#')[0].strip().rstrip(','))
        for line in message.splitlines()
        if line.startswith('    dict(')
    ]
    assert len(rules) == 2
    assert len(quantize_model(build(), QuantPolicy(rules=rules)).linear) == 12


@pytest.mark.parametrize('name', ['MyAttention', 'MyAttn', 'TokenMixer', 'WindowMSA'])
def test_an_unknown_attention_is_refused_by_its_name(name):
    attention = type(name, (Net,), {})(qkv=nn.Linear(3, 9))
    with pytest.raises(PolicyError, match=rf'1 x {name}, such as mix'):
        quantize_model(Net(mix=attention), QuantPolicy())


@pytest.mark.parametrize('name', ['MlpMixer', 'RepMixer', 'ChannelAttn', 'SplitAttn'])
def test_what_multiplies_no_activations_is_no_attention(name):
    module = type(name, (Net,), {})(fc=nn.Linear(3, 9))
    assert quantize_model(Net(mix=module), QuantPolicy()).linear == ['mix.fc']


def state_of(model):
    """Classes and children of all modules."""
    return [(name, module, type(module)) for name, module in model.named_modules()]


LATE_ERRORS = {
    # The second layer of the first block, an attention, and what is built last.
    'layer': (dict(rules=[dict(pattern='proj', activation=dict(granularity='head'))]), None),
    'grid': (
        dict(rules=[dict(pattern='layers.1.ffn', activation=dict(format='log_sqrt2'))]),
        None,
    ),
    'attention': (dict(q=dict(granularity='token')), None),
    'compensation': ({}, dict(type='QwT', ridge='none')),
}


@pytest.mark.parametrize(('policy', 'compensation'), LATE_ERRORS.values(), ids=LATE_ERRORS)
def test_a_refused_model_is_unchanged(policy, compensation):
    model = build_float('vit')
    before, expected = state_of(model), model(images())
    with pytest.raises((PolicyError, ValueError)):
        quantize_model(model, QuantPolicy(**policy), compensation)
    assert state_of(model) == before
    assert torch.equal(model(images()), expected)
    assert quantize_model(model, QuantPolicy()).linear


def test_a_policy_that_excludes_everything_is_refused():
    model = build_float('vit')
    before = state_of(model)
    with pytest.raises(PolicyError, match=r'excludes all \d+ layers'):
        quantize_model(model, QuantPolicy(exclude=['.']))
    assert state_of(model) == before
    report = quantize_model(model, QuantPolicy(exclude=['.']), may_stay_float=True)
    assert not quant_layers(model)
    assert len(report.excluded) == 12


def test_a_quantized_model_is_not_quantized_again():
    model = build_float('vit')
    quantize_model(model, QuantPolicy())
    with pytest.raises(PolicyError, match='quantized already'):
        quantize_model(model, QuantPolicy())


def test_mmcv_wrappers_are_convolutions():
    model = nn.Sequential(MMCVConv2d(3, 4, 3))
    assert quantize_model(model, QuantPolicy()).conv == ['0']
    x = torch.randn(2, 3, 8, 8)
    assert calibrated(model, x)(x).shape == (2, 4, 6, 6)


@pytest.mark.parametrize('model', [nn.ReLU(), nn.Sequential(nn.LayerNorm(3), nn.GELU())])
def test_a_model_without_layers(model):
    with pytest.raises(PolicyError, match='no Linear'):
        quantize_model(model, QuantPolicy())


def test_layers_inside_sequences_and_lists():
    model = Net(a=nn.Sequential(nn.Linear(3, 3), nn.ReLU()), b=nn.ModuleList([nn.Linear(3, 3)]))
    assert quantize_model(model, QuantPolicy()).linear == ['a.0', 'b.0']
    assert isinstance(model.a[0], QuantLinear)
    assert isinstance(model.b[0], QuantLinear)


def test_a_layer_in_two_places_stays_one():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict(dict(a=nn.Sequential(shared), b=nn.Sequential(shared, nn.Linear(4, 4))))
    report = quantize_model(model, QuantPolicy())
    assert isinstance(model['a'][0], QuantLinear)
    assert model['a'][0] is model['b'][0]
    assert report.linear == ['a.0', 'b.1']
