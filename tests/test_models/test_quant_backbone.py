"""A quantized backbone inside other models."""

import pytest
import torch
from builders import SWIN_BACKBONE, VIT_BACKBONE, images, randomize, vit_cfg
from mmengine.registry import MODELS

from gplq_mm.checkpoint import CheckpointError
from gplq_mm.layers import calibrate, freeze_activations, quant_layers
from gplq_mm.models import GPLQ, QuantBackbone
from gplq_mm.ptq import RoundToNearest, quantize_weights
from gplq_mm.quant import NotCalibratedError


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A finished GPLQ model, its checkpoint and that of the float model."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp('gplq')
    torch.save({'state_dict': randomize(MODELS.build(vit_cfg())).state_dict()}, folder / 'fp.pth')
    model = GPLQ(vit_cfg(), str(folder / 'fp.pth'), compensation=dict(type='QwT'))
    model.init_weights()
    model.eval()
    with torch.no_grad():
        calibrate(model.architecture, lambda _i, _n: model(images(8, 1)))
    model.freeze_activations()
    quantize_weights(
        model.architecture, [images(), images(seed=2)], model.architecture, RoundToNearest()
    )
    content = {'state_dict': model.state_dict(), 'gplq': {'policy': model.policy.to_dict()}}
    torch.save(content, folder / 'w4a4.pth')
    return model, folder / 'w4a4.pth', folder / 'fp.pth'


def backbone(checkpoint, **options):
    options = {'compensation': dict(type='QwT'), **options}
    model = QuantBackbone(VIT_BACKBONE, str(checkpoint), **options)
    model.init_weights()
    return model


def test_computes_what_the_finished_model_computes(finished):
    model, checkpoint, _ = finished
    twin = backbone(checkpoint).eval()
    assert twin.is_calibrated
    assert twin.weights_are_quantized
    with torch.no_grad():
        assert torch.equal(twin(images())[0], model.architecture.backbone(images())[0])


def test_frozen_stays_in_eval_mode_without_gradients(finished):
    twin = backbone(finished[1], frozen=True).train()
    assert not any(module.training for module in twin.modules())
    assert not any(p.requires_grad for p in twin.parameters())
    assert backbone(finished[1]).train().training


def test_frozen_needs_frozen_quantizers(finished):
    with pytest.raises(NotCalibratedError):
        backbone(finished[2], frozen=True)


def test_float_weights_of_the_model_or_of_the_backbone(finished, tmp_path):
    model, _, float_checkpoint = finished
    state = torch.load(float_checkpoint, weights_only=True)['state_dict']
    bare = {k.removeprefix('backbone.'): v for k, v in state.items() if k.startswith('backbone.')}
    torch.save(bare, tmp_path / 'bare.pth')
    for path in (float_checkpoint, tmp_path / 'bare.pth'):
        twin = backbone(path)
        assert not twin.is_calibrated
        for name, layer in quant_layers(twin).items():
            assert torch.equal(layer.weight, model.architecture.get_submodule(name).weight)


def test_another_policy_or_architecture_is_refused(finished):
    with pytest.raises(CheckpointError, match='another policy'):
        backbone(finished[1], policy=dict(weight=dict(bits=3)))
    twin = QuantBackbone(SWIN_BACKBONE, str(finished[1]))
    with pytest.raises(CheckpointError, match='another architecture'):
        twin.init_weights()


def test_as_the_backbone_of_a_classifier(finished):
    cfg = vit_cfg(num_classes=3)
    cfg['backbone'] = dict(
        type='gplq_mm.QuantBackbone',
        backbone=cfg['backbone'],
        checkpoint=str(finished[1]),
        compensation=dict(type='QwT'),
        frozen=True,
    )
    classifier = MODELS.build(cfg)
    classifier.init_weights()
    logits = classifier.train()(images())
    assert logits.shape == (4, 3)
    logits.sum().backward()
    assert {n for n, p in classifier.named_parameters() if p.grad is not None} == {
        'head.layers.head.weight',
        'head.layers.head.bias',
    }


def test_under_a_feature_pyramid_with_the_swin_of_mmdet():
    import mmdet.models  # noqa: F401

    model = QuantBackbone(
        dict(
            type='mmdet.SwinTransformer',
            embed_dims=16,
            depths=(2, 2, 1, 1),
            num_heads=(2, 2, 4, 4),
            window_size=4,
            drop_path_rate=0.0,
        )
    )
    model.init_weights()
    model.eval()
    neck = MODELS.build(
        dict(type='mmdet.FPN', in_channels=[16, 32, 64, 128], out_channels=8, num_outs=5)
    )
    x = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        calibrate(model, lambda _i, _n: model(x))
        freeze_activations(model)
        before = neck(model(x))
        quantize_weights(model, [x, -x], model, RoundToNearest())
        after = neck(model(x))
    assert [tuple(level.shape[2:]) for level in after] == [(16, 12), (8, 6), (4, 3), (2, 2), (1, 1)]
    assert all(torch.isfinite(level).all() for level in after)
    assert not torch.equal(before[0], after[0])
