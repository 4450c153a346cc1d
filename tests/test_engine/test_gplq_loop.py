"""Whole two-stage runs on digits: what they write and what their settings do."""

import re

import pytest
import torch
from tiny_runs import (
    ARCHITECTURES,
    ITERATIONS,
    KillAt,
    Killed,
    KillHook,
    assert_same_weights,
    gplq_config,
    load,
    read_summary,
    run,
    weights,
)

from gplq_mm.engine import unwrap
from gplq_mm.errors import SettingError
from gplq_mm.evaluation import Decisions
from gplq_mm.models import Stage

STAGES = {'fp32', 'ptq_w4a4', 'w32a4', 'w4a4', 'latent_fp32'}
CHECKPOINTS = {'calibrated': 'CALIBRATED', 'w32a4': 'ACT_QAT', 'w4a4': 'WEIGHT_PTQ'}


@pytest.mark.parametrize('arch', ARCHITECTURES)
class TestWholeRun:
    def test_summary_compares_all_stages(self, undisturbed, arch):
        summary = read_summary(undisturbed[arch])
        assert set(summary['top1']) == STAGES
        assert all(0 <= value <= 100 for value in summary['top1'].values())
        assert summary['top1']['fp32'] > 30, 'the tiny model should have learned something'
        # At the start student and teacher are the same.
        assert set(summary['feature_distance']) == STAGES - {'fp32'}
        assert summary['act_qat_iterations'] == ITERATIONS

    def test_decisions_are_those_that_were_scored(self, undisturbed, arch):
        summary = read_summary(undisturbed[arch])
        decisions = Decisions.from_csv((undisturbed[arch] / 'decisions.csv').read_text())
        assert set(decisions.predictions) == STAGES
        assert len(set(decisions.images)) == 100
        assert all(re.fullmatch(r'mnist5k/\d{4}', image) for image in decisions.images)
        for stage, top1 in summary['top1'].items():
            assert 100 * decisions.correct(stage).mean() == pytest.approx(top1)
        assert set(summary['difference_to_fp32']) == STAGES - {'fp32'}
        for stage, difference in summary['difference_to_fp32'].items():
            expected = summary['top1'][stage] - summary['top1']['fp32']
            assert difference['points'] == pytest.approx(expected)
            assert difference['low'] <= expected <= difference['high']

    def test_summary_has_costs_of_every_stage(self, undisturbed, arch):
        summary = read_summary(undisturbed[arch])
        stages = {'calibration', 'pca', 'baseline', 'act_qat', 'weight_ptq', 'diagnostics'}
        stages |= {f'evaluation_{name}' for name in STAGES}
        assert set(summary['seconds']) == set(summary['peak_memory_mb']) == stages
        assert all(seconds > 0 for seconds in summary['seconds'].values())
        assert all(megabytes > 10 for megabytes in summary['peak_memory_mb'].values())

    def test_summary_has_drift_and_errors(self, undisturbed, arch):
        summary = read_summary(undisturbed[arch])
        assert summary['weight_drift']['mae'] > 0
        for key in ('without_stage1', 'with_stage1'):
            assert summary['ptq_error'][key]['mae'] > 0
            assert summary['ptq_error'][key]['mse'] > 0

    def test_summary_says_how_it_came_about(self, undisturbed, arch):
        summary = read_summary(undisturbed[arch])
        assert summary['calibration']['seed'] == 0
        assert len(set(summary['calibration']['image_ids'])) == 32
        assert len(set(summary['weight_ptq']['image_ids'])) == 64
        assert summary['policy']['preset'] == 'gplq'
        assert {'Python', 'PyTorch', 'gplq_mm'} <= set(summary['environment'])

    def test_checkpoints_describe_themselves(self, undisturbed, arch):
        summary = read_summary(undisturbed[arch])
        for name, stage in CHECKPOINTS.items():
            # `load` reads with weights_only=True.
            gplq = load(undisturbed[arch] / f'{name}.pth')['gplq']
            assert gplq['stage'] == stage
            assert gplq['policy'] == summary['policy']
            assert gplq['seed'] == 0
            assert gplq['record']['calibration'] == summary['calibration']

    def test_last_checkpoint_is_the_final_one(self, undisturbed, arch):
        pointer = (undisturbed[arch] / 'last_checkpoint').read_text()
        assert pointer == str(undisturbed[arch] / 'w4a4.pth')

    def test_latent_weights_outlive_stage_2(self, undisturbed, arch):
        before, after = weights(undisturbed[arch], 'w32a4'), weights(undisturbed[arch], 'w4a4')
        common = [key for key in before if key in after and key != 'stage_code']
        assert any('qkv.weight' in key for key in common)
        assert_same_weights({k: before[k] for k in common}, {k: after[k] for k in common})

    def test_stage_1_moves_weights_and_scales(self, undisturbed, arch):
        before, after = (
            weights(undisturbed[arch], 'calibrated'),
            weights(undisturbed[arch], 'w32a4'),
        )
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert any(key.endswith('act_quantizer.scale') for key in moved)
        assert any(key.endswith('act_quantizer.offset') for key in moved)
        assert any(key.endswith('qkv.weight') for key in moved)


