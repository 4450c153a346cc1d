"""Reading what a run has left."""

import json

import pytest
from tiny_runs import read_summary

from gplq_mm.analysis import read_run
from gplq_mm.engine.run_record import RunRecord


def write_scalars(folder, start, lines):
    path = folder / start / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text('\n'.join(lines) + '\n')


def line(step, loss, **more):
    return json.dumps({'loss': loss, 'lr': 1e-3, 'time': 0.1, **more, 'step': step})


def test_a_whole_run(undisturbed):
    found = read_run(undisturbed['vit'], {})
    assert found['notes'] == []
    summary = read_summary(undisturbed['vit'])
    run = found['run']
    assert [row['bits'] for row in run['rows']] == ['W32A32', 'W4A4', 'W32A4', 'W32A32', 'W4A4']
    assert [row['metrics']['top1'] for row in run['rows']] == list(summary['top1'].values())
    assert run['seconds'] == summary['seconds']
    assert run['pca'] == summary['pca']
    assert run['weight_drift_history'] == summary['weight_drift_history']
    steps = [step for step, _ in found['curves']['loss']]
    assert steps == list(range(1, 13))
    assert {'loss', 'loss_pca_mimic', 'quant_clip_rate'} <= set(found['curves'])


def test_a_resumed_run_goes_on_where_its_checkpoint_was(tmp_path):
    write_scalars(tmp_path, '20260101_000000', [line(s, 1.0 * s) for s in (1, 2, 3, 4)])
    write_scalars(tmp_path, '20260102_000000', [line(s, 10.0 * s) for s in (3, 4, 5)])
    curve = read_run(tmp_path, {})['curves']['loss']
    assert curve == [[1, 1.0], [2, 2.0], [3, 30.0], [4, 40.0], [5, 50.0]]


def test_a_run_that_began_anew_forgets_the_old_one(tmp_path):
    write_scalars(tmp_path, '20260101_000000', [line(s, 1.0) for s in (1, 2, 3, 4)])
    write_scalars(tmp_path, '20260102_000000', [line(s, 2.0) for s in (1, 2)])
    assert read_run(tmp_path, {})['curves']['loss'] == [[1, 2.0], [2, 2.0]]


def test_damaged_lines_are_told(tmp_path):
    lines = [line(1, 1.0), '{"loss": 1.0, "st', '[]', line(2, 2.0, loss_pca_mimic=0.5)]
    write_scalars(tmp_path, '20260101_000000', lines)
    found = read_run(tmp_path, {})
    assert found['curves']['loss'] == [[1, 1.0], [2, 2.0]]
    assert found['curves']['loss_pca_mimic'] == [[2, 0.5]]
    assert any('2 line(s)' in note for note in found['notes'])


def test_nothing_there(tmp_path):
    record = RunRecord(pca={'num_components': 2}, weight_drift_history={10: {'mae': 1.0}})
    found = read_run(tmp_path, record.state_dict())
    assert found['run']['rows'] == []
    assert found['run']['pca'] == {'num_components': 2}
    assert found['run']['weight_drift_history'] == {'10': {'mae': 1.0}}
    assert found['curves'] == {}
    assert any('no summary.json' in note for note in found['notes'])
    assert any('LocalVisBackend' in note for note in found['notes'])


@pytest.mark.parametrize(
    ('text', 'message'),
    [('{"top1": ', 'cannot be read'), ('{}', 'has no feature_distance'), ('3', 'cannot be read')],
)
def test_damaged_summary(tmp_path, text, message):
    (tmp_path / 'summary.json').write_text(text)
    found = read_run(tmp_path, {})
    assert found['run']['rows'] == []
    assert any(message in note for note in found['notes'])
