"""A run that dies at any moment and is resumed ends where an undisturbed one ends."""

import pytest
import torch
from tiny_runs import (
    INTERVAL,
    ITERATIONS,
    ITERATIONS_OF_EPOCH,
    KillAt,
    Killed,
    KillHook,
    assert_same_weights,
    comparable,
    die_in_weight_ptq,
    gplq_config,
    load,
    read_summary,
    run,
    weights,
)

import gplq_mm.checkpoint as checkpoint_module
import gplq_mm.engine.loops.quant_loop as quant_loop_module


def kill(cfg, *hooks) -> None:
    with pytest.raises(Killed):
        run(cfg, *hooks)


def assert_like_undisturbed(work_dir, undisturbed) -> None:
    for name in ('calibrated', 'w32a4', 'w4a4'):
        assert_same_weights(weights(work_dir, name), weights(undisturbed, name))
    assert comparable(read_summary(work_dir)) == comparable(read_summary(undisturbed))
    assert not list(work_dir.glob('.*.pth.*')), 'a temporary file was left behind'


@pytest.mark.parametrize(
    'iteration',
    # Before the first checkpoint, at, before and after others, and at the borders of an epoch.
    [
        1,
        pytest.param(INTERVAL - 1, marks=pytest.mark.slow),
        INTERVAL,
        pytest.param(INTERVAL + 1, marks=pytest.mark.slow),
        ITERATIONS_OF_EPOCH,
        pytest.param(ITERATIONS_OF_EPOCH + 1, marks=pytest.mark.slow),
        pytest.param(2 * INTERVAL, marks=pytest.mark.slow),
        2 * INTERVAL + 1,
        pytest.param(ITERATIONS - 1, marks=pytest.mark.slow),
        ITERATIONS,
    ],
)
def test_death_in_stage_1(tmp_path, float_checkpoints, undisturbed, iteration):
    cfg = gplq_config(tmp_path, float_checkpoints['vit'])
    kill(cfg, KillHook(iteration))
    saved = (iteration if iteration < ITERATIONS else ITERATIONS - 1) // INTERVAL * INTERVAL
    last = f'iter_{saved}.pth' if saved else 'calibrated.pth'
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / last)
    run(cfg, resume=True)
    assert_like_undisturbed(tmp_path, undisturbed['vit'])


def test_death_of_a_swin(tmp_path, float_checkpoints, undisturbed):
    cfg = gplq_config(tmp_path, float_checkpoints['swin'], 'swin')
    kill(cfg, KillHook(ITERATIONS_OF_EPOCH + 3))
    run(cfg, resume=True)
    assert_like_undisturbed(tmp_path, undisturbed['swin'])


def test_several_deaths(tmp_path, float_checkpoints, undisturbed):
    cfg = gplq_config(tmp_path, float_checkpoints['vit'])
    kill(cfg, KillHook(5))
    for iteration in (7, 10, 12):
        with pytest.raises(Killed):
            run(cfg, KillHook(iteration), resume=True)
    run(cfg, resume=True)
    assert_like_undisturbed(tmp_path, undisturbed['vit'])


@pytest.mark.parametrize(
    ('point', 'count'),
    [
        ('before_train_epoch', 1),
        pytest.param('before_train_epoch', 2, marks=pytest.mark.slow),
        pytest.param('after_train_epoch', 1, marks=pytest.mark.slow),
        # Evaluations in order: FP32, PTQ; W32A4, latent FP32; W4A4.
        ('after_val', 2),
        pytest.param('after_val', 3, marks=pytest.mark.slow),
        ('after_val', 5),
        # Every checkpoint, before it is written; the last two are those of Stage 2.
        ('before_save_checkpoint', 2),
        ('before_save_checkpoint', 4),
        pytest.param('before_save_checkpoint', 5, marks=pytest.mark.slow),
        ('before_save_checkpoint', 6),
        ('after_train', 1),
    ],
)
def test_death_between_the_stages(tmp_path, float_checkpoints, undisturbed, point, count):
    cfg = gplq_config(tmp_path, float_checkpoints['vit'])
    kill(cfg, KillAt(point, count))
    run(cfg, resume=True)
    assert_like_undisturbed(tmp_path, undisturbed['vit'])


