"""Packed attention: the op gives what the simulated products give."""

import pytest
import torch
from mmdet.models.backbones.swin import WindowMSA as DetWindowMSA
from mmpretrain.models.utils.attention import MultiheadAttention, WindowMSA
from packed_models import assert_close_but_for_flips
from torch import nn

from gplq_mm.layers import DeployError, Int4Attention, QuantAttention, calibrate, freeze_activations
from gplq_mm.layers.family import entry_of
from gplq_mm.quant import QuantPolicy

HEADS, CHANNELS = 2, 16


def pack_attention(module: nn.Module) -> str | None:
    return entry_of(module, 'attentions').pack(module)


def quantized(module: nn.Module, inputs: tuple, policy: dict | None = None, freeze=True):
    policy = QuantPolicy(**(policy or {}))
    specs = {key: policy.resolve(f'a.{key}', key).activation for key in ('q', 'k', 'v', 'probs')}
    entry_of(module, 'attentions').quantize(module, specs, 'a')
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    module.eval()
    with torch.no_grad():
        calibrate(module, lambda *_: module(*inputs))
    if freeze:
        freeze_activations(module)
    return module


def vit(policy=None, **options):
    torch.manual_seed(0)
    x = torch.randn(3, 10, CHANNELS)
    return quantized(MultiheadAttention(CHANNELS, HEADS, **options), (x,), policy), x


def swin(cls, policy=None, masked=True):
    torch.manual_seed(0)
    x = torch.randn(6, 12, CHANNELS)
    mask = torch.zeros(3, 12, 12)
    mask[1, :6, 6:] = mask[1, 6:, :6] = -100
    inputs = (x, mask if masked else None)
    layer = cls(embed_dims=CHANNELS, window_size=(3, 4), num_heads=HEADS)
    return quantized(layer, inputs, policy), inputs


POLICIES = {
    'default': {},
    'paper': dict(preset='paper'),
    'tensor': dict(
        q=dict(granularity='tensor'),
        k=dict(granularity='tensor', zero_point='integer'),
        v=dict(granularity='tensor', bits=8),
    ),
    'uniform probs': dict(probs=dict(row_relative=False)),
    'levels': {key: dict(format='levels') for key in ('q', 'k', 'v', 'probs')},
}


@pytest.mark.parametrize('policy', POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize('options', [{}, dict(layer_scale_init_value=0.3)], ids=['plain', 'scaled'])
@torch.no_grad()
def test_multihead(policy, options):
    module, x = vit(policy, **options)
    expected = module(x)
    assert pack_attention(module) is None
    assert isinstance(module.scaled_dot_product_attention, Int4Attention)
    assert_close_but_for_flips(module(x), expected)


@pytest.mark.parametrize('policy', POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('cls', [WindowMSA, DetWindowMSA])
@torch.no_grad()
def test_windows(cls, masked, policy):
    module, inputs = swin(cls, policy, masked)
    expected = module(*inputs)
    keys = set(module.state_dict())
    assert pack_attention(module) is None
    assert_close_but_for_flips(module(*inputs), expected)
    assert not any('quant_attention.q.' in key for key in module.state_dict())
    assert {key for key in keys if 'quant_attention' not in key} <= set(module.state_dict())


REFUSED = {
    'excluded': (dict(exclude=[r'a\.v$']), 'v is not quantized'),
    'log_sqrt2': (
        dict(probs=dict(format='log_sqrt2', zero_point='none', row_relative=False)),
        'log_sqrt2',
    ),
    'token': (dict(q=dict(granularity='token', tokens=10)), 'scale per token'),
}


@pytest.mark.parametrize(('policy', 'reason'), REFUSED.values(), ids=REFUSED)
@torch.no_grad()
def test_what_the_op_cannot_do_stays_simulated(policy, reason):
    module, x = vit(policy)
    expected = module(x)
    assert reason in pack_attention(module)
    assert isinstance(module.scaled_dot_product_attention, QuantAttention)
    assert torch.equal(module(x), expected)
    with pytest.raises(DeployError, match=reason):
        Int4Attention.from_quantized(module.scaled_dot_product_attention, HEADS, 1.0)


@torch.no_grad()
def test_qk_scale_stays_simulated():
    """mmpretrain then divides by the square root's inverse, a hook of the simulation."""
    module, _ = vit(qk_scale=0.5)
    assert 'hooks' in pack_attention(module)


@torch.no_grad()
def test_shortcut_stays_simulated():
    module, _ = vit()
    module.v_shortcut = True
    assert 'adds the values' in pack_attention(module)


def test_not_frozen():
    torch.manual_seed(0)
    module = quantized(
        MultiheadAttention(CHANNELS, HEADS), (torch.randn(3, 10, CHANNELS),), freeze=False
    )
    with pytest.raises(DeployError, match='LEARNING'):
        pack_attention(module)


def test_switched_off():
    module, _ = vit()
    module.scaled_dot_product_attention.k.enabled = False
    with pytest.raises(DeployError, match='switched off'):
        pack_attention(module)


@torch.no_grad()
def test_half_keeps_the_grids():
    module, _ = vit()
    pack_attention(module)
    packed = module.scaled_dot_product_attention
    grids = packed.grids.clone()
    packed.half()
    assert torch.equal(packed.grids, grids)


def test_grids_are_those_of_the_quantizers():
    attention = QuantAttention(
        {k: QuantPolicy().resolve(k, k).activation for k in ('q', 'k', 'v', 'probs')}, 2, None, 'a'
    )
    with torch.no_grad():
        q = torch.randn(1, 2, 5, 4)
        calibrate(attention, lambda *_: attention(q, q, q))
    freeze_activations(attention)
    packed = Int4Attention.from_quantized(attention, 2, 0.5)
    for index, operand in enumerate(('q', 'k', 'v')):
        scale, offset = getattr(attention, operand).grid()
        assert torch.equal(packed.grids[index, 0], scale.flatten())
        assert torch.equal(packed.grids[index, 1], offset.flatten())
    assert not packed.grids[3, 1].any()
    assert packed.limits == [0, 15] * 4
    assert packed.row_relative
