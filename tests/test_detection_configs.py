"""Every GPLQ config of a detector builds, quantizes what it should, and runs; no download."""

from pathlib import Path

import mmdet
import pytest
import torch
import yaml
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import HOOKS, LOOPS, MODELS, DefaultScope

from gplq_mm.engine import GPLQTrainLoop
from gplq_mm.layers import calibrate, quant_layers
from gplq_mm.ptq import find_units

FOLDER = Path(__file__).resolve().parent.parent / 'configs' / 'detection'
FILES = sorted(FOLDER.glob('gplq_*_coco.py'))
POLICIES = ('_backbone', '_backbone_neck', '_strict')


def build(cfg: Config, policy: str = '') -> torch.nn.Module:
    settings = cfg.model.copy()
    settings['policy'] = cfg[f'gplq_policy{policy}'].copy()
    for key in ('activation', 'q', 'k', 'v', 'probs'):
        settings['policy'][key] = dict(observer='minmax')
    settings.update(teacher=False, pretrained=None)
    if settings['architecture']['test_cfg'].get('rpn'):
        # A thousand boxes of noise would take most of the time.
        settings['architecture']['test_cfg']['rpn']['max_per_img'] = 20
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(settings).eval()


def test_finds_the_configs():
    assert len(FILES) >= 5


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)
class TestConfig:
    def test_builds_and_runs(self, path):
        model = build(Config.fromfile(path))
        layers = quant_layers(model.architecture)
        assert not model.quant_report.excluded
        assert model.quant_report.blocks
        eight = {name for name, v in layers.items() if v.weight_quantizer.spec.bits == 8}
        first = next(iter(layers))
        predictors = ('_cls', '_reg', 'conv_logits')
        assert eight == {first, *(name for name in layers if name.endswith(predictors))}
        sample = DetDataSample(metainfo=dict(img_shape=(64, 96), scale_factor=(1.0, 1.0)))
        data = dict(inputs=torch.randn(1, 3, 64, 96), data_samples=[sample])
        with torch.no_grad():
            calibrate(model.architecture, lambda *_: model(**data))
            # Every layer is reached, so Stage 2 can cut the model into units.
            assert find_units(model.architecture, lambda: model(**data))

    def test_schedule(self, path):
        cfg = Config.fromfile(path)
        assert cfg.train_dataloader.batch_size == 1
        assert cfg.train_dataloader.batch_sampler is None
        assert cfg.train_cfg.max_epochs == 1
        assert cfg.model.get('mimic') is None
        assert LOOPS.get(cfg.train_cfg.type) is GPLQTrainLoop
        assert all(HOOKS.build(hook) for hook in cfg.custom_hooks)

    def test_weights_are_published_for_the_base(self, path):
        weights = Config.fromfile(path).model.pretrained
        if weights is None:
            assert 'set model.pretrained' in path.read_text()
            return
        listed = set()
        for metafile in (Path(mmdet.__file__).parent / '.mim' / 'configs').glob('*/metafile.yml'):
            content = yaml.safe_load(metafile.read_text())
            for entry in content['Models'] if isinstance(content, dict) else content:
                listed.add(str(entry.get('Weights')).partition('/mmdetection/')[2])
        assert weights.partition('/mmdetection/')[2] in listed


@pytest.mark.parametrize('path', [FILES[0], FILES[-1]], ids=lambda p: p.stem)
@pytest.mark.parametrize('policy', POLICIES)
def test_policies_fit(path, policy):
    names = quant_layers(build(Config.fromfile(path), policy).architecture)
    parts = {name.split('.')[0] for name in names}
    if policy == '_backbone':
        assert parts == {'backbone'}
    elif policy == '_backbone_neck':
        assert parts == {'backbone', 'neck'}
    else:
        assert parts > {'backbone', 'neck'}
