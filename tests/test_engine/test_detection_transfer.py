"""Detectors on the backbone of another run, trained on or frozen: killed and resumed."""

import copy

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from tiny_detection import detection_config, write_coco
from tiny_runs import (
    KillAt,
    Killed,
    KillHook,
    assert_same_weights,
    load,
    read_summary,
    run,
    weights,
)

from gplq_mm.layers import calibrate, freeze_activations, quant_layers
from gplq_mm.models import QuantBackbone
from gplq_mm.ptq import RoundToNearest, quantize_weights


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('coco')
    write_coco(folder, 'train', 6, seed=0)
    write_coco(folder, 'val', 2, seed=1)
    return folder


@pytest.fixture(scope='module')
def backbone(data, tmp_path_factory):
    """A W4A4 backbone, its checkpoint as a GPLQ run writes it, and the config of its network."""
    folder = tmp_path_factory.mktemp('backbone')
    cfg = detection_config(folder, data, folder / 'none.pth')
    network = dict(cfg.model.architecture.backbone, type='mmdet.SwinTransformer')
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(dict(type='gplq_mm.QuantBackbone', backbone=network))
    model.eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        calibrate(model, lambda *_: model(images))
        freeze_activations(model)
        quantize_weights(model, [images], model, RoundToNearest())
    content = {
        'state_dict': {f'architecture.{key}': value for key, value in model.state_dict().items()},
        'gplq': {'policy': model.policy.to_dict()},
    }
    torch.save(content, folder / 'w4a4.pth')
    return model, folder / 'w4a4.pth', network


def test_a_backbone_that_is_trained_on(data, backbone, tmp_path):
    def config(name):
        cfg = detection_config(tmp_path / name, data, None)
        cfg.model.update(pretrained=None, backbone_from=str(backbone[1]))
        cfg.model.policy = cfg.gplq_policy_backbone
        cfg.train_cfg.update(max_iters=4, baseline=None)
        cfg.default_hooks.checkpoint.interval = 2
        return cfg

    run(config('whole'))
    summary = read_summary(tmp_path / 'whole')
    # The heads are new: nothing was measured before they were trained.
    assert set(summary['bbox_mAP']) == {'w32a4', 'latent_fp32', 'w4a4'}
    start = load(tmp_path / 'whole' / 'calibrated.pth')['state_dict']
    for name, layer in quant_layers(backbone[0]).items():
        assert torch.equal(start[f'architecture.{name}.weight'], layer.weight)
    with pytest.raises(Killed):
        run(config('killed'), KillHook(3))
    with pytest.raises(Killed):
        run(config('killed'), KillAt('before_save_checkpoint', 2), resume=True)
    run(config('killed'), resume=True)
    assert_same_weights(weights(tmp_path / 'killed'), weights(tmp_path / 'whole'))
    assert read_summary(tmp_path / 'killed')['bbox_mAP'] == summary['bbox_mAP']


def test_a_frozen_backbone(data, backbone, tmp_path):
    def config():
        cfg = detection_config(tmp_path, data, None)
        model = copy.deepcopy(cfg.model.architecture)
        model.backbone = dict(
            type='gplq_mm.QuantBackbone',
            backbone=backbone[2],
            checkpoint=str(backbone[1]),
            frozen=True,
        )
        cfg.model = model
        cfg.train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=2)
        cfg.optim_wrapper = dict(
            type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-3, momentum=0.9)
        )
        cfg.custom_hooks = []
        cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=1)
        return cfg

    # mmengine's own loop draws other boxes after a resume, so only what is frozen is equal.
    with pytest.raises(Killed):
        run(config(), KillHook(8))
    first = load(tmp_path / 'epoch_1.pth')
    assert isinstance(run(config(), resume=True).model.backbone, QuantBackbone)
    last = load(tmp_path / 'epoch_2.pth')
    assert (first['meta']['iter'], last['meta']['iter']) == (6, 12)
    for key, value in last['state_dict'].items():
        if key.startswith('backbone.'):
            wanted = backbone[0].state_dict()[key.removeprefix('backbone.')]
            assert torch.equal(value, wanted), key
    head = 'roi_head.bbox_head.fc_cls.weight'
    assert not torch.equal(last['state_dict'][head], first['state_dict'][head])
    assert all(value.isfinite().all() for value in last['state_dict'].values())
