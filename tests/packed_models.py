"""Tiny models after Stage 2, and the single layers and configs that packing tests need."""

import copy
from pathlib import Path

import mmdet
import torch
from builders import CONFIGS, build_classifier, build_float, calibrated, images, randomize
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from gplq_mm.deploy.packed_tensors import channels_of
from gplq_mm.layers import Compensation, QuantConv2d, QuantLinear, QwT, quantize_model
from gplq_mm.ptq import RoundToNearest, quantize_weights
from gplq_mm.quant import ActSpec, QuantPolicy, SiteSpec, WeightSpec

ROOT = Path(__file__).resolve().parent.parent

MMDET_SWIN = dict(
    type='mmdet.SwinTransformer',
    embed_dims=16,
    depths=(2, 2),
    num_heads=(2, 2),
    strides=(4, 2),
    window_size=4,
    out_indices=(0, 1),
    drop_path_rate=0.0,
)


_LEVELS = dict(format='levels', observer='mse')
LEVELS_POLICY = dict(
    activation=_LEVELS,
    q={**_LEVELS, 'granularity': 'head'},
    k={**_LEVELS, 'granularity': 'tensor'},
    v={**_LEVELS, 'granularity': 'tensor'},
    probs={**_LEVELS, 'granularity': 'head'},
)


def run_config(kind: str) -> dict:
    """What :func:`gplq_mm.deploy.save` needs of the config of a run."""
    return dict(
        model=copy.deepcopy(CONFIGS[kind]()),
        default_scope='mmpretrain',
        data_preprocessor=dict(num_classes=5, mean=[0.0] * 3, std=[1.0] * 3),
        test_dataloader=dict(
            dataset=dict(
                type='ImageNet',
                pipeline=[
                    dict(type='LoadImageFromFile'),
                    dict(type='Resize', scale=(32, 32)),
                    dict(type='PackInputs'),
                ],
            )
        ),
    )


def finish(
    model: nn.Module,
    policy: dict | None = None,
    compensation: dict | None = None,
    batches: tuple[torch.Tensor, ...] | None = None,
) -> nn.Module:
    """Quantizes a float model completely, Stage 2 included; observers are the fast ones."""
    batches = batches or (images(seed=1), images(seed=2))
    policy = dict(policy or {})
    for part in ('activation', 'weight'):
        policy[part] = {'observer': 'minmax', **policy.get(part, {})}
    quantize_model(model, QuantPolicy(**policy), compensation)
    calibrated(model, torch.cat(batches))
    with torch.no_grad():
        quantize_weights(model, list(batches), model, RoundToNearest())
    return model


def fill_compensations(model: nn.Module) -> int:
    """Random maps for the compensations that explained nothing on this little data."""
    modules = {
        name: module for name, module in model.named_modules() if isinstance(module, Compensation)
    }
    for name, module in modules.items():
        block = model.get_submodule(name.rpartition('.')[0])
        # A block that changes the resolution gets none.
        if not module.is_fitted and getattr(block, 'downsample', None) is None:
            inputs, outputs = channels_of(block)
            shape = (outputs, inputs) if isinstance(module, QwT) else (outputs,)
            module.weight = (0.02 * torch.randn(shape)).half()
            module.bias = (0.02 * torch.randn(outputs)).half()
    return len(modules)


def quantized_classifier(
    kind: str, policy: dict | None = None, compensation: dict | None = None, **backbone
) -> nn.Module:
    """``'vit'``, ``'swin'`` or ``'resnet'`` after Stage 2, with options of the backbone."""
    if not backbone:
        return finish(build_float(kind), policy, compensation)
    cfg = CONFIGS[kind]()
    cfg['backbone'].update(backbone)
    return finish(build_classifier(cfg), policy, compensation)


def quantized_layer(
    layer: nn.Linear | nn.Conv2d, x: torch.Tensor, act: ActSpec, weight: WeightSpec
) -> QuantLinear | QuantConv2d:
    """A single layer, calibrated on ``x``, frozen and rounded."""
    cls = QuantLinear if isinstance(layer, nn.Linear) else QuantConv2d
    quantized = cls.from_float(layer, SiteSpec(act, weight), 'site')
    return round_layer(calibrated(quantized, x))


@torch.no_grad()
def round_layer(layer: QuantLinear | QuantConv2d) -> QuantLinear | QuantConv2d:
    """Rounds the weight of a calibrated layer."""
    matrix, order = layer.foldable()
    value = RoundToNearest()(matrix, layer.weight_quantizer.spec, order, None)
    layer.set_quantized_weight(value, None)
    return layer


def detector_config() -> Config:
    """Mask R-CNN on a tiny quantized Swin of mmdet; everything behind it stays float."""
    cfg = Config.fromfile(
        Path(mmdet.__file__).parent / '.mim/configs/swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'
    )
    swin = {**MMDET_SWIN, 'type': 'SwinTransformer'}
    cfg.model.backbone = dict(
        type='gplq_mm.QuantBackbone', backbone={**swin, 'type': 'mmdet.SwinTransformer'},
        policy=dict(activation=dict(observer='minmax'), weight=dict(observer='minmax')),
    )  # fmt: skip
    cfg.model.neck.update(in_channels=[16, 32], out_channels=16, num_outs=3)
    cfg.model.rpn_head.update(in_channels=16, feat_channels=16)
    cfg.model.rpn_head.anchor_generator.strides = [4, 8, 16]
    head = cfg.model.roi_head
    for extractor in (head.bbox_roi_extractor, head.mask_roi_extractor):
        extractor.update(out_channels=16, featmap_strides=[4, 8])
    head.bbox_head.update(in_channels=16, fc_out_channels=16, num_classes=3)
    head.mask_head.update(in_channels=16, conv_out_channels=16, num_convs=1, num_classes=3)
    cfg.test_dataloader.dataset.pipeline[1].scale = (64, 48)
    return cfg


def quantized_detector(cfg: Config) -> nn.Module:
    """The detector of :func:`detector_config`, its backbone after Stage 2."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model.copy())
    backbone = randomize(model.backbone)
    calibrated(backbone, images(4))
    with torch.no_grad():
        quantize_weights(backbone, [images(4)], backbone, RoundToNearest())
    return model.eval()


def assert_close_but_for_flips(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to float rounding that moves a few codes by one step.

    Sums in another order differ in the last bit, and where a value lies between two codes that
    bit decides. A layer that computes something else is off by about the size of its output.
    """
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= 0.1 * float(expected.norm())
