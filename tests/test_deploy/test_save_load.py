"""A packed file gives back the model that was saved, alone, and to the packages' own APIs."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from builders import NUM_CLASSES, images, vit_cfg
from mmdet.apis import inference_detector
from mmengine.registry import MODELS, DefaultScope
from mmpretrain import ImageClassificationInferencer
from packed_models import (
    assert_close_but_for_flips,
    detector_config,
    fill_compensations,
    finish,
    quantized_classifier,
    quantized_detector,
    run_config,
)
from safetensors import safe_open
from torch import nn

from gplq_mm.deploy import DeployError, convert, load, save
from gplq_mm.layers import quant_layers

KINDS = ('vit', 'swin', 'resnet')
CLASSES = tuple('abcde')


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """Kind -> simulated model, path and sizes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('packed')
    result = {}
    for kind in KINDS:
        model = quantized_classifier(kind, compensation=dict(type='QwT'))
        fill_compensations(model)
        path = folder / f'{kind}.safetensors'
        sizes = save(model, run_config(kind), path, {'classes': CLASSES}, {'top1': {'fp32': 97.0}})
        result[kind] = (model, path, sizes)
    return result


@pytest.mark.parametrize('kind', KINDS)
def test_round_trip(saved, kind):
    simulated, path, _ = saved[kind]
    loaded, direct = load(path), convert(simulated)
    first, second = loaded.state_dict(), direct.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    x = images(4, seed=9)
    assert torch.equal(loaded(x), direct(x))
    with torch.no_grad():
        assert_close_but_for_flips(loaded(x), simulated(x))
    assert not loaded.training
    assert loaded.deploy_report == direct.deploy_report
    assert loaded.deploy_header['accuracy'] == {'top1': {'fp32': 97.0}}
    assert loaded.deploy_header['versions']['torch'] == torch.__version__.partition('+')[0]


def test_a_loaded_model_copies_and_moves(saved):
    loaded = load(saved['swin'][1], device='cpu')
    x = images(2)
    expected = loaded(x)
    assert torch.equal(copy.deepcopy(loaded).to('cpu')(x), expected)
    fresh = load(saved['swin'][1])
    fresh.load_state_dict(loaded.state_dict())
    assert torch.equal(fresh(x), expected)


def test_without_a_gpu_a_model_stays_on_the_cpu(saved, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    loaded = load(saved['vit'][1], device='cuda')
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {'cpu'}
    with pytest.raises(ValueError, match='cpu'):
        load(saved['vit'][1], device='meta')


def test_the_random_state_is_left_alone(saved):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load(saved['vit'][1])
    assert torch.equal(torch.rand(3), expected)


def test_the_same_model_gives_the_same_bytes(saved, tmp_path):
    simulated, path, _ = saved['vit']
    again = tmp_path / 'again.safetensors'
    save(simulated, run_config('vit'), again, {'classes': CLASSES}, {'top1': {'fp32': 97.0}})
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize('kind', KINDS)
def test_sizes(saved, kind):
    _, path, sizes = saved[kind]
    assert sizes.file == path.stat().st_size
    assert sum(sizes.parts.values()) < sizes.file
    with safe_open(path, 'pt') as file:
        stored = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    assert sum(sizes.parts.values()) == stored
    cfg = run_config(kind)
    float_model = MODELS.build(cfg['model'])
    assert sizes.fp32 == sum(value.nbytes for value in float_model.state_dict().values())
    assert 0 < sizes.ratio_without_compensation < sizes.ratio < 1
    compensation = sum(
        value.nbytes
        for name, value in saved[kind][0].state_dict().items()
        if '.compensation.' in name
    )
    assert sizes.parts['compensation'] == compensation


def test_four_bits_take_four_bits(saved):
    simulated, path, sizes = saved['vit']
    expected = 0
    for layer in quant_layers(simulated).values():
        rows, columns = layer.weight_quantizer.shape
        nibbles = layer.weight_quantizer.spec.bits == 4
        expected += rows * ((columns + 1) // 2 if nibbles else columns)
    assert sizes.parts['weight codes'] == expected
    with safe_open(path, 'pt') as file:
        assert file.get_slice('backbone.layers.0.ffn.layers.1.codes').get_shape() == [32, 32]


def test_no_pickle_in_the_file(saved):
    data = saved['vit'][1].read_bytes()
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(data)


def test_inferencer_of_mmpretrain(saved):
    """Class names, test pipeline and preprocessor come from the file."""
    simulated, path, _ = saved['vit']
    loaded = load(path)
    inferencer = ImageClassificationInferencer(loaded)
    picture = np.random.default_rng(0).integers(0, 255, (50, 40, 3), dtype=np.uint8)
    results = inferencer([picture, picture[::-1].copy()])
    assert len(results) == 2
    assert results[0]['pred_class'] in CLASSES
    assert results[0]['pred_scores'].shape == (NUM_CLASSES,)
    x = mmcv.imresize(picture, (32, 32)).transpose(2, 0, 1)
    with torch.no_grad():
        scores = simulated(torch.from_numpy(x.copy()).float()[None]).softmax(-1)[0]
    np.testing.assert_allclose(results[0]['pred_scores'], scores.numpy(), atol=1e-4)


def test_loads_in_a_fresh_process_elsewhere(saved, tmp_path):
    """No config, no data set, no earlier import of the packages."""
    _, path, _ = saved['resnet']
    code = (
        'import torch\nfrom gplq_mm.deploy import load\n'
        f'model = load({str(path)!r})\nprint(model(torch.zeros(1, 3, 32, 32)).shape[1])\n'
    )
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, 'PYTHONPATH': str(root)}
    run = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], cwd=tmp_path, env=env, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == str(NUM_CLASSES)


