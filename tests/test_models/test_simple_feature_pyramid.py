"""The pyramid of ViTDet on mmpretrain's VisionTransformer, and its quantization."""

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from tiny_runs import ROOT

from gplq_mm.layers import QuantConvTranspose2d, calibrate, quant_layers
from gplq_mm.models import SimpleFeaturePyramid
from gplq_mm.ptq import build_weight_ptq, quantize_weights

BASE = ROOT / 'configs/_base_/models/mask-rcnn_vit-tiny-p16_sfp.py'
POLICY = ROOT / 'configs/_base_/gplq_detection.py'


def detector(**settings) -> torch.nn.Module:
    cfg = Config.fromfile(BASE)
    cfg.model.backbone.arch = dict(
        embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64
    )
    cfg.model.neck.update(in_channels=32, out_channels=16)
    cfg.model.rpn_head.update(in_channels=16, feat_channels=16)
    cfg.model.test_cfg.rpn.update(nms_pre=20, max_per_img=10)
    roi = cfg.model.roi_head
    roi.bbox_roi_extractor.out_channels = roi.mask_roi_extractor.out_channels = 16
    roi.bbox_head.update(in_channels=16, fc_out_channels=32, num_classes=2)
    roi.mask_head.update(in_channels=16, conv_out_channels=16, num_convs=1, num_classes=2)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        if not settings:
            return MODELS.build(cfg.model).eval()
        return MODELS.build(
            dict(type='gplq_mm.GPLQ', architecture=cfg.model, teacher=False, **settings)
        ).eval()


@pytest.mark.parametrize('size', [(16, 16), (70, 101), (1, 1), (224, 224)])
def test_levels_of_images_of_any_size(size):
    model = detector()
    levels = model.neck(model.backbone(torch.randn(2, 3, *size)))
    rows, columns = (-(-side // 16) for side in size)
    shapes = [(4 * rows, 4 * columns), (2 * rows, 2 * columns), (rows, columns)]
    for _ in range(2):
        shapes.append(tuple(-(-side // 2) for side in shapes[-1]))
    assert [tuple(level.shape) for level in levels] == [(2, 16, *shape) for shape in shapes]
    assert all(bool(level.isfinite().all()) for level in levels)


def test_every_level_depends_on_the_image_and_trains():
    neck = SimpleFeaturePyramid(8, 4)
    x = torch.randn(1, 8, 3, 5, requires_grad=True)
    for level in neck((x,)):
        (gradient,) = torch.autograd.grad(level.square().mean(), x, retain_graph=True)
        assert gradient.abs().max() > 0


def test_both_stages_quantize_it():
    model = detector(policy=dict(Config.fromfile(POLICY).gplq_policy), compensation={'type': 'QwT'})
    layers = quant_layers(model.architecture)
    transposed = [name for name, v in layers.items() if isinstance(v, QuantConvTranspose2d)]
    assert transposed[:3] == ['neck.scales.0.0', 'neck.scales.0.3', 'neck.scales.1']
    assert sum(name.startswith('neck.') for name in layers) == 3 + 4 + 4
    assert not model.quant_report.excluded
    assert len(model.quant_report.blocks) == 2
    sample = DetDataSample(
        metainfo=dict(img_shape=(48, 80), ori_shape=(48, 80), scale_factor=(1.0, 1.0))
    )
    data = [dict(inputs=torch.randn(1, 3, 48, 80), data_samples=[sample]) for _ in range(2)]
    with torch.no_grad():
        calibrate(model.architecture, lambda *_: [model(**item) for item in data])
        model.freeze_activations()
        method = build_weight_ptq(dict(type='RoundToNearest'))
        forward = lambda item: model.architecture(**item, mode='tensor')  # noqa: E731
        quantize_weights(model.architecture, data, forward, method)
        assert all(layer.weight_quantizer.is_quantized for layer in layers.values())
        assert len(model(**data[0], mode='predict')) == 1


def test_class_token_instead_of_a_map_is_refused():
    with pytest.raises(ValueError, match="out_type='featmap'"):
        SimpleFeaturePyramid(8, 4)((torch.randn(2, 8),))


@pytest.mark.parametrize('settings', [dict(in_channels=6), dict(in_channels=8, num_outs=3)])
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match='must be'):
        SimpleFeaturePyramid(**settings)