def test_death_in_weight_ptq(tmp_path, float_checkpoints, undisturbed, monkeypatch):
    cfg = gplq_config(tmp_path, float_checkpoints['vit'])
    die_in_weight_ptq(monkeypatch, 3)
    kill(cfg)
    monkeypatch.undo()
    assert not (tmp_path / 'w4a4.pth').exists()
    run(cfg, resume=True)
    assert_like_undisturbed(tmp_path, undisturbed['vit'])


def test_death_before_the_summary(tmp_path, float_checkpoints, undisturbed, monkeypatch):
    cfg = gplq_config(tmp_path, float_checkpoints['vit'])

    def die(*_args):
        raise Killed

    monkeypatch.setattr(quant_loop_module, 'write_summary', die)
    kill(cfg)
    monkeypatch.undo()
    assert (tmp_path / 'w4a4.pth').is_file()
    assert not (tmp_path / 'summary.json').exists()
    run(cfg, resume=True)
    assert_like_undisturbed(tmp_path, undisturbed['vit'])


@pytest.mark.parametrize(
    ('name', 'replaced'),
    [('iter_8.pth', False), ('iter_8.pth', True), ('w32a4.pth', False), ('last_checkpoint', False)],
)
def test_death_while_writing(tmp_path, float_checkpoints, undisturbed, monkeypatch, name, replaced):
    """Dies between the write of a temporary file and its renaming, or right after the renaming."""
    cfg = gplq_config(tmp_path, float_checkpoints['vit'])
    rename = checkpoint_module.os.replace

    def die(source, target):
        if str(target).endswith(name):
            if replaced:
                rename(source, target)
            raise Killed
        rename(source, target)

    # A killed process cannot tidy up.
    monkeypatch.setattr(checkpoint_module.os, 'replace', die)
    monkeypatch.setattr(checkpoint_module.os, 'unlink', lambda _path: None)
    kill(cfg)
    monkeypatch.undo()
    assert replaced or list(tmp_path.glob(f'.{name}.*'))
    for torn in tmp_path.glob('.*'):
        torn.write_bytes(torn.read_bytes()[:100])
    run(cfg, resume=True)
    assert_like_undisturbed(tmp_path, undisturbed['vit'])


def test_schedule_by_epoch_survives_a_death_at_the_border(tmp_path, float_checkpoints):
    """The checkpoint of an epoch's last iteration knows that the schedule made its step."""
    runs = {}
    for name in ('whole', 'killed'):
        cfg = gplq_config(tmp_path / name, float_checkpoints['vit'])
        cfg.param_scheduler = [dict(type='MultiStepLR', by_epoch=True, milestones=[1], gamma=0.1)]
        cfg.default_hooks.checkpoint.interval = ITERATIONS_OF_EPOCH
        runs[name] = cfg
    run(runs['whole'])
    kill(runs['killed'], KillHook(ITERATIONS_OF_EPOCH + 1))
    assert (tmp_path / 'killed' / f'iter_{ITERATIONS_OF_EPOCH}.pth').is_file()
    run(runs['killed'], resume=True)
    assert_same_weights(weights(tmp_path / 'killed'), weights(tmp_path / 'whole'))


def test_plain_ptq_resumes(tmp_path, float_checkpoints):
    runs = {}
    for name in ('whole', 'killed'):
        runs[name] = gplq_config(tmp_path / name, float_checkpoints['vit'], train_cfg__max_epochs=0)
    run(runs['whole'])
    kill(runs['killed'], KillAt('before_save_checkpoint', 3))
    assert (tmp_path / 'killed' / 'last_checkpoint').read_text().endswith('w32a4.pth')
    run(runs['killed'], resume=True)
    assert_like_undisturbed(tmp_path / 'killed', tmp_path / 'whole')


def test_resume_without_a_checkpoint_starts_anew(tmp_path, float_checkpoints):
    cfg = gplq_config(tmp_path, float_checkpoints['vit'], train_cfg__max_epochs=0)
    run(cfg, resume=True)
    assert (tmp_path / 'summary.json').is_file()


def test_checkpoint_holds_what_training_needs(tmp_path, float_checkpoints):
    kill(gplq_config(tmp_path, float_checkpoints['vit']), KillHook(INTERVAL + 1))
    content = load(tmp_path / f'iter_{INTERVAL}.pth')
    assert content['meta']['iter'] == INTERVAL
    steps = [state['step'] for state in content['optimizer']['state'].values()]
    assert all(float(torch.as_tensor(step)) == INTERVAL for step in steps)
