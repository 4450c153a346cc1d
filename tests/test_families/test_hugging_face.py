"""Models of transformers: quantized, compensated and packed."""

import copy
import sys

import pytest
import torch
from builders import images
from family_cases import (
    SWIN,
    VIT,
    check_compensation,
    check_packed,
    first,
    lively,
    quantized,
    widths,
)
from torch import nn

from gplq_mm.families.hugging_face import Int4SwinLayer, Int4SwinPatchMerging
from gplq_mm.layers import QuantMlp
from gplq_mm.layers.family import families
from gplq_mm.models.feature_tap import feature_layer_of

DINO = dict(**{**VIT, 'mlp_ratio': 2}, layerscale_value=0.5, drop_path_rate=0.1)


@pytest.fixture(scope='module')
def build(transformers):
    """Builds a float model."""
    configs = dict(ViT=VIT, Dinov2=DINO, Swin=SWIN)

    def make(kind: str, tail: str = 'Model', **options) -> nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, f'{kind}Config')(**{**configs[kind], **options})
        config._attn_implementation = options.get('attn_implementation', 'sdpa')
        return lively(getattr(transformers, kind + tail)(config))

    return make


def batches(size: int = 32) -> list[torch.Tensor]:
    return [nn.functional.interpolate(images(4, seed=seed), size) for seed in (1, 2)]


CASES = {
    'vit': dict(kind='ViT'),
    'vit eager': dict(kind='ViT', attn_implementation='eager'),
    'classifier': dict(kind='ViT', tail='ForImageClassification'),
    'dinov2': dict(kind='Dinov2'),
    'swin': dict(kind='Swin'),
    'swin classifier': dict(kind='Swin', tail='ForImageClassification'),
    # Shifted windows of the first stage pad.
    'padded swin': dict(kind='Swin', image_size=40),
}


@pytest.mark.parametrize('case', CASES)
def test_packed_and_fused(build, case):
    options = CASES[case]
    x = batches(options.get('image_size', 32))
    simulated = quantized(build(**options), *x)
    linears = [m for m in simulated.modules() if isinstance(m, QuantMlp)]
    assert len(linears) == (4 if 'swin' in case else 2)
    packed = check_packed(simulated, x[0], x[0][:1])
    blocks = [module for module in packed.modules() if hasattr(module, 'fuses_attention')]
    assert len(blocks) == len(linears)
    assert all(block.fuses_attention and block.fuses_mlp for block in blocks)
    assert sum(isinstance(m, Int4SwinLayer) for m in blocks) == (4 if 'swin' in case else 0)
    mergings = [m for m in packed.modules() if isinstance(m, Int4SwinPatchMerging)]
    assert len(mergings) == ('swin' in case)


@pytest.mark.parametrize('kind', ['ViT', 'Dinov2'])
def test_compensation(build, kind):
    check_compensation(build(kind), *batches())


@pytest.mark.parametrize('implementation', ['eager', 'sdpa'])
def test_masks(build, implementation):
    """A mask of tokens that nobody may look at."""
    x = batches()
    simulated = quantized(build('ViT', attn_implementation=implementation), *x)
    mask = torch.ones(4, 17, dtype=torch.long)
    mask[:, 9:] = 0
    with torch.no_grad():
        masked, free = (first(simulated(x[0], attention_mask=m)) for m in (mask, None))
    assert (masked - free).norm() > 0.1 * free.norm()
    check_packed(simulated, x[0], attention_mask=mask)


def test_hidden_states_are_captured(build):
    x = batches()
    simulated = quantized(build('Dinov2'), *x)
    packed = check_packed(copy.deepcopy(simulated), x[0])
    with torch.no_grad():
        states = packed(x[0], output_hidden_states=True).hidden_states
        expected = simulated(x[0], output_hidden_states=True).hidden_states
    assert len(states) == 3
    for state, other in zip(states, expected, strict=True):
        assert (state - other).norm() <= 0.1 * other.norm()


@pytest.mark.parametrize('kind', ['ViT', 'Dinov2'])
def test_half_precision(build, kind):
    """transformers asks the first layer's weight for the type of images."""
    packed = check_packed(quantized(build(kind), *batches()), batches()[0])
    with torch.no_grad():
        expected = first(packed(batches()[0])).flatten()
        out = first(packed.half()(batches()[0].half()))
    assert out.dtype == torch.float16
    assert torch.cosine_similarity(out.float().flatten(), expected, dim=0) > 0.9


def test_first_and_last_layers_have_8_bits(build):
    first_layer = 'embeddings.patch_embeddings.projection'
    ends = {
        ('ViT', 'Model'): (first_layer, 'pooler.dense'),
        ('Dinov2', 'ForImageClassification'): (f'dinov2.{first_layer}', 'classifier'),
        ('Swin', 'ForImageClassification'): (f'swin.{first_layer}', 'classifier'),
    }
    for (kind, tail), names in ends.items():
        model = quantized(build(kind, tail), *batches())
        assert widths(model) == dict.fromkeys(names, (8, 8))


def test_features_to_mimic(build):
    model = build('ViT', 'ForImageClassification')
    assert feature_layer_of(model, None) is model.classifier
    assert feature_layer_of(model.vit, None) is model.vit.layernorm
    model = build('ViT')
    assert feature_layer_of(model, None) is model.pooler.dense


def test_all_classes_exist(transformers):
    """A release that renames a class is noticed."""
    family = next(entry for entry in families() if entry.__name__ == 'HuggingFace')
    tables = (family.attentions, family.blocks, family.mlps, family.fused, family.features)
    for name in (key for table in tables for key in table):
        module, _, cls = name.rpartition('.')
        assert hasattr(sys.modules[module], cls)