def test_same_seed_gives_the_same_run(tmp_path, float_checkpoints, undisturbed):
    run(gplq_config(tmp_path, float_checkpoints['vit']))
    assert_same_weights(weights(tmp_path), weights(undisturbed['vit']))


def test_another_seed_gives_another_run(tmp_path, float_checkpoints, undisturbed):
    run(gplq_config(tmp_path, float_checkpoints['vit'], randomness__seed=7))
    first, second = weights(tmp_path, 'w32a4'), weights(undisturbed['vit'], 'w32a4')
    assert any(not torch.equal(first[key], second[key]) for key in first)
    # Which images calibrate is a matter of chance, too.
    summary, other = read_summary(tmp_path), read_summary(undisturbed['vit'])
    for part in ('calibration', 'weight_ptq'):
        assert (summary[part]['seed'], other[part]['seed']) == (7, 0)
        assert summary[part]['image_ids'] != other[part]['image_ids']


def test_no_epochs_is_plain_ptq(tmp_path, float_checkpoints):
    runner = run(gplq_config(tmp_path, float_checkpoints['vit'], train_cfg__max_epochs=0))
    summary = read_summary(tmp_path)
    assert summary['act_qat_iterations'] == 0
    assert 'act_qat' not in summary['seconds']
    assert set(summary['top1']) == STAGES
    assert summary['weight_drift']['mae'] == 0
    assert unwrap(runner.model).stage == Stage.WEIGHT_PTQ
    float_weights = load(float_checkpoints['vit'])['state_dict']
    latent = weights(tmp_path)
    for key, value in float_weights.items():
        assert torch.equal(latent[f'architecture.{key}'], value)


@pytest.mark.parametrize('max_iters', [1, 7])
def test_max_iters_stops_stage_1(tmp_path, float_checkpoints, max_iters):
    cfg = gplq_config(tmp_path, float_checkpoints['vit'])
    cfg.train_cfg.update(max_iters=max_iters, baseline='RoundToNearest')
    run(cfg)
    assert read_summary(tmp_path)['act_qat_iterations'] == max_iters
    assert (tmp_path / 'iter_4.pth').is_file() == (max_iters == 7)


def test_without_training_weights_only_quantizers_learn(tmp_path, float_checkpoints):
    options = dict(model__train_weights=False, train_cfg__max_epochs=1)
    run(gplq_config(tmp_path, float_checkpoints['vit'], **options))
    before, after = weights(tmp_path, 'calibrated'), weights(tmp_path, 'w32a4')
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert any(key.endswith('scale') for key in moved)
    allowed = ('.scale', '.offset', '.state_code', 'stage_code')
    assert all(key.endswith(allowed) for key in moved), moved
    assert read_summary(tmp_path)['weight_drift']['mae'] == 0


