"""Another Stage 2 on the Stage 1 of an earlier run: same result, less work, no mix-ups."""

import pytest
from tiny_runs import (
    INTERVAL,
    ITERATIONS,
    KillAt,
    Killed,
    KillHook,
    assert_same_weights,
    comparable,
    die_in_weight_ptq,
    direct_config,
    gplq_config,
    load,
    read_summary,
    run,
    weights,
)

from gplq_mm.checkpoint import CheckpointError

PLAIN_PTQ = 'ptq_w4a4'
# What weights may be told without changing Stage 1.
WEIGHTS = {
    'groups': dict(group_size=16),
    'float': dict(group_scale='float'),
    'raw': dict(layout='raw', observer='percentile'),
    'bits': dict(bits=3),
}


def without_plain_ptq(summary: dict) -> dict:
    """What of a summary does not come from the calibrated model."""
    result = comparable(summary)
    for key in ('top1', 'feature_distance', 'difference_to_fp32'):
        result[key] = {k: v for k, v in result[key].items() if not k.startswith('ptq_')}
    result['ptq_error'].pop('without_stage1', None)
    return result


def assert_like(work_dir, full) -> None:
    name = read_summary(full)['stages']['final']
    assert_same_weights(weights(work_dir, name), weights(full, name))
    expected = without_plain_ptq(read_summary(full))
    assert without_plain_ptq(read_summary(work_dir)) == expected


@pytest.fixture
def begun(tmp_path, float_checkpoints, undisturbed):
    """Makes the config of a run that begins at the end of the undisturbed one's Stage 1."""

    def make(source=undisturbed['vit'] / 'w32a4.pth', **options):
        cfg = gplq_config(tmp_path / 'begun', float_checkpoints['vit'], **options)
        cfg.train_cfg.act_qat_from = str(source)
        return cfg

    return make


def test_same_settings_give_the_same_result(begun, undisturbed, tmp_path):
    run(begun())
    assert_like(tmp_path / 'begun', undisturbed['vit'])
    summary, full = read_summary(tmp_path / 'begun'), read_summary(undisturbed['vit'])
    assert summary['act_qat_from'] == str(undisturbed['vit'] / 'w32a4.pth')
    assert full['act_qat_from'] is None
    assert summary['act_qat_iterations'] == ITERATIONS
    assert set(summary['top1']) == set(full['top1']) - {PLAIN_PTQ}
    assert set(summary['ptq_error']) == {'with_stage1'}
    assert summary['pca'] == full['pca']
    # What Stage 1 has cost is told, too.
    assert summary['seconds']['act_qat'] == full['seconds']['act_qat']
    files = {path.name for path in (tmp_path / 'begun').glob('*.pth')}
    assert files == {'w4a4.pth'}


@pytest.mark.parametrize('weight', WEIGHTS.values(), ids=WEIGHTS)
def test_other_weights_on_the_same_stage_1(begun, tmp_path, float_checkpoints, weight):
    cfg = gplq_config(tmp_path / 'full', float_checkpoints['vit'])
    cfg.model.policy.weight = weight
    run(cfg)
    cfg = begun()
    cfg.model.policy.weight = weight
    run(cfg)
    assert_like(tmp_path / 'begun', tmp_path / 'full')


@pytest.mark.parametrize('compensation', [None, dict(type='QwTv2')])
def test_another_compensation(begun, tmp_path, float_checkpoints, compensation):
    full = gplq_config(tmp_path / 'full', float_checkpoints['vit'])
    for cfg in (full, begun()):
        cfg.model.compensation = compensation
        cfg.train_cfg.weight_ptq.type = 'RoundToNearest'
        run(cfg)
    assert_like(tmp_path / 'begun', tmp_path / 'full')


def test_a_rule_for_weights_alone_may_differ(begun):
    cfg = begun()
    cfg.model.policy.rules = [dict(pattern=r'layers\.0\.', weight=dict(bits=8))]
    run(cfg)
    assert read_summary(cfg.work_dir)['top1']['w4a4'] > 20


@pytest.mark.parametrize(
    ('point', 'count'), [('before_train', 1), ('before_save_checkpoint', 1), ('after_val', 1)]
)
def test_death_and_resume(begun, tmp_path, undisturbed, point, count):
    with pytest.raises(Killed):
        run(begun(), KillAt(point, count))
    run(begun(), resume=True)
    assert_like(tmp_path / 'begun', undisturbed['vit'])
    assert read_summary(tmp_path / 'begun')['act_qat_from'] is not None


