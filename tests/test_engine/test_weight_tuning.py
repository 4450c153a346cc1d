"""Runs that train between the blocks of Stage 2."""

import pytest
import torch
from tiny_ranks import rank_config, torchrun
from tiny_runs import (
    Killed,
    assert_same_weights,
    comparable,
    die_in_weight_ptq,
    gplq_config,
    load,
    read_summary,
    run,
    weights,
)

TUNING = dict(train_cfg__weight_tuning=dict(iters_per_block=4, lr=1e-3))


@pytest.fixture(scope='module')
def tuned(tmp_path_factory, float_checkpoints):
    """Work dir of a whole run."""
    work_dir = tmp_path_factory.mktemp('tuned')
    run(gplq_config(work_dir, float_checkpoints['vit'], **TUNING))
    return work_dir


def test_stage_1_and_the_float_weights_are_the_same(tuned, undisturbed):
    assert_same_weights(weights(tuned, 'w32a4'), weights(undisturbed['vit'], 'w32a4'))
    stage_1, result = weights(tuned, 'w32a4'), weights(tuned)
    common = [key for key in stage_1 if key in result and key != 'stage_code']
    assert_same_weights({k: stage_1[k] for k in common}, {k: result[k] for k in common})


def test_integers_behind_the_first_block_are_others(tuned, undisturbed):
    plain, result = weights(undisturbed['vit']), weights(tuned)
    codes = [key for key in plain if key.endswith('weight_quantizer.codes')]
    changed = [key for key in codes if not torch.equal(plain[key], result[key])]
    assert any('backbone.layers.1.' in key for key in changed)
    assert not any('backbone.layers.0.' in key for key in changed)


def test_the_summary_counts_what_it_took(tuned, undisturbed):
    summary, plain = (read_summary(path) for path in (tuned, undisturbed['vit']))
    ptq = summary['weight_ptq']
    assert ptq['tuning_iterations'] == 8
    assert set(ptq['tuning_losses']) == {'backbone.layers.0', 'backbone.layers.1'}
    assert summary['images']['training'] == plain['images']['training'] + 8 * 16
    assert summary['act_qat_iterations'] == plain['act_qat_iterations']


def test_death_in_stage_2(tmp_path, float_checkpoints, tuned, monkeypatch):
    cfg = gplq_config(tmp_path, float_checkpoints['vit'], **TUNING)
    with monkeypatch.context() as patch:
        die_in_weight_ptq(patch, 3)
        with pytest.raises(Killed):
            run(cfg)
    run(cfg, resume=True)
    assert_same_weights(weights(tmp_path), weights(tuned))
    assert comparable(read_summary(tmp_path)) == comparable(read_summary(tuned))


def test_two_ranks_train_as_one(tmp_path, float_checkpoints):
    first = rank_config(tmp_path / 'one', float_checkpoints['vit'], 1, **TUNING)
    run(first)
    # Both begin where Stage 1 of one process has ended: a code that flips there would be all that
    # is compared.
    options = dict(TUNING, train_cfg__act_qat_from=str(tmp_path / 'one' / 'w32a4.pth'))
    process = torchrun(
        rank_config(tmp_path / 'two', float_checkpoints['vit'], 2, **options), tmp_path
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    one, two = (read_summary(tmp_path / name)['weight_ptq'] for name in ('one', 'two'))
    assert one['tuning_losses'].keys() == two['tuning_losses'].keys()
    states = [load(tmp_path / name / 'w4a4.pth')['state_dict'] for name in ('one', 'two')]
    codes = [key for key in states[0] if key.endswith('weight_quantizer.codes')]
    differing = sum(int((states[0][key] != states[1][key]).sum()) for key in codes)
    assert differing <= 0.002 * sum(states[0][key].numel() for key in codes)
