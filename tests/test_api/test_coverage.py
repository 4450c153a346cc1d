"""``gplq_mm.coverage``: every multiply-add once, at its width, under its module."""

import pytest
import torch
from builders import FAST, build_float, images
from packed_models import finish
from torch import nn

import gplq_mm
from gplq_mm.evaluation.coverage import Coverage
from gplq_mm.layers import quant_layers

# The ViT of the tests: 16 patches and a class token of width 32, two blocks, two heads.
PATCHES, TOKENS, WIDTH, HIDDEN, CLASSES = 16, 17, 32, 64, 5
VIT = {
    'w8a8': PATCHES * WIDTH * 3 * 8 * 8 + WIDTH * CLASSES,
    'w4a4': 2 * TOKENS * (4 * WIDTH**2 + 2 * WIDTH * HIDDEN),
    'a4': 2 * 2 * TOKENS**2 * WIDTH,
}


def counted(model: nn.Module, count: int = 2) -> Coverage:
    return gplq_mm.coverage(model, images(count))


@pytest.fixture(scope='module')
def vit() -> nn.Module:
    torch.manual_seed(0)
    return finish(build_float('vit'))


def test_counts_are_those_of_the_architecture(vit):
    simulated, packed = counted(vit), counted(gplq_mm.convert(vit))
    assert simulated.widths == packed.widths == {key: 2 * value for key, value in VIT.items()}
    assert simulated.modules == packed.modules
    assert simulated.in_float == {}
    assert simulated.shares['w4a4'] == VIT['w4a4'] / sum(VIT.values())
    assert sum(simulated.shares.values()) == pytest.approx(1)


def test_a_float_model_is_in_float():
    model = build_float('vit').train()
    model.head.eval()
    found = counted(model, 1)
    assert found.widths == {'float': sum(VIT.values())}
    assert model.training
    assert not model.head.training
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize('kind', ['swin', 'resnet'])
def test_other_families_count_alike(kind):
    torch.manual_seed(0)
    float_model = build_float(kind)
    total = sum(counted(float_model).widths.values())
    model = finish(float_model)
    simulated, packed = counted(model), counted(gplq_mm.convert(model))
    assert sum(simulated.widths.values()) == sum(packed.widths.values()) == total
    assert simulated.modules == packed.modules
    assert simulated.in_float == {}


def test_what_stays_in_float_is_named():
    torch.manual_seed(0)
    model = finish(
        build_float('vit'),
        dict(rules=[dict(pattern=r'layers\.0\.ffn|layers\.1\.attn\.(q|k|v|probs)$', exclude=True)]),
    )
    found = counted(model, 1)
    mlp = TOKENS * WIDTH * HIDDEN
    assert found.in_float == {
        'backbone.layers.0.ffn.layers.0.0': mlp,
        'backbone.layers.0.ffn.layers.1': mlp,
        'backbone.layers.1.attn': 2 * TOKENS**2 * WIDTH,
    }
    assert 'backbone.layers.0.ffn.layers.1' in str(found)
    assert found.to_dict()['in_float'] == found.in_float
    # Weights that are not rounded yet.
    for layer in quant_layers(model).values():
        layer.weight_quantizer.clear()
    assert {'w32a4', 'w32a8', 'a4', 'float'} == set(counted(model).widths)


class Unseen(nn.Module):
    """Multiplies where no layer is."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        x = self.layer(x)
        return torch.einsum('bij,bkj->bik', x, x)


def test_products_outside_of_layers_are_seen():
    model = Unseen()
    found = gplq_mm.coverage(model, torch.randn(2, 4, 8))
    assert found.in_float == {'layer': 2 * 4 * 8 * 8, '': 2 * 4 * 4 * 8}


def test_products_of_a_forward_of_its_own_are_seen():
    """It calls a part of the model, and goes on with what that gives."""
    projection = torch.randn(CLASSES, 3)
    head = build_float('vit').head
    found = gplq_mm.coverage(
        head, torch.randn(2, WIDTH), lambda head, x: head.layers.head(x) @ projection
    )
    assert found.modules == {
        'layers.head': {'float': 2 * WIDTH * CLASSES},
        '': {'float': 2 * CLASSES * 3},
    }


class TokenMixing(nn.Module):
    """An attention that no family knows, and whose name does not say what it is."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.transpose(-2, -1)).softmax(-1) @ v)


def mixing() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(TokenMixing(8) for _ in range(2)), nn.Linear(8, 3)).eval()


TOKENS_OF_MIXING = [torch.randn(4, 6, 8) for _ in range(2)]


def test_products_that_no_family_knows_are_warned_of():
    found = r'2 x TokenMixing, such as 0 \([\d.]+%\).*docs/extending\.md'
    with pytest.warns(UserWarning, match=found) as caught:
        model = gplq_mm.quantize_(mixing(), TOKENS_OF_MIXING, policy=FAST)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    layers, products = 6 * 8 * (24 + 8), 2 * 6 * 6 * 8
    share = products / (2 * (layers + products) + 6 * 8 * 3)
    assert model.gplq_report.unknown == {'0': pytest.approx(share), '1': pytest.approx(share)}
    assert f'{2 * share:.1%} unknown products in float' in str(model.gplq_report)
    assert set(gplq_mm.coverage(model, TOKENS_OF_MIXING[0]).in_float) == {'0', '1'}


def test_products_that_a_rule_leaves_in_float_are_not(recwarn):
    rules = [dict(pattern=r'^\d$', exclude=True, optional=True)]
    model = gplq_mm.quantize_(mixing(), TOKENS_OF_MIXING, policy={**FAST, 'rules': rules})
    assert model.gplq_report.unknown == {}
    rules = [dict(pattern=r'layers\.0\.(attn|ffn)', exclude=True)]
    model = gplq_mm.quantize_(build_float('vit'), [images(8)], policy={**FAST, 'rules': rules})
    assert model.gplq_report.unknown == {}
    assert not [warning for warning in recwarn if 'family' in str(warning.message)]


def test_compensation_is_in_float():
    torch.manual_seed(0)
    model = build_float('vit')
    batches = [images(16, seed=seed) for seed in range(4)]
    gplq_mm.quantize_(model, batches, policy={**FAST, 'weight': dict(bits=2, observer='minmax')})
    kept = [name for name, score in model.gplq_report.compensation_r2.items() if score > 0]
    assert kept
    for found in (counted(model, 1), counted(gplq_mm.convert(model), 1)):
        wanted = {f'{block}.compensation': TOKENS * WIDTH**2 for block in kept}
        assert found.in_float == wanted
