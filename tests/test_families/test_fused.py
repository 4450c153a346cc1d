"""Fused blocks give what their modules give one by one."""

import copy

import pytest
import torch
from builders import images
from mmcv.cnn.bricks import transformer as mmcv_transformer
from mmdet.models.layers.transformer import utils as mmdet_transformer
from mmpretrain.models.utils import embed as mmpretrain_embed
from mmpretrain.models.utils.attention import ShiftWindowMSA
from packed_models import (
    assert_close_but_for_flips,
    fill_compensations,
    finish,
    quantized_classifier,
)
from torch import nn

from gplq_mm.deploy import convert
from gplq_mm.families.swin import Int4PatchMerging, Int4SwinBlock, window_maps
from gplq_mm.families.vit import Int4EncoderLayer
from gplq_mm.layers import Int4Linear
from gplq_mm.layers.fused import fuse_blocks


@pytest.fixture(scope='module')
def models():
    """Simulated models after Stage 2, made on demand."""
    cache: dict = {}

    def get(kind: str, **options) -> nn.Module:
        key = (kind, repr(sorted(options.items())))
        if key not in cache:
            torch.manual_seed(0)
            cache[key] = quantized_classifier(kind, **options)
        return copy.deepcopy(cache[key])

    return get


@torch.no_grad()
def agrees(simulated: nn.Module, deployed: nn.Module, x: torch.Tensor) -> None:
    assert_close_but_for_flips(deployed(x), simulated(x))


# -- window maps ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('height', 'width', 'window', 'shift'),
    [(8, 8, 4, 2), (8, 8, 4, 0), (6, 9, 4, 2), (3, 2, 4, 2), (7, 7, 7, 3), (13, 5, 3, 1)],
)
@pytest.mark.parametrize('batch', [1, 3])
def test_maps_do_what_pad_roll_and_partition_do(batch, height, width, window, shift):
    """Against the copies that mmpretrain makes, and its mask."""
    tokens = torch.arange(1, batch * height * width + 1).float()
    padded = nn.functional.pad(
        tokens.view(batch, height, width, 1), (0, 0, 0, -width % window, 0, -height % window)
    )
    rolled = torch.roll(padded, (-shift, -shift), (1, 2))
    expected = ShiftWindowMSA.window_partition(rolled, window).reshape(-1, window**2)
    rows, mask = window_maps(batch, height, width, (window,) * 2, (shift,) * 2, torch.device('cpu'))
    assert rows.dtype == torch.int32
    source = torch.cat((tokens, torch.zeros(1)))
    assert torch.equal(source[rows.long()], expected)
    own = ShiftWindowMSA.get_attn_mask(padded.shape[1:3], window, shift)
    if shift:
        assert torch.equal(mask, own)
    else:
        assert mask is None
        assert own is None


def test_every_token_is_in_exactly_one_window():
    rows, _ = window_maps(2, 5, 6, (4, 4), (2, 2), torch.device('cpu'))
    inside = rows[rows < 60]
    assert inside.sort().values.tolist() == list(range(60))


# -- blocks -----------------------------------------------------------------------------------


@pytest.mark.parametrize('options', [{}, dict(layer_scale_init_value=0.1)], ids=['deit', 'scaled'])
def test_encoder_layer(models, options):
    simulated = models('vit', **options)
    deployed = convert(simulated)
    blocks = deployed.backbone.layers
    assert all(isinstance(block, Int4EncoderLayer) for block in blocks)
    assert all(block.fuses_attention and block.fuses_mlp for block in blocks)
    agrees(simulated, deployed, images(3, seed=5))


SWINS = {
    'plain': {},
    # mmdet's way with small maps.
    'padded': dict(pad_small_map=True),
}


@pytest.mark.parametrize('options', SWINS.values(), ids=SWINS)
@pytest.mark.parametrize('size', [(32, 32), (40, 36), (36, 44)])
def test_swin_block(models, options, size):
    simulated = models('swin', **options)
    deployed = convert(simulated)
    blocks = [m for m in deployed.modules() if isinstance(m, Int4SwinBlock)]
    assert len(blocks) == 4
    assert all(block.fuses_attention and block.fuses_mlp for block in blocks)
    x = nn.functional.interpolate(images(2, seed=6), size)
    agrees(simulated, deployed, x)
    # A second time, and another batch: the maps are kept.
    agrees(simulated, deployed, x)
    agrees(simulated, deployed, x[:1])


class Merging(nn.Module):
    """Patch merging on images."""

    def __init__(self, cls, **options):
        super().__init__()
        self.merging = cls(3, 8, **options)

    def forward(self, x):
        return self.merging(x.flatten(2).transpose(1, 2), x.shape[2:])


