"""Results are read from what a finished run has left, and from no other."""

import json
import os
from datetime import datetime, timezone

import pytest
from mmengine.config import Config
from zoo_checkout import summary

from gplq_mm.evaluation import Decisions
from tools.zoo.decisions import pack
from tools.zoo.files import ZooError
from tools.zoo.results import read_results

GPLQ = Config(dict(model=dict(type='gplq_mm.GPLQ')))
FLOAT = Config(dict(model=dict(type='X'), train_cfg=dict(max_epochs=4), randomness=dict(seed=7)))


def write_log(work_dir, name: str, *lines: dict, tail: str = ''):
    path = work_dir / name / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines) + tail)
    return path


def test_summary(tmp_path):
    (tmp_path / 'summary.json').write_text(json.dumps(summary()))
    result = read_results(tmp_path, GPLQ)
    assert result['stages']['fp32'] == {'top1': 72.0}
    assert result['stages']['w4a4'] == {
        'top1': 66.04,
        # Six digits.
        'relative_l2': 0.5185,
        'cosine': 0.74075,
        'agreement': 80.0,
        'transfer': {'top1': 91.25, 'agreement': 97.5},
    }
    assert list(result['stages']) == ['fp32', 'ptq_w4a4', 'w32a4', 'latent_fp32', 'w4a4']
    assert result['iterations'] == 3
    assert result['peak_memory_mb'] == 900.5
    assert result['seconds_by_step'] == {'act_qat': 5.5, 'weight_ptq': 1.5}
    assert result['images'] == {'training': 6, 'seen': 14}
    assert result['weight_drift'] == {'mae': 0.000123457, 'mse': 2e-8}
    assert result['ptq_error'] == {'with_stage1': {'mae': 0.1, 'mse': 0.0027}}
    assert result['pca'] == {'num_components': 32, 'explained_variance': 0.99}


def test_decisions_are_kept_as_bits(tmp_path):
    (tmp_path / 'summary.json').write_text(json.dumps(summary()))
    assert 'decisions' not in read_results(tmp_path, GPLQ)
    decisions = Decisions(['a', 'b', 'c'], [1, 2, 3], {'fp32': [1, 2, 3], 'w4a4': [1, 0, 3]})
    (tmp_path / 'decisions.csv').write_text(decisions.to_csv())
    kept = read_results(tmp_path, GPLQ)['decisions']
    assert kept['images'] == 3
    assert kept['correct'] == {'fp32': '4A==', 'w4a4': 'oA=='}
    other = Decisions(['a', 'b', 'x'], [1, 2, 3], decisions.predictions)
    assert pack(other)['of'] != kept['of'] == pack(decisions)['of']


def test_summary_of_a_detector(tmp_path):
    content = {**summary(), 'feature_distance': {}, 'pca': {}, 'ptq_error': {}}
    metrics = {'coco/bbox_mAP': 0.536, 'coco/bbox_mAP_50': 0.8, 'coco/segm_mAP': 0.563, 'time': 1.0}
    content['metrics'] = {'w4a4': metrics, 'w32a4': {}}
    (tmp_path / 'summary.json').write_text(json.dumps(content))
    result = read_results(tmp_path, GPLQ)
    values = {'bbox_mAP': 53.6, 'bbox_mAP_50': 80.0, 'segm_mAP': 56.3}
    assert result['stages'] == {'w4a4': {**values, 'transfer': {'top1': 91.25, 'agreement': 97.5}}}
    assert not {'pca', 'ptq_error'} & set(result)


def test_optional_parts_of_a_summary(tmp_path):
    content = summary()
    del content['transfer'], content['images']
    (tmp_path / 'summary.json').write_text(json.dumps(content))
    result = read_results(tmp_path, GPLQ)
    assert 'images' not in result
    assert 'transfer' not in result['stages']['w4a4']


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (None, 'not finished'),
        ('{"metr', 'damaged'),
        ('{}', "no summary of a run: 'metrics' is missing"),
        (json.dumps({**summary(), 'metrics': {'x': {'f1': 1.0}}}), 'none of the metrics'),
    ],
)
def test_a_summary_that_says_nothing(tmp_path, text, message):
    if text is not None:
        (tmp_path / 'summary.json').write_text(text)
    with pytest.raises(ZooError, match=message):
        read_results(tmp_path, GPLQ)


def test_log_of_a_float_training(tmp_path):
    train = {'loss': 0.1, 'epoch': 4, 'step': 400}
    write_log(tmp_path, '20260101_000000', {'accuracy/top1': 98.0, 'step': 2}, tail='{"accur')
    path = write_log(tmp_path, '20260101_000001', train, {'accuracy/top1': 97.5, 'step': 4})
    end = datetime(2026, 11, 30, 23, 59, tzinfo=timezone.utc).timestamp()
    os.utime(path, (end + 1e6, end))
    os.utime(tmp_path / '20260101_000000' / 'vis_data' / 'scalars.json', (end - 9e6, end - 9e6))
    assert read_results(tmp_path, FLOAT) == {
        'date': '2026-11-30',
        'seed': 7,
        'stages': {'trained': {'top1': 97.5, 'epoch': 4}},
    }


def test_an_unfinished_training_has_no_result(tmp_path):
    with pytest.raises(ZooError, match='nothing was evaluated, of 4'):
        read_results(tmp_path, FLOAT)
    write_log(tmp_path, '20260101_000000', {'accuracy/top1': 98.0, 'step': 2})
    with pytest.raises(ZooError, match='the last evaluation is of epoch 2, of 4'):
        read_results(tmp_path, FLOAT)


def test_a_config_that_trains_nothing(tmp_path):
    with pytest.raises(ZooError, match=r'tools/test\.py'):
        read_results(tmp_path, Config(dict(model=dict(type='X'))))
