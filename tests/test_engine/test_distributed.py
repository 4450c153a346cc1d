"""Two processes on the CPU (gloo) compute what one computes."""

import os
import subprocess

import pytest
import torch
from tiny_ranks import assert_same_training, rank_config, torchrun
from tiny_runs import (
    ROOT,
    assert_same_weights,
    gplq_config,
    load,
    read_summary,
    run,
    weights,
)

from gplq_mm.checkpoint import CheckpointError
from gplq_mm.evaluation import Decisions


@pytest.fixture(scope='module')
def work_dirs(tmp_path_factory, float_checkpoints):
    """Work dirs of the same run with one and with two processes."""
    folder = tmp_path_factory.mktemp('distributed')
    one, two = folder / 'one', folder / 'two'
    run(rank_config(one, float_checkpoints['vit'], 1))
    process = torchrun(rank_config(two, float_checkpoints['vit'], 2), folder)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return one, two


def _pairs(work_dirs, name: str, part: str) -> dict:
    first, second = (load(path / f'{name}.pth')['state_dict'] for path in work_dirs)
    assert first.keys() == second.keys()
    pairs = {key: (first[key], second[key]) for key in first if part in key}
    assert pairs
    return pairs


@pytest.mark.parametrize('part', ['act_quantizer.scale', 'act_quantizer.offset'])
def test_calibration(work_dirs, part):
    for key, (one, two) in _pairs(work_dirs, 'calibrated', part).items():
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize('part', ['mimic_loss.mean', 'mimic_loss.components', 'num_components'])
def test_pca(work_dirs, part):
    for key, (one, two) in _pairs(work_dirs, 'calibrated', part).items():
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3, msg=key)


def test_same_images(work_dirs):
    one, two = (read_summary(path) for path in work_dirs)
    assert two['calibration'] == one['calibration']
    assert two['weight_ptq']['image_ids'] == one['weight_ptq']['image_ids']
    assert read_summary(work_dirs[1])['act_qat_iterations'] == 6


@pytest.fixture(scope='module')
def stage_2_alone(tmp_path_factory, work_dirs, float_checkpoints):
    """Work dir of one process that goes on where Stage 1 of the two has ended."""
    work_dir = tmp_path_factory.mktemp('stage_2')
    cfg = rank_config(work_dir, float_checkpoints['vit'], 1)
    cfg.load_from = str(work_dirs[1] / 'w32a4.pth')
    run(cfg, resume=True)
    return work_dir


def test_evaluation_sees_every_image_once(work_dirs, stage_2_alone):
    one, two = (read_summary(path) for path in work_dirs)
    decisions = [
        Decisions.from_csv((path / 'decisions.csv').read_text())
        for path in (*work_dirs, stage_2_alone)
    ]
    assert decisions[0].images == decisions[1].images
    for stages, expected in ((('fp32', 'ptq_w4a4'), one), (('w4a4',), read_summary(stage_2_alone))):
        for stage in stages:
            assert two['top1'][stage] == expected['top1'][stage]
            single = decisions[0] if expected is one else decisions[2]
            assert decisions[1].predictions[stage] == single.predictions[stage]
            if stage != 'fp32':
                distance = expected['feature_distance'][stage]
                assert distance['num_images'] == 50
                assert two['feature_distance'][stage] == pytest.approx(distance, rel=1e-5)


def test_stage_1(work_dirs):
    """Both ranks' batches together are the single process's batch, dropout included."""
    first, second = (weights(path, 'w32a4') for path in work_dirs)
    assert_same_training(first, second, weights(work_dirs[0], 'calibrated'))


def test_stage_2(work_dirs, stage_2_alone):
    one, two = (weights(path) for path in (stage_2_alone, work_dirs[1]))
    assert one.keys() == two.keys()
    same = total = 0
    for key, value in one.items():
        if key.endswith('weight_quantizer.codes'):
            same, total = same + int((value == two[key]).sum()), total + value.numel()
        elif 'weight_quantizer' in key or 'compensation' in key:
            torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5, msg=key)
    # A weight in the middle between two codes may go either way.
    assert same >= 0.999 * total > 10_000
    one, two = (read_summary(path) for path in (stage_2_alone, work_dirs[1]))
    score = one['weight_ptq']['compensation_r2']
    assert two['weight_ptq']['compensation_r2'] == pytest.approx(score, abs=1e-6)
    for name in ('mae', 'mse'):
        error = one['ptq_error']['with_stage1'][name]
        assert two['ptq_error']['with_stage1'][name] == pytest.approx(error, rel=1e-5)


