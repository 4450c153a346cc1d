"""Every config under configs/ loads, and what it names can be built and run.

Models of mmdet have tests of their own, in test_detection_configs.py.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from types import SimpleNamespace

import config_files
import mmpretrain
import pytest
import torch
import yaml
from config_files import CONFIGS
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATA_SAMPLERS, DATASETS, HOOKS, LOOPS, MODELS, DefaultScope

from gplq_mm.datasets.resumable import ResumableSampler, SeededDataset
from gplq_mm.engine import DirectQATLoop, GPLQTrainLoop
from gplq_mm.engine.hooks import CalibrationHook, GPLQCheckpointHook, PCABasisHook
from gplq_mm.layers import calibrate, learned_parameters, quant_layers
from gplq_mm.models import GPLQ
from gplq_mm.ptq import build_weight_ptq, init_learned_weights
from gplq_mm.quant import ActQuantizer

load = cache(config_files.load)
FILES = sorted(
    path
    for path in CONFIGS.rglob('*.py')
    if not {'_base_', 'detection', 'quickstart-det', 'transfer'} & set(path.parts)
)
GPLQ_FILES = [path for path in FILES if not path.stem.endswith('fp32')]
# GPUs of 16 images -> learning rate, from the paper's appendix.
PAPER_RATES = {8: 5e-6, 4: 2.5e-6, 2: 1e-6, 1: 1e-6}


def named(path: Path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix(''))


@cache
def noise() -> torch.Tensor:
    return torch.randn(2**20, generator=torch.Generator().manual_seed(0))


def cheap_init(layer: torch.nn.Linear | torch.nn.Conv2d) -> None:
    """torch's own initialisation takes seconds in the large models."""
    weight = layer.weight.data
    count = weight.numel()
    values = noise().repeat(-(-count // len(noise())))[:count].view_as(weight)
    weight.copy_(values).mul_(weight[0].numel() ** -0.5)
    if layer.bias is not None:
        layer.bias.data.zero_()


# Files with the same model follow each other, so remembering one is enough.
@lru_cache(maxsize=1)
def _build(settings: str) -> torch.nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Linear, 'reset_parameters', cheap_init)
        patch.setattr(torch.nn.Conv2d, 'reset_parameters', cheap_init)
        return MODELS.build(ast.literal_eval(settings)).eval()


def build(cfg: Config) -> torch.nn.Module:
    """The model of a config, without weights or teacher, calibrated by the cheapest observer."""
    settings = cfg.model.to_dict()
    settings['data_preprocessor'] = cfg.data_preprocessor.to_dict()
    if settings['type'] == 'gplq_mm.GPLQ':
        settings['teacher'] = False
        settings['pretrained'] = None
        for key in ('activation', 'q', 'k', 'v', 'probs'):
            settings['policy'].setdefault(key, {})['observer'] = 'minmax'
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return _build(repr(settings))


@pytest.fixture(scope='module', params=GPLQ_FILES, ids=named)
def gplq(request) -> SimpleNamespace:
    """Config and model of a file, the same for all tests of that file."""
    cfg = load(request.param)
    return SimpleNamespace(path=request.param, cfg=cfg, model=build(cfg))


def test_finds_the_configs():
    names = [path.stem for path in FILES]
    assert len(names) == len(set(names)) >= 20


def test_every_site_is_quantized(gplq):
    report = gplq.model.quant_report
    assert report.linear
    assert report.conv
    assert report.blocks
    assert not report.excluded
    assert bool(report.attention) == ('resnet' not in gplq.path.stem)
    for layer in gplq.model.architecture.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            assert layer.weight_quantizer is not None


def test_bits_are_those_of_the_name(gplq):
    match = re.search(r'_w(\d)a(\d)_', gplq.path.stem)
    weight_bits, act_bits = map(int, match.groups()) if match else (4, 4)
    layers = quant_layers(gplq.model.architecture)
    ends = {next(iter(layers)), list(layers)[-1]}
    for name, layer in layers.items():
        bits = (layer.weight_quantizer.spec.bits, layer.act_quantizer.spec.bits)
        assert bits == ((8, 8) if name in ends else (weight_bits, act_bits)), name
    for name in gplq.model.quant_report.attention:
        for quantizer in gplq.model.architecture.get_submodule(name).modules():
            if isinstance(quantizer, ActQuantizer):
                assert quantizer.spec.bits == act_bits, name


def test_ends_and_joints_are_where_we_think(gplq):
    layers = quant_layers(gplq.model.architecture)
    backbone = type(gplq.model.architecture.backbone).__name__
    assert list(layers)[-1] in ('head.fc', 'head.layers.head')
    if backbone == 'ResNet':
        assert next(iter(layers)) == 'backbone.conv1'
        assert sum('.downsample.0' in name for name in layers) in (3, 4)
    else:
        assert next(iter(layers)) == 'backbone.patch_embed.projection'
    if backbone == 'SwinTransformer':
        stages = len(gplq.model.architecture.backbone.stages)
        assert sum('.downsample.reduction' in name for name in layers) == stages - 1


def tiny_images(backbone: torch.nn.Module) -> torch.Tensor:
    for module in backbone.modules():
        if hasattr(module, 'pad_small_map'):
            # Else Swin refuses an image whose last stages are smaller than a window.
            module.pad_small_map = True
    first = next(module for module in backbone.modules() if isinstance(module, torch.nn.Conv2d))
    size = 28 if first.in_channels == 1 else 64
    return torch.randn(1, first.in_channels, size, size)


@torch.no_grad()
def test_forward_after_calibration(gplq):
    images = tiny_images(gplq.model.architecture.backbone)
    calibrate(gplq.model.architecture, lambda _index, _passes: gplq.model(images))
    if gplq.model.direct is not None:
        init_learned_weights(gplq.model.architecture, gplq.model.direct['init'])
    output = gplq.model(images, mode='tensor')
    output = output[-1] if isinstance(output, tuple) else output
    assert output.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize('path', [path for path in FILES if path not in GPLQ_FILES], ids=named)
def test_fp32_model(path):
    model = build(load(path))
    assert not isinstance(model, GPLQ)
    output = model(tiny_images(model.backbone), mode='tensor')
    assert output[-1].isfinite().all()


def test_learning_rates(gplq):
    wrapper = build_optim_wrapper(gplq.model, gplq.cfg.optim_wrapper)
    quantizers = {id(parameter) for parameter in learned_parameters(gplq.model)}
    rates = {True: set(), False: set()}
    for group in wrapper.optimizer.param_groups:
        assert group['weight_decay'] == 0.0
        for parameter in group['params']:
            rates[id(parameter) in quantizers].add(group['lr'])
    gpus = re.search(r'_(\d)xb16', gplq.path.stem)
    weight_rate = PAPER_RATES[int(gpus[1])] if gpus else gplq.cfg.optim_wrapper.optimizer.lr
    quantizer_rate = 5e-6 if gplq.path.stem.startswith('gplq-paper') else 1e-3
    if gplq.path.stem.endswith('photos1000'):
        quantizer_rate = 2e-5
    weight_rates = {weight_rate} if gplq.cfg.model.get('train_weights', True) else set()
    assert rates == {True: {quantizer_rate}, False: weight_rates}
    # The paper's rate is constant; the small runs say why theirs is not.
    constant = not gplq.path.stem.endswith(('imagenette', 'photos1000'))
    assert (gplq.cfg.get('param_scheduler') is None) == constant
    assert not {'clip_grad', 'paramwise_cfg'} & set(gplq.cfg.optim_wrapper)
    if gpus:
        assert gplq.cfg.auto_scale_lr.base_batch_size == 16 * int(gpus[1])


def test_loop_and_hooks(gplq):
    cfg = gplq.cfg
    assert cfg.runner_type == 'gplq_mm.GPLQRunner'
    is_direct = gplq.path.stem.startswith('direct')
    loop = LOOPS.get(cfg.train_cfg.type)
    assert loop is (DirectQATLoop if is_direct else GPLQTrainLoop)
    assert (cfg.model.get('direct') is not None) == is_direct
    assert not {'by_epoch', 'val_interval'} & set(cfg.train_cfg)
    methods = (cfg.train_cfg[key] for key in ('weight_ptq', 'baseline') if key in cfg.train_cfg)
    for method in [dict(method) for method in methods if method is not None]:
        for not_of_the_method in ('num_images', 'batch_size', 'seed'):
            method.pop(not_of_the_method, None)
        assert callable(build_weight_ptq(method))
    hooks = [HOOKS.build(hook) for hook in (*cfg.custom_hooks, cfg.default_hooks.checkpoint)]
    assert all(isinstance(hook, Hook) for hook in hooks)
    kinds = {type(hook) for hook in hooks}
    assert {CalibrationHook, PCABasisHook, GPLQCheckpointHook} <= kinds
    assert 'EMAHook' not in {kind.__name__ for kind in kinds}


def test_data(gplq):
    cfg = gplq.cfg
    loader = cfg.train_dataloader
    inner = loader.dataset.dataset
    if 'xb16' in gplq.path.stem:
        assert loader.batch_size == 16
        assert inner.type == 'ImageNet'
    assert set(loader.dataset) == {'type', 'dataset'}
    assert cfg.val_dataloader.dataset.type == inner.type
    assert cfg.val_cfg is not None
    assert cfg.randomness.seed == 0
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        # Lazy: the pipeline is built, no file is looked for.
        dataset = DATASETS.build(
            {**loader.dataset, 'dataset': {**inner, 'lazy_init': True}, 'lazy_init': True}
        )
        sampler = DATA_SAMPLERS.get(loader.sampler.type)
    assert type(dataset) is SeededDataset
    assert type(dataset.dataset.pipeline.transforms[-1]).__name__ == 'PackInputs'
    assert sampler is ResumableSampler
    assert set(loader.sampler) == {'type', 'shuffle'}


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('[!_]*/*_photos1000.py')), ids=named)
def test_a_held_out_part_is_scored_and_not_trained_on(path, monkeypatch):
    monkeypatch.setenv('GPLQ_PHOTOS1000', 'photos')
    monkeypatch.setenv('GPLQ_IMAGENET_VAL', 'scored')

    def chosen(name: str, cfg: Config) -> tuple:
        dataset = cfg[f'{name}_dataloader'].dataset
        dataset = dataset.get('dataset', dataset)
        return dataset.data_root, dataset.get('fold'), dataset.get('without_fold')

    cfg = Config.fromfile(path)
    assert chosen('train', cfg) == ('photos', None, None)
    assert chosen('val', cfg) == chosen('test', cfg) == ('scored', None, None)
    monkeypatch.setenv('GPLQ_HOLD_OUT', '1/4')
    held = Config.fromfile(path)
    assert chosen('train', held) == ('photos', None, '1/4')
    assert chosen('val', held) == chosen('test', held) == ('photos', '1/4', None)
    pipelines = [c.val_dataloader.dataset.pipeline for c in (cfg, held)]
    assert pipelines[0] == pipelines[1] == cfg.test_dataloader.dataset.pipeline