def test_death_in_weight_ptq(begun, tmp_path, undisturbed, monkeypatch):
    die_in_weight_ptq(monkeypatch, 2)
    with pytest.raises(Killed):
        run(begun())
    monkeypatch.undo()
    run(begun(), resume=True)
    assert_like(tmp_path / 'begun', undisturbed['vit'])


def test_a_finished_run_needs_its_source_no_more(begun, tmp_path, undisturbed):
    run(begun())
    first = read_summary(tmp_path / 'begun')
    run(begun(tmp_path / 'gone.pth'), resume=True)
    assert read_summary(tmp_path / 'begun') == first


def test_stage_1_may_have_been_left_out(begun, tmp_path, float_checkpoints):
    run(gplq_config(tmp_path / 'ptq', float_checkpoints['vit'], train_cfg__max_epochs=0))
    run(begun(tmp_path / 'ptq' / 'w32a4.pth'))
    assert_like(tmp_path / 'begun', tmp_path / 'ptq')


@pytest.mark.parametrize(
    ('policy', 'part'),
    [
        (dict(activation=dict(bits=3)), 'activations'),
        (dict(activation=dict(granularity='tensor')), 'activations'),
        (dict(probs=dict(row_relative=False)), 'activations'),
        (dict(rules=[dict(pattern=r'layers\.0\.', activation=dict(bits=8))]), 'rules'),
        (dict(exclude=[r'layers\.0\.attn\.qkv']), 'rules'),
    ],
)
def test_other_activations_are_refused(begun, policy, part):
    cfg = begun()
    cfg.model.policy.update(policy)
    with pytest.raises(CheckpointError, match=rf'w32a4\.pth.*another policy.*{part}'):
        run(cfg)


def test_another_architecture_is_refused(begun, undisturbed):
    with pytest.raises(CheckpointError, match=r'w32a4\.pth.*another architecture'):
        run(begun(undisturbed['swin'] / 'w32a4.pth'))


@pytest.mark.parametrize('name', ['calibrated', f'iter_{2 * INTERVAL}', 'w4a4'])
def test_files_of_other_moments_are_refused(begun, undisturbed, name):
    with pytest.raises(CheckpointError, match=rf'{name}\.pth.*end of Stage 1.*w32a4\.pth'):
        run(begun(undisturbed['vit'] / f'{name}.pth'))


def test_files_of_no_gplq_run_are_refused(begun, tmp_path, float_checkpoints):
    with pytest.raises(CheckpointError, match='end of Stage 1'):
        run(begun(float_checkpoints['vit']))
    with pytest.raises(CheckpointError, match='does not exist'):
        run(begun(tmp_path / 'nowhere.pth'))
    cfg = direct_config(tmp_path / 'direct', float_checkpoints['vit'])
    cfg.train_cfg.max_epochs = 0
    run(cfg)
    with pytest.raises(CheckpointError, match='end of Stage 1'):
        run(begun(tmp_path / 'direct' / 'calibrated.pth'))


def test_a_run_with_a_stage_1_of_its_own_is_not_resumed(begun):
    cfg = begun()
    cfg.train_cfg.act_qat_from = None
    with pytest.raises(Killed):
        run(cfg, KillHook(INTERVAL + 1))
    with pytest.raises(CheckpointError, match=r'Stage 1 of its own.*another work dir'):
        run(begun(), resume=True)
    assert load(f'{cfg.work_dir}/iter_{INTERVAL}.pth')['meta']['iter'] == INTERVAL


def test_weights_of_a_run_are_no_float_model(tmp_path, undisturbed):
    source = undisturbed['vit'] / 'w32a4.pth'
    with pytest.raises(CheckpointError, match=r'w32a4\.pth was written by a GPLQ run'):
        run(gplq_config(tmp_path, source))


def test_stage_2_has_the_seed_of_stage_1(begun, tmp_path, float_checkpoints):
    run(gplq_config(tmp_path / 'full', float_checkpoints['vit'], randomness__seed=7))
    run(begun(tmp_path / 'full' / 'w32a4.pth'))
    assert_like(tmp_path / 'begun', tmp_path / 'full')
    assert read_summary(tmp_path / 'begun')['weight_ptq']['seed'] == 7
