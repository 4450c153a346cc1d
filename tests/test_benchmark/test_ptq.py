"""What Stage 2 costs: every step is measured, on random images or real ones."""

import numpy as np
import pytest
import torch
from builders import build_float, vit_cfg
from mmengine.config import Config
from PIL import Image

from gplq_mm.benchmark.ptq import weight_ptq_cost

PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(32, 32)),
    dict(type='PackInputs'),
]


@pytest.fixture
def cfg() -> Config:
    return Config(
        dict(model=vit_cfg(), test_dataloader=dict(dataset=dict(type='X', pipeline=PIPELINE)))
    )


def test_steps_and_units(cfg):
    result = weight_ptq_cost(cfg, 12, batch_size=4)
    assert (result['images'], result['image_source'], result['weights']) == (12, 'random', 'random')
    assert result['threads'] == torch.get_num_threads()
    for key in ('cpu_seconds', 'memory_growth_mb'):
        assert set(result[key]) == {'calibration', 'weight_ptq'}
    assert set(result['seconds']) == {'calibration', 'weight_ptq', 'reading_images'}
    assert all(seconds > 0 for seconds in result['seconds'].values())
    names = ['backbone.patch_embed.projection', *(f'backbone.layers.{i}' for i in range(2))]
    assert list(result['units']) == ['finding the units', *names, 'head.layers.head']
    assert sum(result['units'].values()) <= result['seconds']['weight_ptq']
    assert set(result['compensation_r2']) == set(names[1:])


def test_method_and_compensation(cfg):
    result = weight_ptq_cost(cfg, 4, method='RoundToNearest', compensation=None)
    assert (result['method'], result['compensation']) == ('RoundToNearest', None)
    assert result['compensation_r2'] == {}


def test_policy_of_a_gplq_config(cfg, monkeypatch):
    gplq = Config(dict(model=dict(architecture=vit_cfg(), policy=dict(preset='nonsense'))))
    with pytest.raises(ValueError, match='nonsense'):
        weight_ptq_cost(gplq, 4)


def test_images_and_weights_of_the_user(cfg, tmp_path):
    for index in range(6):
        folder = tmp_path / 'images' / str(index % 2)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'{index}.png')
    torch.save(build_float('vit').state_dict(), tmp_path / 'vit.pth')
    cfg.model.data_preprocessor = dict(mean=[127.5] * 3, std=[127.5] * 3, num_classes=5)
    result = weight_ptq_cost(
        cfg, 5, 2, folder=str(tmp_path / 'images'), weights=str(tmp_path / 'vit.pth')
    )
    assert result['image_source'] == str(tmp_path / 'images')
    assert result['weights'] == str(tmp_path / 'vit.pth')
    assert all(r2 <= 1 for r2 in result['compensation_r2'].values())
