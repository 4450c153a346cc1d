"""The worked examples of the documentation run as they stand."""

import sys
from pathlib import Path

import pytest
import timm
import torch
from doc_pages import DOCS, ROOT, blocks, name_of
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from PIL import Image

from gplq_mm.evaluation import Decisions
from gplq_mm.layers import Int4WeightLayer
from gplq_mm.models import GPLQ
from gplq_mm.registry import FAMILIES, FORMATS, WEIGHT_PTQ


@pytest.fixture
def own_registries(monkeypatch):
    """What the examples register is forgotten."""
    for registry in (FAMILIES, FORMATS, WEIGHT_PTQ):
        registry.import_from_location()
        monkeypatch.setattr(registry, '_module_dict', dict(registry.module_dict))


def run_page(page: Path) -> dict:
    """Runs the Python blocks of a page in order, in one namespace, which it returns."""
    space = {'__name__': page.stem}
    for block in blocks(page):
        if block.language == 'python':
            # Line numbers in a traceback are those of the page.
            code = '\n' * (block.line - 1) + block.text
            exec(compile(code, name_of(page), 'exec'), space)
    return space


def test_extending(own_registries):
    space = run_page(DOCS / 'extending.md')
    assert {'power_of_two'} <= set(FORMATS.module_dict)
    assert {'AdaRound', 'BlockScales'} <= set(WEIGHT_PTQ.module_dict)
    assert WEIGHT_PTQ.get('AdaRound') is space['AdaRound']
    assert FAMILIES.get('MyFamily') is space['MyFamily']


