"""The front door on a detector: batches of mmdet's data loaders, images of several sizes."""

import pytest
import torch
from builders import FAST
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from tiny_detection import detection_config, write_coco

import gplq_mm
from gplq_mm.deploy.packed_file import read_file

PREDICTORS = dict(pattern=r'_head\.', exclude=True)


@pytest.fixture(scope='module')
def scene(tmp_path_factory):
    """Config, float model, and its training batches."""
    import gplq_mm.datasets  # noqa: F401  (registers what the config names)

    folder = tmp_path_factory.mktemp('coco')
    for split, count in (('train', 6), ('val', 4)):
        write_coco(folder, split, count, seed=len(split))
    cfg = detection_config(folder / 'work', folder, folder / 'none.pth')
    with DefaultScope.overwrite_default_scope('mmdet'):
        torch.manual_seed(0)
        model = MODELS.build(cfg.model.architecture)
        model.init_weights()
        loader = dict(cfg.train_dataloader, batch_size=2, sampler=dict(type='DefaultSampler'))
        loader['dataset'] = loader['dataset']['dataset']
        batches = list(Runner.build_dataloader(loader, seed=0))
    return cfg, model.eval(), batches


def test_both_stages_and_a_file(scene, tmp_path):
    cfg, model, batches = scene
    with DefaultScope.overwrite_default_scope('mmdet'):
        gplq_mm.quantize_(
            model,
            batches,
            policy={**FAST, 'rules': [PREDICTORS]},
            train=dict(loader=batches, mimic=dict(explained=0.9), task_weight=0.5),
        )
        losses = model.gplq_report.losses
        assert len(losses) == len(batches)
        assert {'loss_rpn_cls', 'loss_mask', 'loss_pca_mimic'} <= set(losses[0])
        packed = gplq_mm.convert(model)
        simulated, found = (gplq_mm.coverage(m, batches[0]) for m in (model, packed))
    assert simulated.in_float
    named = [name for name in simulated.in_float if 'compensation' not in name]
    assert [name for name in named if '_head' not in name] == []
    assert set(found.widths) == {'w4a4', 'w8a8', 'a4', 'float'}
    # As the inference APIs of mmdet leave it on a model.
    packed.cfg = dict(model=cfg.model.architecture, default_scope='mmdet')
    packed.dataset_meta = dict(classes=('a', 'b'))
    gplq_mm.save(packed, tmp_path / 'detector.safetensors')
    loaded = gplq_mm.load(tmp_path / 'detector.safetensors')
    assert loaded.deploy_header['policy']['rules'][-1]['pattern'] == PREDICTORS['pattern']
    # It is written as it was read.
    gplq_mm.save(loaded, tmp_path / 'again.safetensors')
    headers = [read_file(tmp_path / f'{name}.safetensors')[0] for name in ('detector', 'again')]
    assert headers[0] == headers[1]
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for ours, theirs in zip(
            loaded.extract_feat(image), packed.extract_feat(image), strict=True
        ):
            assert torch.equal(ours, theirs)
