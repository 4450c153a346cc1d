"""Every config of a downstream task builds, trains what it should, and runs; no download."""

import pytest
import torch
from config_files import CONFIGS, load
from mmdet.structures import DetDataSample
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData
from mmpretrain.registry import DATASETS
from mmpretrain.structures import DataSample

from gplq_mm.engine import GPLQTrainLoop
from gplq_mm.engine.hooks import CalibrationHook
from gplq_mm.layers import calibrate, quant_layers
from gplq_mm.models import GPLQ, QuantBackbone

FOLDER = CONFIGS / 'transfer'
PROBES = sorted(FOLDER.glob('linear-probe_*.py'))
DETECTORS = sorted(FOLDER.glob('*bccd.py'))


def test_finds_the_configs():
    assert len(PROBES) == 12
    assert len(DETECTORS) == 4
    assert {path.name for path in FOLDER.glob('*.py')} == {p.name for p in (*PROBES, *DETECTORS)}


@pytest.mark.parametrize('path', PROBES, ids=lambda p: p.stem)
class TestProbe:
    def test_only_the_head_is_trained(self, path):
        cfg = load(path)
        model = MODELS.build(cfg.model)
        assert isinstance(model.backbone, QuantBackbone)
        assert bool(quant_layers(model)) == ('w4a4' in path.name)
        trained = {name for name, value in model.named_parameters() if value.requires_grad}
        assert trained == {'head.fc.weight', 'head.fc.bias'}
        if not path.stem.endswith(('aircraft', 'imagefolder')):
            # The others differ in their data.
            return
        images = torch.randn(2, 3, 224, 224)
        if 'w4a4' in path.name:
            with torch.no_grad():
                calibrate(model, lambda *_: model(images))
        model.train()
        assert not model.backbone.training
        samples = [DataSample().set_gt_label(i) for i in range(2)]
        model(images, samples, mode='loss')['loss'].backward()
        assert model.head.fc.weight.grad is not None
        groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
        assert all(group['lr'] == 1e-3 for group in groups)

    def test_protocol_of_the_paper(self, path):
        cfg = load(path)
        assert cfg.train_cfg.max_epochs == 100
        assert cfg.train_dataloader.batch_size == 64
        cls = DATASETS.get(cfg.train_dataloader.dataset.type)
        classes = (cls.METAINFO or {}).get('classes')
        assert cfg.model.head.num_classes == cfg.model.data_preprocessor.num_classes
        if classes is not None:
            assert cfg.model.head.num_classes == len(classes)
        assert cfg.val_dataloader.dataset.type == cfg.train_dataloader.dataset.type

    def test_training_images_are_augmented(self, path):
        cfg = load(path)
        train, val = (cfg[f'{name}_dataloader'].dataset.pipeline for name in ('train', 'val'))
        assert train != val
        assert any(step.type.startswith('Random') for step in train)


@pytest.mark.parametrize('path', DETECTORS, ids=lambda p: p.stem)
def test_detector_trains(path):
    cfg = load(path)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
        model.train()
        inner = model.architecture if isinstance(model, GPLQ) else model
        images = torch.randn(1, 3, 96, 64)
        trainable = any(p.requires_grad for p in inner.backbone.parameters())
        assert trainable == ('frozen' not in path.name)
        names = quant_layers(inner)
        assert bool(names) == ('w4a4' in path.name)
        assert all(name.startswith('backbone.') for name in names)
        shape = (96, 64)
        sample = DetDataSample(
            metainfo=dict(
                img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape
            ),
            gt_instances=InstanceData(
                bboxes=torch.tensor([[8.0, 8.0, 40.0, 40.0]]), labels=torch.tensor([1])
            ),
        )
        if names:
            with torch.no_grad():
                calibrate(inner, lambda *_: inner.extract_feat(images))
        losses = inner(images, [sample], mode='loss')
        assert {'loss_cls', 'loss_bbox', 'loss_rpn_cls', 'loss_rpn_bbox'} <= set(losses)
        losses['loss_cls'].backward()
        vit = inner.backbone
        vit = vit.backbone if isinstance(vit, QuantBackbone) else vit
        assert (vit.patch_embed.projection.weight.grad is not None) == trainable
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        assert {group['lr'] for group in wrapper.optimizer.param_groups} >= {4e-4}
    assert cfg.max_epochs == cfg.train_cfg.max_epochs == 12
    if 'gplq' in path.name:
        assert cfg.train_cfg.type.endswith(GPLQTrainLoop.__name__)
        assert any(hook.type.endswith(CalibrationHook.__name__) for hook in cfg.custom_hooks)
