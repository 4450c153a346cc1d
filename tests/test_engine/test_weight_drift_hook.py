"""The weights' way, iteration by iteration."""

import json

import pytest
from tiny_runs import (
    Killed,
    KillHook,
    build_runner,
    gplq_config,
    load,
    read_summary,
    run,
    scalars_of,
)

from gplq_mm.engine import WeightDriftHook
from gplq_mm.layers import quant_layers


def config(work_dir, pretrained, **options):
    cfg = gplq_config(work_dir, pretrained, **options)
    (hook,) = (h for h in cfg.custom_hooks if h.type == 'gplq_mm.WeightDriftHook')
    hook.update(interval=5, iterations=[1, 2])
    return cfg


@pytest.fixture(scope='module')
def whole(tmp_path_factory, float_checkpoints):
    work_dir = tmp_path_factory.mktemp('drift')
    runner = run(config(work_dir, float_checkpoints['vit']))
    return work_dir, runner


def test_history_is_in_the_summary(whole):
    history = read_summary(whole[0])['weight_drift_history']
    assert list(history) == ['1', '2', '5', '10', '12']
    layers = set(quant_layers(whole[1].model.architecture))
    assert all(set(drift['layers']) == layers for drift in history.values())
    values = [drift['mae'] for drift in history.values()]
    assert 0 < values[0] < values[-1]


def test_the_end_is_what_the_run_measures_itself(whole):
    summary = read_summary(whole[0])
    assert summary['weight_drift_history']['12'] == summary['weight_drift']


def test_scalars(whole):
    lines = scalars_of(whole[0])
    found = {line['step']: line for line in lines if 'weight_drift/mae' in line}
    assert list(found) == [1, 2, 5, 10, 12]
    history = read_summary(whole[0])['weight_drift_history']
    name = 'backbone.layers.1.attn.qkv'
    assert found[10]['weight_drift/mse'] == history['10']['mse']
    assert found[10][f'weight_drift/{name}/mae'] == history['10']['layers'][name]['mae']


def test_checkpoints_carry_the_history(whole):
    record = load(whole[0] / 'w32a4.pth')['gplq']['record']
    assert list(record['weight_drift_history']) == [1, 2, 5, 10, 12]


def test_a_resumed_run_has_the_whole_history(whole, tmp_path, float_checkpoints):
    cfg = config(tmp_path, float_checkpoints['vit'])
    with pytest.raises(Killed):
        run(cfg, KillHook(7))
    run(cfg, resume=True)
    first, second = (read_summary(f)['weight_drift_history'] for f in (whole[0], tmp_path))
    assert json.dumps(first) == json.dumps(second)


def test_the_iteration_of_a_checkpoint_is_in_it(tmp_path, float_checkpoints):
    cfg = config(tmp_path, float_checkpoints['vit'])
    cfg.custom_hooks[-1].interval = 4
    with pytest.raises(Killed):
        run(cfg, KillHook(9))
    assert 8 in load(tmp_path / 'iter_8.pth')['gplq']['record']['weight_drift_history']


def test_an_earlier_checkpoint_without_history(tmp_path, float_checkpoints):
    cfg = config(tmp_path, float_checkpoints['vit'])
    with pytest.raises(Killed):
        run(cfg, KillHook(7))
    import torch

    path = tmp_path / 'iter_4.pth'
    checkpoint = load(path)
    del checkpoint['gplq']['record']['weight_drift_history']
    torch.save(checkpoint, path)
    run(cfg, resume=True)
    assert list(read_summary(tmp_path)['weight_drift_history']) == ['5', '10', '12']


def test_without_a_teacher(tmp_path, float_checkpoints):
    cfg = config(tmp_path, float_checkpoints['vit'], train_cfg__max_epochs=1)
    cfg.model.update(teacher=False, mimic=None)
    run(cfg)
    summary = read_summary(tmp_path)
    assert summary['weight_drift_history'] == {}
    assert summary['weight_drift'] == {}


@pytest.mark.parametrize('options', [dict(interval=-1), dict(iterations=[0])])
def test_wrong_settings(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        WeightDriftHook(**options)


def test_configs_have_it(tmp_path):
    cfg = gplq_config(tmp_path, tmp_path / 'x.pth')
    cfg.model.teacher = False
    assert any(isinstance(hook, WeightDriftHook) for hook in build_runner(cfg).hooks)
