"""Every ablation changes what its comment says, and leaves alone what it is compared in."""

import re
from functools import cache
from pathlib import Path

import config_files
import pytest
from config_files import CONFIGS
from mmengine.registry import DATA_SAMPLERS, DATASETS

load = cache(config_files.load)
BASE = CONFIGS / 'gplq' / 'gplq_vit-tiny_w4a4_imagenette.py'
FILES = sorted((CONFIGS / 'ablation').glob('gplq*.py'))
DIRECT = sorted((CONFIGS / 'ablation').glob('direct*_imagenette.py'))
# What Stage 2 alone reads.
STAGE_2 = {'model.policy.weight', 'model.compensation', 'train_cfg.weight_ptq'}


def named(path: Path) -> str:
    return path.stem


def settings(cfg: dict, prefix: str = '') -> dict:
    """Leaves of a config by dotted name; variables that only configs read are left out."""
    leaves = {}
    for key, value in cfg.items():
        if not prefix and key.startswith('gplq_'):
            continue
        if isinstance(value, dict) and value:
            leaves |= settings(value, f'{prefix}{key}.')
        else:
            leaves[f'{prefix}{key}'] = value
    return leaves


@cache
def flat(path: Path) -> dict:
    return settings(load(path).to_dict())


def changed(path: Path) -> set[str]:
    """Settings in which a config differs from the base."""
    base, own = flat(BASE), flat(path)
    return {key for key in base | own if base.get(key, '-') != own.get(key, '-')}


def begins_at_stage_2(path: Path) -> bool:
    return load(path).train_cfg.get('act_qat_from') is not None


def test_finds_the_configs():
    assert len(FILES) >= 37
    assert sum(map(begins_at_stage_2, FILES)) >= 14
    assert len(DIRECT) >= 4


@pytest.mark.parametrize('path', FILES, ids=named)
def test_stage_1_is_taken_over_where_it_is_the_same(path):
    differences = changed(path) - {'train_cfg.act_qat_from'}
    assert differences
    in_stage_2 = {key for key in differences if key.startswith(tuple(STAGE_2))}
    # A Stage 1 that is not the base's must be run; one that is need not be.
    assert begins_at_stage_2(path) == (in_stage_2 == differences)


@pytest.mark.parametrize('path', FILES, ids=named)
def test_taken_over_from_the_base(path):
    if begins_at_stage_2(path):
        source = load(path).train_cfg.act_qat_from
        assert source == f'work_dirs/{BASE.stem}/w32a4.pth'


@pytest.mark.parametrize('path', FILES, ids=named)
def test_no_two_are_the_same(path):
    own = flat(path)
    assert not [other for other in FILES if other != path and flat(other) == own]


@pytest.mark.parametrize('path', [*FILES, *DIRECT], ids=named)
def test_schedule_ends_with_training(path):
    cfg = load(path)
    images = cfg.train_dataloader.dataset.dataset.get('max_images', 2400)
    iterations = -(-images // cfg.train_dataloader.batch_size) * cfg.train_cfg.max_epochs
    assert cfg.param_scheduler.T_max == cfg.train_cfg.max_iters <= iterations


@pytest.mark.parametrize('path', [*FILES, *DIRECT], ids=named)
def test_says_what_it_is_compared_with(path):
    comment = ''.join(line for line in path.read_text().splitlines() if line.startswith('#'))
    # The long variant of direct QAT stands beside nothing that has as many iterations.
    assert re.search(r'[Bb]eside|vit-tiny_w4a4_imagenette\.py|ten times', comment)
    readme = (CONFIGS / 'ablation' / 'README.md').read_text()
    assert f'({path.name})' in readme


def built(path: Path, data_root: Path):
    """Training set and sampler of a config."""
    loader = load(path).train_dataloader.to_dict()
    loader['dataset']['dataset']['data_root'] = str(data_root)
    dataset = DATASETS.build(loader['dataset'])
    return dataset, DATA_SAMPLERS.build({**loader['sampler'], 'seed': 0, 'dataset': dataset})


def test_data_subsets_are_random_nested_and_resumable(shared_data):
    root = shared_data / 'imagenette'
    chosen = {}
    for number in (128, 512, 1280):
        path = CONFIGS / 'ablation' / f'gplq-data-{number}_vit-tiny_w4a4_imagenette.py'
        dataset, sampler = built(path, root)
        chosen[number] = {dataset.get_data_info(i)['img_path'] for i in range(len(dataset))}
        assert len(chosen[number]) == number
        assert sorted(sampler) == list(range(number))
        sampler.set_position(0, number - 16)
        assert len(list(sampler)) == 16
        labels = {dataset.get_data_info(i)['gt_label'] for i in range(len(dataset))}
        assert len(labels) == 10
    assert chosen[128] < chosen[512] < chosen[1280]