MERGINGS = [m.PatchMerging for m in (mmpretrain_embed, mmdet_transformer, mmcv_transformer)]


@pytest.mark.parametrize('cls', MERGINGS, ids=lambda cls: cls.__module__)
@pytest.mark.parametrize(
    ('options', 'fused'),
    [({}, True), (dict(kernel_size=3), True), (dict(padding=0), True), (dict(stride=1), False)],
)
def test_patch_merging(cls, options, fused):
    torch.manual_seed(0)
    simulated = finish(Merging(cls, **options))
    deployed = convert(simulated)
    assert isinstance(deployed.merging, Int4PatchMerging) == fused
    with torch.no_grad():
        for size in ((6, 8), (7, 5), (3, 3)):
            x = nn.functional.interpolate(images(2, seed=6), size)
            (expected, expected_size), (out, out_size) = simulated(x), deployed(x)
            assert tuple(out_size) == tuple(expected_size)
            assert torch.equal(out, expected)


def test_map_smaller_than_a_window(models):
    x = nn.functional.interpolate(images(2, seed=6), (24, 20))
    padded = models('swin', pad_small_map=True)
    agrees(padded, convert(padded), x)
    with pytest.raises(ValueError, match=r'3 x 3 tokens.*smaller than a window'):
        convert(models('swin'))(x)


def test_kept_maps_are_bounded(models):
    deployed = convert(models('swin'))
    block = deployed.backbone.stages[0].blocks[1]
    for width in range(32, 32 + 4 * 20, 4):
        block._maps((1, 8, width // 4, (4, 4), (2, 2), torch.device('cpu')))
    assert len(block.window_maps) <= 16


def test_a_policy_may_leave_half_a_block(models):
    policy = dict(exclude=[r'layers\.0\.ffn', r'layers\.1\.attn\.proj'])
    simulated = models('vit', policy=policy)
    deployed = convert(simulated)
    first, second = deployed.backbone.layers
    assert (first.fuses_attention, first.fuses_mlp) == (True, False)
    assert (second.fuses_attention, second.fuses_mlp) == (False, True)
    agrees(simulated, deployed, images(3, seed=5))


def test_other_activations_are_not_fused(models):
    cfgs = dict(act_cfg=dict(type='ReLU'))
    simulated = models('vit', layer_cfgs=cfgs)
    deployed = convert(simulated)
    assert not any(block.fuses_mlp for block in deployed.backbone.layers)
    agrees(simulated, deployed, images(3, seed=5))


def test_hooks_inside_a_block_still_run(models):
    """A layer that someone watches is called as a module."""
    simulated = models('vit')
    seen = []
    simulated.backbone.layers[0].ln2.register_forward_hook(lambda *_: seen.append(1))
    deployed = convert(simulated)
    with torch.no_grad():
        deployed(images(2))
    assert len(seen) == 1
    first, second = deployed.backbone.layers
    assert not first.fuses_mlp
    assert second.fuses_mlp


@pytest.mark.parametrize('kind', ['vit', 'swin', 'resnet'])
@pytest.mark.parametrize('compensation', ['QwT', 'QwTv2'])
def test_compensation_stays(models, kind, compensation):
    simulated = models(kind, compensation=dict(type=compensation))
    assert fill_compensations(simulated) > 0
    deployed = convert(simulated)
    x = images(3, seed=5)
    agrees(simulated, deployed, x)
    # It counts: without it the outputs are others.
    with torch.no_grad():
        expected = deployed(x)
        for module in deployed.modules():
            if type(module).__name__ == compensation:
                module.enabled = False
        assert not torch.allclose(deployed(x), expected, rtol=1e-3, atol=1e-4)


def test_fusing_changes_no_key_and_no_layer(models):
    deployed = convert(models('swin'))
    keys = list(deployed.state_dict())
    assert fuse_blocks(deployed) == []
    assert list(deployed.state_dict()) == keys
    assert sum(isinstance(m, Int4Linear) for m in deployed.modules()) == 18


def test_strided_input(models):
    deployed = convert(models('vit'))
    block = deployed.backbone.layers[0]
    x = torch.randn(2, 32, 17).transpose(1, 2)
    with torch.no_grad():
        torch.testing.assert_close(block(x), block(x.contiguous()))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('kind', ['vit', 'swin'])
def test_models_in_half_precision_run(models, kind, dtype):
    deployed = convert(models(kind))
    x = images(2, seed=6)
    with torch.no_grad():
        expected = deployed(x)
        out = deployed.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    # Where most codes are the same the scores point the same way.
    assert torch.cosine_similarity(out.float(), expected).min() > 0.9