def test_both_stages(work_dirs):
    """Stage 2 decides between near ties (codes, multipliers, ridge), so this is close only."""
    one, two = (weights(path) for path in work_dirs)
    keys = [key for key in one if key.endswith('weight_quantizer.codes')]
    same = sum(int((one[key] == two[key]).sum()) for key in keys)
    assert same > 0.9 * sum(one[key].numel() for key in keys)
    one, two = (read_summary(path) for path in work_dirs)
    assert two['top1']['w4a4'] == pytest.approx(one['top1']['w4a4'], abs=5)


def test_one_summary_and_one_set_of_files(work_dirs):
    names = [sorted(p.name for p in path.glob('*.*') if p.is_file()) for path in work_dirs]
    checkpoints = [[n for n in files if n.endswith(('.pth', '.json'))] for files in names]
    assert checkpoints[0] == checkpoints[1]
    assert (work_dirs[1] / 'last_checkpoint').read_text() == str(work_dirs[1] / 'w4a4.pth')


def test_resume_on_one_rank_what_two_began(tmp_path, work_dirs, float_checkpoints):
    """From the middle of an epoch; the batch is the same, dealt out otherwise."""
    cfg = rank_config(tmp_path, float_checkpoints['vit'], 1)
    cfg.load_from = str(work_dirs[1] / 'iter_4.pth')
    run(cfg, resume=True)
    first, second = (weights(path, 'w32a4') for path in (work_dirs[0], tmp_path))
    assert_same_training(first, second, weights(work_dirs[0], 'calibrated'))


@pytest.mark.slow
@pytest.mark.parametrize('before', [1, 2])
def test_resume_on_two_ranks(tmp_path, work_dirs, float_checkpoints, before):
    """What one rank, or two, began, from the middle of an epoch."""
    cfg = rank_config(tmp_path / 'run', float_checkpoints['vit'], 2)
    process = torchrun(cfg, tmp_path, '--resume', str(work_dirs[before - 1] / 'iter_4.pth'))
    assert process.returncode == 0, process.stderr[-3000:]
    if before == 2:
        assert_same_weights(weights(tmp_path / 'run'), weights(work_dirs[1]))
    first, second = (weights(path, 'w32a4') for path in (work_dirs[0], tmp_path / 'run'))
    assert_same_training(first, second, weights(work_dirs[0], 'calibrated'))


def test_resume_with_another_batch_says_what_to_set(tmp_path, work_dirs, float_checkpoints):
    cfg = rank_config(tmp_path, float_checkpoints['vit'], 2)
    cfg.load_from = str(work_dirs[1] / 'iter_4.pth')
    with pytest.raises(CheckpointError, match=r'--cfg-options train_dataloader\.batch_size=16,'):
        run(cfg, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize('arch', ['vit', 'swin'])
def test_first_step_of_adamw(tmp_path, float_checkpoints, arch):
    """The optimizer of the config; a later step may see a code that has flipped."""
    options = dict(train_cfg__max_iters=1)
    configs = {}
    for ranks in (1, 2):
        cfg = rank_config(tmp_path / str(ranks), float_checkpoints[arch], ranks, arch, **options)
        cfg.optim_wrapper = gplq_config(tmp_path, float_checkpoints[arch], arch).optim_wrapper
        configs[ranks] = cfg
    run(configs[1])
    process = torchrun(configs[2], tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    first, second = (weights(tmp_path / ranks, 'w32a4') for ranks in '12')
    assert_same_training(first, second, weights(tmp_path / '1', 'calibrated'))


@pytest.mark.slow
def test_failure_on_all_ranks_is_told(tmp_path, float_checkpoints):
    cfg = rank_config(tmp_path / 'run', float_checkpoints['vit'], 2)
    cfg.custom_hooks[0].num_images = 1
    process = torchrun(cfg, tmp_path)
    assert process.returncode != 0
    assert 'cannot be dealt out to 2 ranks' in process.stderr


def test_slurm(tmp_path):
    """A stand-in for srun writes down what it is called with."""
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$OUT"\n')
    srun.chmod(0o755)
    environment = dict(os.environ, PATH=f'{tmp_path}:{os.environ["PATH"]}', OUT=f'{tmp_path}/args')
    environment.update(GPUS='4', SRUN_ARGS='--mem=8G --time=60')
    script = ROOT / 'tools' / 'slurm_train.sh'
    command = ['bash', script, 'part', 'job', 'config.py', 'dir with space', '--amp', '--resume']
    subprocess.run(command, env=environment, check=True)
    arguments = (tmp_path / 'args').read_text().splitlines()
    assert arguments[:2] == ['-p', 'part']
    for wanted in ('--job-name=job', '--gres=gpu:4', '--ntasks=4', '--mem=8G', '--time=60'):
        assert wanted in arguments
    tail = ['--work-dir=dir with space', '--launcher', 'slurm', '--amp', '--resume']
    assert arguments[-6:] == ['config.py', *tail]
    refused = subprocess.run(['bash', script, 'part'], capture_output=True, text=True)
    assert refused.returncode == 2
    assert 'Usage' in refused.stderr