@cache
def zoo() -> dict[str, str]:
    """mmpretrain's config of each of its published weights, by the path below the release."""
    configs = Path(mmpretrain.__file__).parent / '.mim' / 'configs'
    return {
        entry['Weights'].partition('/mmclassification/')[2]: entry['Config']
        for file in configs.glob('*/metafile.yml')
        for entry in yaml.safe_load(file.read_text())['Models']
        if entry.get('Weights')
    }


@pytest.mark.parametrize('path', [path for path in FILES if path.stem.endswith('in1k')], ids=named)
def test_weights_belong_to_the_architecture(path):
    """mmpretrain publishes the file for a config whose model is the architecture."""
    model = load(path).model
    file = zoo()[model.pretrained.partition('/mmclassification/')[2]]
    theirs = Config.fromfile(Path(mmpretrain.__file__).parent / '.mim' / file)
    assert model.architecture.to_dict() == {'_scope_': 'mmpretrain', **theirs.model.to_dict()}


def strings(value) -> Iterator[str]:
    """All strings inside nested config data."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)
    elif isinstance(value, str):
        yield value


@pytest.mark.parametrize('path', sorted(CONFIGS.rglob('*.py')), ids=named)
def test_no_path_of_a_machine(path):
    for text in strings(load(path).to_dict()):
        assert not re.match(r'(/|~|[A-Za-z]:\\|file:)', text), text
    for line in path.read_text().splitlines():
        assert not re.search(r'/(home|root|Users|mnt|tmp|work)/', line), line