def test_a_config_imports_a_format_of_ones_own(own_registries, tmp_path, monkeypatch):
    own = next(code.text for code in blocks(DOCS / 'extending.md') if 'PowerOfTwo(' in code.text)
    (tmp_path / 'my_power_of_two.py').write_text(f'import torch\n{own}')
    config = tmp_path / 'my_gplq.py'
    config.write_text(
        f"_base_ = ['{ROOT}/configs/quickstart/gplq_vit_mnist.py']\n"
        "custom_imports = dict(imports=['my_power_of_two'])\n"
        "model = dict(teacher=False, policy=dict(activation=dict(format='power_of_two')))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    cfg = Config.fromfile(config)
    cfg.model.mimic = None
    model = MODELS.build(cfg.model)
    layer = model.architecture.backbone.layers[0].attn.qkv
    assert type(layer.act_quantizer.format).__name__ == 'PowerOfTwo'
    sys.modules.pop('my_power_of_two')


def test_two_tables_of_decisions_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, classes in (('one', [1, 2, 3, 5]), ('other', [1, 0, 0, 5])):
        decisions = Decisions(list('abcd'), [1, 2, 3, 4], {'w4a4': classes})
        Path(f'{name}.csv').write_text(decisions.to_csv())
    run_page(DOCS / 'comparing.md')
    assert "'points': 50.0" in capsys.readouterr().out


@pytest.mark.parametrize('page', [ROOT / 'README.md', DOCS / 'get-started.md'], ids=name_of)
def test_the_front_door(page, tmp_path, monkeypatch):
    """On a smaller model and without its download."""
    create = timm.create_model
    small = dict(patch_size=32, depth=2, embed_dim=32, num_heads=2)
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained: create(name, **small))
    monkeypatch.chdir(tmp_path)
    for number in range(40):
        path = tmp_path / 'imagenet' / ('val' if number < 4 else 'train') / 'ab'[number % 2]
        path.mkdir(parents=True, exist_ok=True)
        noise = torch.randint(256, (8, 8, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).save(path / f'{number}.png')
    space: dict = {}
    found = [code.text for code in blocks(page) if code.language == 'python']
    (first,) = (number for number, text in enumerate(found) if 'import gplq_mm' in text)
    for text in found[first:]:
        exec(compile(text, name_of(page), 'exec'), space)
        assert space['model'].gplq_report.compensation_r2
    assert (tmp_path / 'deit.safetensors').exists()
    assert packed_layers(space['packed']) == 10
    trains = page.name == 'get-started.md'
    report = space['model'].gplq_report
    assert len(report.losses) == 8 * trains
    assert len(report.tuning_losses) == 2 * trains
    if trains:
        assert 0 <= space['accuracy'](space['packed']) <= 1


def packed_layers(model) -> int:
    return sum(isinstance(module, Int4WeightLayer) for module in model.modules())


def test_an_example_that_does_not_hold_fails(tmp_path, monkeypatch):
    monkeypatch.setattr('doc_pages.ROOT', tmp_path)
    page = tmp_path / 'page.md'
    page.write_text('# A page\n\n```python\nassert 1 + 1 == 3\n```\n')
    with pytest.raises(AssertionError):
        run_page(page)


# Page -> the name that its example gives the config it stands on, the bases of that config, and the
# number of images a step that the learning rate is meant for.
BASE = ROOT / 'configs' / '_base_'
OWN_MODELS = {
    'your-classifier.md': (
        'my_model.py',
        [
            f'{BASE}/models/vit_mnist.py',
            f'{BASE}/datasets/mnist5k.py',
            'mmpretrain::_base_/default_runtime.py',
        ],
        128,
    ),
    'your-detector.md': (
        'my_detector.py',
        [
            f'{BASE}/models/mask-rcnn_swin_mnist.py',
            f'{BASE}/datasets/mnist_scenes.py',
            'mmdet::_base_/default_runtime.py',
        ],
        8,
    ),
}
# What an ordinary float config has, so that the example has to replace it.
FLOAT_SCHEDULE = """
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1), clip_grad=dict(max_norm=1.0))
param_scheduler = dict(type='MultiStepLR', milestones=[30])
train_cfg = dict(by_epoch=True, max_epochs=100, val_interval=1)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=1024)
"""


def write_example(folder: Path, page: str) -> Path:
    """Writes the config of a page and the one that it stands on; returns the first."""
    name, bases, _ = OWN_MODELS[page]
    example = next(code.text for code in blocks(DOCS / page) if code.text.startswith('_base_'))
    (folder / name).write_text(f'_base_ = {bases}\n{FLOAT_SCHEDULE}')
    config = folder / 'my_gplq.py'
    config.write_text(example.replace('../_base_', str(BASE)))
    return config


@pytest.mark.parametrize('page', OWN_MODELS)
def test_the_config_of_a_page_builds_a_model(page, tmp_path):
    name, _, images = OWN_MODELS[page]
    cfg = Config.fromfile(write_example(tmp_path, page))
    base = Config.fromfile(tmp_path / name)
    assert cfg.runner_type == 'gplq_mm.GPLQRunner'
    assert (cfg.train_cfg.type, cfg.train_cfg.max_epochs) == ('gplq_mm.GPLQTrainLoop', 1)
    assert cfg.train_dataloader.dataset.type == 'gplq_mm.SeededDataset'
    assert cfg.train_dataloader.dataset.dataset == base.train_dataloader.dataset
    assert cfg.train_dataloader.get('batch_sampler') is None
    assert cfg.train_dataloader.sampler.type == 'gplq_mm.ResumableSampler'
    assert 'clip_grad' not in cfg.optim_wrapper
    assert cfg.param_scheduler is None
    assert cfg.auto_scale_lr.base_batch_size == images
    assert {'gplq_mm.CalibrationHook'} <= {hook.type for hook in cfg.custom_hooks}
    assert cfg.default_hooks.checkpoint.type == 'gplq_mm.GPLQCheckpointHook'
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    assert type(model) is GPLQ
    assert model.policy.label == 'w4a4'
    assert len(model.quant_report.linear) > 10


def test_the_block_of_direct_qat_makes_a_model_of_it(tmp_path):
    page = 'your-classifier.md'
    gplq = write_example(tmp_path, page)
    block = next(code.text for code in blocks(DOCS / page) if f"['{gplq.name}']" in code.text)
    (tmp_path / 'my_direct.py').write_text(block)
    cfg = Config.fromfile(tmp_path / 'my_direct.py')
    assert dict(cfg.train_cfg) == dict(type='gplq_mm.DirectQATLoop', max_epochs=1)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    assert model.direct
    assert model.policy.weight.layout == 'raw'


def test_the_policy_of_its_page_leaves_the_products_in_float():
    text = next(code.text for code in blocks(DOCS / 'policies.md') if code.language == 'python')
    space: dict = {}
    exec(text, space)
    base = Config.fromfile(ROOT / 'configs/gplq/gplq_vit-tiny_w4a4_imagenette.py').model
    base.update(policy=space['policy'], mimic=None, distill=None, teacher=False, pretrained=None)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(base)
    assert model.quant_report.excluded == ['backbone.layers.0.attn']
