"""Two processes on the CPU (gloo) compute what one computes."""

import os
import subprocess

import pytest
import torch
from tiny_runs import ROOT, gplq_config, load, read_summary, run, run_ranks


def _config(work_dir, pretrained, ranks: int):
    # Both ranks' first batches together are the first batch of a single process, and so on.
    cfg = gplq_config(work_dir, pretrained, train_cfg__max_epochs=1)
    for hook in cfg.custom_hooks[:2]:
        hook.update(num_images=32, batch_size=16 // ranks)
    cfg.train_cfg.weight_ptq.update(num_images=32, batch_size=16 // ranks)
    cfg.train_dataloader.batch_size = 16 // ranks
    cfg.val_dataloader.batch_size = cfg.test_dataloader.batch_size = 25
    # Random numbers of dropout differ from rank to rank.
    cfg.model.architecture.backbone.drop_rate = 0.0
    cfg.optim_wrapper.optimizer = dict(type='SGD', lr=1e-3)
    # LSQ's gradient scale counts the elements of a rank's batch, so that a quantizer's effective
    # rate depends on the number of ranks.
    cfg.optim_wrapper.quantizer.lr = 0.0
    cfg.env_cfg.dist_cfg.backend = 'gloo'
    return cfg


def torchrun(cfg, folder, *options) -> subprocess.CompletedProcess:
    path = folder / 'two_ranks.py'
    cfg.dump(path)
    arguments = (str(path), '--launcher', 'pytorch', *options)
    return run_ranks(2, folder, ROOT / 'tools' / 'train.py', *arguments)


@pytest.fixture(scope='module')
def work_dirs(tmp_path_factory, float_checkpoints):
    """Work dirs of the same run with one and with two processes."""
    folder = tmp_path_factory.mktemp('distributed')
    one, two = folder / 'one', folder / 'two'
    run(_config(one, float_checkpoints['vit'], 1))
    process = torchrun(_config(two, float_checkpoints['vit'], 2), folder)
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


def test_evaluation_sees_every_image_once(work_dirs):
    one, two = (read_summary(path) for path in work_dirs)
    assert two['top1'].keys() == one['top1'].keys()
    assert two['top1']['fp32'] == one['top1']['fp32']
    distances = [s['feature_distance']['ptq_w4a4']['relative_l2'] for s in (one, two)]
    assert distances[1] == pytest.approx(distances[0], rel=0.02)


def test_stage_1_averages_gradients(work_dirs):
    """Both ranks' batches together are the single process's batch."""
    assert read_summary(work_dirs[1])['act_qat_iterations'] == 6
    start = load(work_dirs[0] / 'calibrated.pth')['state_dict']
    for key, (one, two) in _pairs(work_dirs, 'w32a4', '.weight').items():
        if key.endswith(('qkv.weight', 'head.weight')):
            moved = (one - start[key]).norm()
            # Roundings at the borders of codes differ, so this is close and not equal.
            assert (two - one).norm() < 0.2 * moved, key


def test_weights_and_compensation(work_dirs):
    one, two = (read_summary(path) for path in work_dirs)
    first, second = one['weight_ptq']['compensation_r2'], two['weight_ptq']['compensation_r2']
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert second[key] == pytest.approx(value, abs=0.1)
    same = total = 0
    for one, two in _pairs(work_dirs, 'w4a4', 'weight_quantizer.codes').values():
        same, total = same + int((one == two).sum()), total + one.numel()
    assert same / total > 0.9


def test_one_summary_and_one_set_of_files(work_dirs):
    names = [sorted(p.name for p in path.glob('*.*') if p.is_file()) for path in work_dirs]
    checkpoints = [[n for n in files if n.endswith(('.pth', '.json'))] for files in names]
    assert checkpoints[0] == checkpoints[1]
    assert (work_dirs[1] / 'last_checkpoint').read_text() == str(work_dirs[1] / 'w4a4.pth')


@pytest.mark.slow
def test_resume_with_two_ranks(tmp_path, work_dirs, float_checkpoints):
    """Continues from the middle of Stage 1, with the files that one process has left."""
    cfg = _config(tmp_path / 'two', float_checkpoints['vit'], 2)
    process = torchrun(cfg, tmp_path, '--resume', str(work_dirs[1] / 'iter_4.pth'))
    assert process.returncode == 0, process.stderr[-3000:]
    one, two = (load(path / 'w4a4.pth') for path in (work_dirs[1], tmp_path / 'two'))
    for key, value in one['state_dict'].items():
        assert torch.equal(value, two['state_dict'][key]), key


@pytest.mark.slow
def test_failure_on_all_ranks_is_told(tmp_path, float_checkpoints):
    cfg = _config(tmp_path / 'run', float_checkpoints['vit'], 2)
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
