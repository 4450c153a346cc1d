"""Looking up what families know, and mixing classes."""

import copy

import pytest
import torch
from torch import nn

from gplq_mm.layers import (
    AttentionKind,
    Family,
    QuantAttention,
    calibrate,
    quantize_model,
    quantizers_disabled,
    with_mixin,
)
from gplq_mm.layers.family import entry_of, families, headlines, scopes
from gplq_mm.quant import QuantPolicy
from gplq_mm.registry import FAMILIES


class StrangeAttention(nn.Module):
    """An attention that the package does not know."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))


class Derived(StrangeAttention):
    pass


class QuantStrange:
    def forward(self, x):
        return self.product(*(part[:, None] for part in self.qkv(x).chunk(3, -1)))[:, 0]


def quantize(module, specs, name):
    module.product = QuantAttention(specs, 1, None, name)
    with_mixin(module, QuantStrange)


STRANGE = f'{__name__}.StrangeAttention'


@pytest.fixture
def register(monkeypatch):
    """Registers families that are forgotten after the test."""
    FAMILIES.import_from_location()
    monkeypatch.setattr(FAMILIES, '_module_dict', dict(FAMILIES.module_dict))

    def add(**tables) -> type[Family]:
        cls = type(f'Family{len(families())}', (Family,), tables)
        return FAMILIES.register_module(module=cls)

    return add


@pytest.fixture
def model():
    return nn.ModuleDict(dict(attn=StrangeAttention()))


def test_an_attention_of_a_registered_family_is_quantized(register, model):
    register(attentions={STRANGE: AttentionKind(quantize)})
    attn, x = model['attn'], torch.randn(4, 9, 16)
    keys, expected = set(attn.state_dict()), attn(x)
    report = quantize_model(model, QuantPolicy())
    assert report.attention == ['attn']
    assert keys < set(attn.state_dict())
    with torch.no_grad():
        calibrate(model, lambda _index, _passes: attn(x))
    with quantizers_disabled(model):
        torch.testing.assert_close(attn(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(attn(x), expected)


def test_products_count_for_exactly_one_class_and_blocks_for_those_derived(register):
    kind = AttentionKind(quantize)
    register(attentions={STRANGE: kind}, blocks={STRANGE: 1}, fused={STRANGE: quantize})
    assert entry_of(StrangeAttention(), 'attentions') is kind
    assert entry_of(Derived(), 'attentions') is None
    assert entry_of(Derived(), 'fused') is None
    assert entry_of(Derived(), 'blocks') == 1
    assert entry_of(nn.Linear(1, 1), 'blocks') is None


def test_the_family_registered_last_counts(register):
    register(blocks={STRANGE: 1})
    register(blocks={STRANGE: -1})
    assert entry_of(StrangeAttention(), 'blocks') == -1


def test_headlines_and_scopes_are_those_of_all_families(register):
    before = scopes()
    assert {'mmengine', 'mmpretrain', 'mmdet', 'gplq_mm'} == set(before)
    register(headlines={'mIoU': ('mIoU', 1.0)}, scopes={'mmseg': r'models\.'})
    assert scopes() == {**before, 'mmseg': r'models\.'}
    assert headlines()['mIoU'] == ('mIoU', 1.0)
    assert {'accuracy/top1', 'coco/bbox_mAP'} < set(headlines())


def test_a_mixed_class_is_found_by_its_name_and_mixed_once(register, model):
    register(attentions={STRANGE: AttentionKind(quantize)})
    attn = model['attn']
    assert with_mixin(attn, QuantStrange)
    assert isinstance(attn, StrangeAttention)
    assert entry_of(attn, 'attentions') is not None
    assert not with_mixin(attn, QuantStrange)
    # One class for all modules; others are untouched.
    other = copy.deepcopy(attn)
    assert type(other) is type(attn)
    assert not isinstance(StrangeAttention(), QuantStrange)
