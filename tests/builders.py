"""Tiny models for tests: seconds on one core, all parameters random."""

import copy

import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from gplq_mm.layers import calibrate, freeze_activations, quantize_model
from gplq_mm.quant import QuantPolicy

NUM_CLASSES = 5
VIT_BACKBONE = dict(
    type='mmpretrain.VisionTransformer',
    arch=dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64),
    img_size=32,
    patch_size=8,
)
SWIN_BACKBONE = dict(
    type='mmpretrain.SwinTransformer',
    arch=dict(embed_dims=16, depths=[2, 2], num_heads=[2, 2]),
    img_size=32,
    patch_size=4,
    window_size=4,
    out_indices=(1,),
    drop_path_rate=0.0,
)
RESNET_BACKBONE = dict(
    type='mmpretrain.ResNet',
    depth=18,
    stem_channels=8,
    base_channels=8,
    num_stages=2,
    strides=(1, 2),
    dilations=(1, 1),
    out_indices=(1,),
)

# Policy that calibrates in a single pass.
FAST = {key: dict(observer='minmax') for key in ('activation', 'q', 'k', 'v', 'probs', 'weight')}


def vit_cfg(num_classes: int = NUM_CLASSES, **backbone) -> dict:
    """Config of an ImageClassifier: 2 layers of width 32, 32-pixel images."""
    return dict(
        type='mmpretrain.ImageClassifier',
        backbone={**copy.deepcopy(VIT_BACKBONE), **backbone},
        head=dict(
            type='mmpretrain.VisionTransformerClsHead', num_classes=num_classes, in_channels=32
        ),
    )


def swin_cfg() -> dict:
    """Two stages of two blocks; the second stage is a single window, the first shifts."""
    return dict(
        type='mmpretrain.ImageClassifier',
        backbone=copy.deepcopy(SWIN_BACKBONE),
        neck=dict(type='mmpretrain.GlobalAveragePooling'),
        head=dict(type='mmpretrain.LinearClsHead', num_classes=NUM_CLASSES, in_channels=32),
    )


def resnet_cfg() -> dict:
    """Two stages of two basic blocks."""
    return dict(
        type='mmpretrain.ImageClassifier',
        backbone=copy.deepcopy(RESNET_BACKBONE),
        neck=dict(type='mmpretrain.GlobalAveragePooling'),
        head=dict(type='mmpretrain.LinearClsHead', num_classes=NUM_CLASSES, in_channels=16),
    )


CONFIGS = {'vit': vit_cfg, 'swin': swin_cfg, 'resnet': resnet_cfg}


def randomize(model: nn.Module, std: float = 0.2) -> nn.Module:
    """Random values for everything that starts as a constant and would hide mistakes."""
    for parameter in model.parameters():
        if parameter.dim() < 2 or bool((parameter == parameter.flatten()[0]).all()):
            nn.init.normal_(parameter, std=std)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=std)
            module.running_var.uniform_(0.5, 1.5)
    return model


def build_float(kind: str) -> nn.Module:
    """Float ImageClassifier ``'vit'``, ``'swin'`` or ``'resnet'`` in eval mode."""
    return build_classifier(CONFIGS[kind]())


def build_classifier(cfg: dict) -> nn.Module:
    """Float ImageClassifier in eval mode, whatever scope a run has left behind."""
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return randomize(MODELS.build(cfg)).eval()


def images(batch: int = 4, seed: int = 0) -> torch.Tensor:
    """Smooth random images ``(batch, 3, 32, 32)``."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 3, 8, 8, generator=generator)
    return nn.functional.interpolate(coarse, size=32, mode='bilinear')


@torch.no_grad()
def calibrated(model: nn.Module, batch: torch.Tensor, freeze: bool = True) -> nn.Module:
    """Calibrates a quantized model on a batch."""
    model.eval()
    calibrate(model, lambda _index, _passes: model(batch))
    if freeze:
        freeze_activations(model)
    return model


def build_quantized(
    kind: str, policy: dict | None = None, compensation: dict | None = None, freeze: bool = True
) -> nn.Module:
    """Quantized, calibrated ImageClassifier."""
    model = build_float(kind)
    quantize_model(model, QuantPolicy(**(policy or {})), compensation)
    return calibrated(model, images(8, seed=1), freeze)