def test_policy_of_every_layer_travels(tmp_path):
    """Other widths, grids and granularities than the defaults."""
    policy = dict(
        activation=dict(granularity='tensor', zero_point='integer'),
        weight=dict(bits=3, group_size=5),
        q=dict(granularity='tensor', zero_point='none'),
        rules=[dict(pattern=r'layers\.0\.ffn', weight=dict(bits=6), activation=dict(bits=7))],
        exclude=[r'layers\.1\.attn\.(k|probs)$', r'layers\.1\.attn\.proj'],
    )
    simulated = quantized_classifier('vit', policy)
    path = tmp_path / 'm.safetensors'
    save(simulated, run_config('vit'), path)
    loaded, direct = load(path), convert(simulated)
    x = images(3)
    assert torch.equal(loaded(x), direct(x))
    assert loaded.deploy_report.simulated == direct.deploy_report.simulated != {}
    specs = loaded.deploy_header['layers']['backbone.layers.0.ffn.layers.1']
    assert (specs['weight']['bits'], specs['activation']['bits']) == (6, 7)


def test_options_of_the_backbone_travel(tmp_path):
    cfg = run_config('vit')
    options = dict(
        patch_cfg=dict(stride=(4, 8), padding=0), img_size=(32, 32), layer_scale_init_value=0.2
    )
    cfg['model']['backbone'].update(options, init_cfg=dict(type='Pretrained', checkpoint='x.pth'))
    model = quantized_classifier('vit', None, None, **options)
    path = tmp_path / 'm.safetensors'
    save(model, cfg, path)
    loaded = load(path)
    x = images(3)
    assert torch.equal(loaded(x), convert(model)(x))
    assert loaded.cfg.model.backbone.patch_cfg.stride == (4, 8)
    assert 'init_cfg' not in loaded.cfg.model.backbone


def test_a_shared_layer(tmp_path):
    """One module under two names is stored once and shared again."""

    @MODELS.register_module(name='SharedForPacking', force=True)
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Linear(6, 6))
            self.b = nn.Sequential(self.a[0], nn.BatchNorm1d(6))

        def forward(self, x):
            return self.b(x)

    model = MODELS.build(dict(type='SharedForPacking')).eval()
    model = finish(model, batches=(torch.randn(8, 6), torch.randn(8, 6)))
    path = tmp_path / 'm.safetensors'
    save(model, dict(model=dict(type='SharedForPacking')), path)
    loaded = load(path)
    assert loaded.a[0] is loaded.b[0]
    x = torch.randn(4, 6)
    assert torch.equal(loaded(x), convert(model)(x))


# -- detectors --------------------------------------------------------------------------------


def test_detector_and_inference_api_of_mmdet(tmp_path):
    cfg = detector_config()
    model = quantized_detector(cfg)
    path = tmp_path / 'detector.safetensors'
    save(model, cfg, path, {'classes': ('x', 'y', 'z')})
    loaded = load(path)
    assert type(loaded.backbone).__name__ == 'SwinTransformer'
    assert loaded.deploy_report.fused
    picture = np.random.default_rng(0).integers(0, 255, (60, 70, 3), dtype=np.uint8)
    model.cfg = cfg
    with DefaultScope.overwrite_default_scope('mmdet'):
        result = inference_detector(loaded, picture)
        expected = inference_detector(model, picture)
    assert len(result.pred_instances) == len(expected.pred_instances) > 0
    assert_close_but_for_flips(result.pred_instances.scores, expected.pred_instances.scores)
    assert loaded.dataset_meta['classes'] == ('x', 'y', 'z')


# -- what cannot be saved ---------------------------------------------------------------------


def test_raw_layout(tmp_path):
    model = quantized_classifier('vit', dict(preset='paper'))
    with pytest.raises(DeployError, match='layout "raw"'):
        save(model, run_config('vit'), tmp_path / 'm.safetensors')
    assert not list(tmp_path.iterdir())


def test_config_that_is_no_data(saved, tmp_path):
    cfg = run_config('vit')
    cfg['model']['backbone']['norm_cfg'] = dict(type='LN', eps=torch.tensor(1.0))
    with pytest.raises(DeployError, match=r'norm_cfg\.eps.*Tensor'):
        save(saved['vit'][0], cfg, tmp_path / 'm.safetensors')


def test_config_of_another_architecture(saved, tmp_path):
    """The file is written, and refused when it is read: its tensors do not fit."""
    path = tmp_path / 'm.safetensors'
    cfg = dict(model=vit_cfg(num_classes=7), default_scope='mmpretrain')
    save(saved['vit'][0], cfg, path)
    with pytest.raises(DeployError, match=r'head\.layers\.head.*needs'):
        load(path)


def test_missing_model(saved, tmp_path):
    with pytest.raises(DeployError, match='no "model"'):
        save(saved['vit'][0], {}, tmp_path / 'm.safetensors')


def test_unwritable_place(saved, tmp_path):
    (tmp_path / 'file').write_bytes(b'')
    with pytest.raises(OSError, match='could not be written'):
        save(saved['vit'][0], run_config('vit'), tmp_path / 'file' / 'm.safetensors')