def test_bf16_stage_1(tmp_path, float_checkpoints, undisturbed):
    cfg = gplq_config(tmp_path, float_checkpoints['vit'])
    cfg.optim_wrapper.type = 'gplq_mm.Bf16OptimWrapper'
    cfg.train_cfg.max_epochs = 1
    run(cfg)
    state, fp32 = weights(tmp_path), weights(undisturbed['vit'])
    assert {key: v.dtype for key, v in state.items()} == {key: v.dtype for key, v in fp32.items()}
    top1 = read_summary(tmp_path)['top1']
    # What is evaluated runs in FP32, so both runs start from the same numbers.
    assert top1['fp32'] == read_summary(undisturbed['vit'])['top1']['fp32']
    assert top1['w4a4'] > 20


@pytest.mark.parametrize('compensation', [dict(type='QwTv2'), None])
def test_other_compensations(tmp_path, float_checkpoints, compensation):
    cfg = gplq_config(tmp_path, float_checkpoints['vit'], train_cfg__max_epochs=0)
    cfg.model.compensation = compensation
    cfg.train_cfg.baseline = None
    cfg.train_cfg.weight_ptq.type = 'RoundToNearest'
    run(cfg)
    summary = read_summary(tmp_path)
    assert bool(summary['weight_ptq']['compensation_r2']) == (compensation is not None)


def test_without_labels_and_without_validation(tmp_path, float_checkpoints):
    cfg = gplq_config(tmp_path, float_checkpoints['swin'], 'swin', train_cfg__max_epochs=1)
    cfg.model.update(task_weight=0.0, distill=dict(loss_weight=1.0, temperature=2.0))
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    run(cfg)
    assert 'top1' not in read_summary(tmp_path)
    assert (tmp_path / 'w4a4.pth').is_file()


def test_finished_run_is_not_run_again(tmp_path, float_checkpoints):
    cfg = gplq_config(tmp_path, float_checkpoints['vit'], train_cfg__max_epochs=0)
    run(cfg)
    written = (tmp_path / 'w4a4.pth').stat().st_mtime_ns
    first = read_summary(tmp_path)
    run(cfg, resume=True)
    assert (tmp_path / 'w4a4.pth').stat().st_mtime_ns == written
    assert read_summary(tmp_path) == first


def test_scheduler_by_epoch_counts_epochs(tmp_path, float_checkpoints):
    cfg = gplq_config(tmp_path, float_checkpoints['vit'])
    cfg.param_scheduler = [dict(type='MultiStepLR', by_epoch=True, milestones=[1], gamma=0.5)]
    with pytest.raises(Killed):
        run(cfg, KillHook(9))
    groups = load(tmp_path / 'iter_8.pth')['optimizer']['param_groups']
    assert {group['lr'] for group in groups} == {0.5e-4, 0.5e-3}


def test_a_schedule_does_not_disturb_a_run_without_training(tmp_path, float_checkpoints):
    cfg = gplq_config(tmp_path, float_checkpoints['vit'], train_cfg__max_epochs=0)
    cfg.param_scheduler = [dict(type='CosineAnnealingLR', T_max=150, by_epoch=False)]
    with pytest.raises(Killed):
        run(cfg, KillAt('before_save_checkpoint', 3))
    run(cfg, resume=True)
    assert read_summary(tmp_path)['act_qat_iterations'] == 0


def test_other_models_are_refused(tmp_path, float_checkpoints):
    cfg = gplq_config(tmp_path, float_checkpoints['vit'])
    cfg.model = cfg.model.architecture
    cfg.optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))
    with pytest.raises(SettingError, match=r'a model of type gplq_mm\.GPLQ'):
        run(cfg)


def test_a_new_task_has_no_rows_of_its_untrained_head(float_checkpoints, tmp_path):
    pretrained = float_checkpoints['vit']
    cfg = gplq_config(tmp_path, pretrained)
    cfg.model.update(pretrained=None, backbone_from=str(pretrained), mimic=None, distill=None)
    run(cfg)
    assert set(read_summary(tmp_path)['top1']) == {'w32a4', 'latent_fp32', 'w4a4'}
    assert (tmp_path / 'calibrated.pth').exists()
