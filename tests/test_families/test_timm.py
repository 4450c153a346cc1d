"""Models of timm: quantized, compensated and packed."""

import copy

import pytest
import torch
from builders import images
from family_cases import check_compensation, check_packed, lively, quantized, widths
from timm.models import SwinTransformer, VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from torch import nn

from gplq_mm import deploy
from gplq_mm.families.timm import Int4TimmBlock, Int4TimmPatchMerging, Int4TimmSwinBlock
from gplq_mm.layers import QuantMlp, quantize_model
from gplq_mm.models.feature_tap import feature_layer_of, feature_width
from gplq_mm.quant import PolicyError, QuantPolicy

VIT = dict(
    img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, num_classes=5
)
SWIN = dict(
    img_size=32,
    patch_size=4,
    embed_dim=16,
    depths=(2, 2),
    num_heads=(2, 2),
    window_size=4,
    num_classes=5,
    strict_img_size=False,
)
CASES = {
    'vit': lambda: VisionTransformer(**VIT),
    'layer scale': lambda: VisionTransformer(**VIT, init_values=0.1, drop_path_rate=0.1),
    'deit': lambda: VisionTransformerDistilled(**VIT),
    'swin': lambda: SwinTransformer(**SWIN),
    # Every shifted window of either stage pads, and windows are no squares.
    'padded swin': lambda: SwinTransformer(**{**SWIN, 'window_size': (3, 4), 'img_size': 40}),
}


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return lively(CASES[kind]())


def batches(kind: str) -> list[torch.Tensor]:
    size = 40 if kind == 'padded swin' else 32
    return [nn.functional.interpolate(images(4, seed=seed), size) for seed in (1, 2)]


@pytest.fixture(scope='module')
def models():
    cache: dict[str, nn.Module] = {}

    def get(kind: str) -> nn.Module:
        if kind not in cache:
            cache[kind] = quantized(build(kind), *batches(kind))
        return copy.deepcopy(cache[kind])

    return get


@pytest.mark.parametrize('kind', CASES)
def test_packed_and_fused(models, kind):
    x = batches(kind)[0]
    packed = check_packed(models(kind), x, x[:1])
    blocks = [m for m in packed.modules() if isinstance(m, Int4TimmBlock | Int4TimmSwinBlock)]
    assert len(blocks) == (4 if 'swin' in kind else 2)
    assert all(block.fuses_attention and block.fuses_mlp for block in blocks)
    merging = [m for m in packed.modules() if isinstance(m, Int4TimmPatchMerging)]
    assert len(merging) == ('swin' in kind)


@pytest.mark.parametrize('kind', ['layer scale', 'padded swin'])
def test_compensation(kind):
    check_compensation(build(kind), *batches(kind))


def test_first_and_last_layers_have_8_bits(models):
    assert widths(models('deit')) == dict.fromkeys(
        ('patch_embed.proj', 'head', 'head_dist'), (8, 8)
    )
    assert widths(models('swin')) == dict.fromkeys(('patch_embed.proj', 'head.fc'), (8, 8))
    model = build('vit')
    rules = [dict(pattern='^head$', weight=dict(bits=3))]
    quantize_model(model, QuantPolicy(rules=rules))
    assert widths(model) == {'patch_embed.proj': (8, 8), 'head': (3, 8)}


def test_another_size_of_images(models):
    """Maps of windows are made for every size."""
    simulated = models('swin')
    for block in simulated.modules():
        if hasattr(block, 'dynamic_mask'):
            block.dynamic_mask = True
    x = nn.functional.interpolate(images(2, seed=3), (36, 44))
    check_packed(simulated, x)


def test_the_mlp_is_one_product(models):
    assert sum(isinstance(module, QuantMlp) for module in models('vit').modules()) == 2


@pytest.mark.parametrize('causal', [False, True])
def test_masks(models, causal):
    """A packed attention heeds a mask as the simulated one does."""
    simulated = models('vit')
    options = dict(is_causal=True)
    if not causal:
        mask = torch.rand(1, 1, 17, 17, generator=torch.Generator().manual_seed(0)) > 0.3
        options = dict(attn_mask=mask | torch.eye(17, dtype=torch.bool))
    x = batches('vit')[0]
    with torch.no_grad():
        masked, free = simulated(x, **options), simulated(x)
    assert (masked - free).norm() > 0.3 * free.norm()
    check_packed(simulated, x, **options)


def test_normalized_queries_stay_simulated():
    model = quantized(lively(VisionTransformer(**VIT, qk_norm=True)), *batches('vit'))
    packed = deploy.convert(model)
    assert 'normalizes' in packed.deploy_report.simulated['blocks.0.attn']
    with torch.no_grad():
        torch.testing.assert_close(packed(images(2)), model(images(2)), rtol=1e-3, atol=1e-3)


def test_blocks_with_the_norm_behind():
    model = lively(VisionTransformer(**VIT, block_fn=ResPostBlock))
    check_packed(quantized(model, *batches('vit')), batches('vit')[0])


@pytest.mark.parametrize(
    ('options', 'cls'),
    [
        (dict(block_fn=ParallelScalingBlock), 'ParallelScalingBlock'),
        (dict(global_pool='map', class_token=False), 'AttentionPoolLatent'),
    ],
)
def test_products_that_are_unknown_are_named(options, cls):
    with pytest.raises(PolicyError, match=cls):
        quantize_model(VisionTransformer(**VIT, **options), QuantPolicy())


def test_features_to_mimic():
    model = VisionTransformer(**VIT)
    assert feature_layer_of(model, None) is model.head
    model.reset_classifier(0)
    assert feature_layer_of(model, None) is model.norm
    assert feature_width(model.norm, None, {}) == 32
    swin = SwinTransformer(**SWIN)
    assert feature_layer_of(swin, None) is swin.head.fc
