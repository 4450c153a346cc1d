"""Every mistake gets one line that names cause and mend, and costs no earlier file."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from tiny_runs import (
    ITERATIONS_OF_EPOCH,
    Killed,
    KillHook,
    gplq_config,
    load,
    load_tool,
    run,
)

import gplq_mm.checkpoint as checkpoint_module
from gplq_mm.checkpoint import atomic_write
from gplq_mm.models import NonFiniteLossError
from gplq_mm.registry import TRANSFORMS


def message_of(name: str, *argv) -> str:
    """What the user of a tool reads when it fails."""
    with pytest.raises(SystemExit) as caught:
        load_tool(name).main([str(arg) for arg in argv])
    message = caught.value.code
    # A string as exit code: Python prints it to stderr and exits with 1.
    assert isinstance(message, str), message
    assert len(message.splitlines()) == 1, message
    return message


def write_config(cfg, folder: Path) -> Path:
    path = folder / 'config.py'
    # The runner's name must differ between runs of one second.
    cfg.experiment_name = folder.name
    cfg.dump(path)
    return path


@pytest.fixture
def cfg(tmp_path, float_checkpoints):
    return gplq_config(tmp_path / 'run', float_checkpoints['vit'])


def train_message(cfg, tmp_path, *options) -> str:
    return message_of('train', write_config(cfg, tmp_path), '--no-pin-memory', *options)


class TestCheckpoints:
    def test_missing(self, cfg, tmp_path):
        cfg.model.pretrained = str(tmp_path / 'nowhere.pth')
        message = train_message(cfg, tmp_path)
        assert 'nowhere.pth does not exist' in message

    def test_none(self, cfg, tmp_path):
        cfg.model.pretrained = None
        assert 'set model.pretrained' in train_message(cfg, tmp_path)

    @pytest.mark.parametrize('size', [0, 1000, -1000])
    def test_truncated(self, cfg, tmp_path, size):
        content = Path(cfg.model.pretrained).read_bytes()
        path = tmp_path / 'torn.pth'
        path.write_bytes(content[:size])
        cfg.model.pretrained = str(path)
        message = train_message(cfg, tmp_path)
        assert 'torn.pth' in message
        assert 'truncated' in message or 'damaged' in message
        assert 'again' in message

    def test_foreign_code(self, cfg, tmp_path):
        path = tmp_path / 'evil.pth'
        torch.save({'state_dict': {'x': torch.zeros(1)}, 'meta': Path('x')}, path)
        cfg.model.pretrained = str(path)
        assert 'foreign code' in train_message(cfg, tmp_path)

    def test_other_architecture(self, cfg, tmp_path, float_checkpoints):
        cfg.model.pretrained = str(float_checkpoints['swin'])
        message = train_message(cfg, tmp_path)
        assert 'of another architecture' in message
        assert 'Use the checkpoint that belongs to the model config' in message

    def test_other_classes(self, cfg, tmp_path):
        cfg.model.architecture.head.num_classes = 7
        message = train_message(cfg, tmp_path)
        assert 'classifies 10 classes' in message
        assert 'set num_classes of the head to 10' in message

    def test_test_of_other_architecture(self, cfg, tmp_path, undisturbed):
        path = write_config(cfg, tmp_path)
        for name in ('calibrated', 'w4a4'):
            checkpoint = undisturbed['swin'] / f'{name}.pth'
            message = message_of('test', path, checkpoint, '--work-dir', tmp_path)
            assert 'of another architecture' in message

    def test_test_of_other_policy(self, cfg, tmp_path, undisturbed):
        cfg.model.policy.preset = 'paper'
        path = write_config(cfg, tmp_path)
        checkpoint = undisturbed['vit'] / 'w4a4.pth'
        message = message_of('test', path, checkpoint, '--work-dir', tmp_path)
        assert 'another policy' in message
        assert 'use the config that made it' in message

    def test_test_of_missing_and_torn(self, cfg, tmp_path, undisturbed):
        path = write_config(cfg, tmp_path)
        message = message_of('test', path, tmp_path / 'no.pth', '--work-dir', tmp_path)
        assert 'no.pth does not exist' in message
        torn = tmp_path / 'torn.pth'
        torn.write_bytes((undisturbed['vit'] / 'w4a4.pth').read_bytes()[:-500])
        message = message_of('test', path, torn, '--work-dir', tmp_path)
        assert 'truncated' in message or 'damaged' in message

    def test_missing_config(self, tmp_path):
        assert 'nothing.py' in message_of('train', tmp_path / 'nothing.py')
        assert 'nothing.py' in message_of('test', tmp_path / 'nothing.py', 'x.pth')


class TestCalibration:
    def test_empty(self, cfg, tmp_path):
        cfg.custom_hooks[0].num_images = 0
        message = train_message(cfg, tmp_path)
        assert 'the calibration set is empty' in message
        assert 'give at least one' in message

    def test_from_validation_images(self, cfg, tmp_path):
        cfg.custom_hooks[0].dataset = cfg.val_dataloader.dataset
        message = train_message(cfg, tmp_path)
        assert 'also belong to the validation or test set' in message
        assert 'take them out of one of the two sets' in message

    def test_from_test_images(self, cfg, tmp_path):
        """The test set may be another one than the validation set."""
        test = cfg.test_dataloader.to_dict()
        test['dataset']['indices'] = list(range(7, 1000, 10))
        cfg.test_dataloader = test
        cfg.custom_hooks[0].dataset = test['dataset']
        assert 'also belong to the validation or test set' in train_message(cfg, tmp_path)

    def test_training_on_validation_images(self, cfg, tmp_path):
        cfg.train_dataloader.dataset.dataset = cfg.val_dataloader.dataset
        message = train_message(cfg, tmp_path)
        assert '100 training image(s) also belong to the validation or test set' in message

    def test_no_hook(self, cfg, tmp_path):
        cfg.custom_hooks = []
        message = train_message(cfg, tmp_path)
        assert 'calibrat' in message.lower()
        assert 'CalibrationHook' in message

    def test_uncalibrated_model_is_not_evaluated(self, cfg, tmp_path, undisturbed):
        content = load(undisturbed['vit'] / 'calibrated.pth')
        for key, value in content['state_dict'].items():
            if key.endswith('qkv.act_quantizer.state_code'):
                value.zero_()
        path = tmp_path / 'uncalibrated.pth'
        torch.save(content, path)
        message = message_of('test', write_config(cfg, tmp_path), path, '--work-dir', tmp_path)
        assert 'qkv' in message
        assert 'has no scale yet' in message
        assert 'Run the calibration' in message


class TestConfig:
    def test_pattern_that_matches_nothing(self, cfg, tmp_path):
        cfg.model.policy.rules = [dict(pattern='backbone.layers.9.*', exclude=True)]
        message = train_message(cfg, tmp_path)
        assert 'backbone.layers.9' in message

    def test_unknown_preset(self, cfg, tmp_path):
        cfg.model.policy.preset = 'nonsense'
        assert 'nonsense' in train_message(cfg, tmp_path)

    def test_sampler_that_cannot_resume(self, cfg, tmp_path):
        cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=True)
        assert 'gplq_mm.ResumableSampler' in train_message(cfg, tmp_path)

    def test_dataset_without_sample_numbers(self, cfg, tmp_path):
        cfg.train_dataloader.dataset = cfg.train_dataloader.dataset.dataset
        assert 'gplq_mm.SeededDataset' in train_message(cfg, tmp_path)

    def test_unknown_feature_layer(self, cfg, tmp_path):
        cfg.model.feature_layer = 'head.nothing'
        assert 'head.nothing' in train_message(cfg, tmp_path)

    def test_unknown_ptq_method(self, cfg, tmp_path):
        cfg.train_cfg.weight_ptq.type = 'Nonsense'
        assert 'Nonsense' in train_message(cfg, tmp_path)


class PoisonHook(Hook):
    """Puts a NaN into a weight before an iteration."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter == ITERATIONS_OF_EPOCH:
            with torch.no_grad():
                next(runner.model.architecture.backbone.parameters())[:] = float('nan')


class TestTraining:
    def test_diverged_loss_stops_and_keeps_the_checkpoint(self, cfg, tmp_path):
        run_dir = Path(cfg.work_dir)
        with pytest.raises(NonFiniteLossError, match='the last checkpoint is intact'):
            run(cfg, PoisonHook())
        assert (run_dir / 'last_checkpoint').read_text() == str(run_dir / 'iter_4.pth')
        state = load(run_dir / 'iter_4.pth')['state_dict']
        assert all(bool(v.isfinite().all()) for v in state.values() if v.is_floating_point())
        # And the run can go on from there.
        run(cfg, resume=True)
        assert (run_dir / 'summary.json').is_file()

    def test_absurd_learning_rate(self, cfg, tmp_path):
        cfg.optim_wrapper.optimizer.lr = 1e30
        message = train_message(cfg, tmp_path)
        assert 'not finite' in message
        assert 'start a new run' in message

    def test_resume_under_another_policy(self, cfg, tmp_path):
        run_dir = Path(cfg.work_dir)
        with pytest.raises(Killed):
            run(cfg, KillHook(5))
        before = {path.name: path.read_bytes() for path in run_dir.glob('*.pth')}
        cfg.model.policy.preset = 'paper'
        message = train_message(cfg, tmp_path, '--resume')
        assert 'was made under another policy' in message
        assert 'start a new run' in message
        assert {path.name: path.read_bytes() for path in run_dir.glob('*.pth')} == before

    def test_resume_from_a_torn_checkpoint(self, cfg, tmp_path):
        run_dir = Path(cfg.work_dir)
        with pytest.raises(Killed):
            run(cfg, KillHook(5))
        path = run_dir / 'iter_4.pth'
        path.write_bytes(path.read_bytes()[:5000])
        assert 'iter_4.pth' in train_message(cfg, tmp_path, '--resume')

    def test_resume_with_fewer_images(self, cfg, tmp_path):
        """Data that changed under a run: the position may not exist any more."""
        with pytest.raises(Killed):
            run(cfg, KillHook(5))
        cfg.train_dataloader.dataset.dataset.indices = list(range(0, 32))
        message = train_message(cfg, tmp_path, '--resume')
        assert 'saved amid 96 training images in batches of 16' in message
        assert 'resume with the data' in message


@TRANSFORMS.register_module()
class PoisonImage:
    """Makes one pixel of one training image infinite."""

    def __call__(self, results: dict) -> dict:
        results['img'] = results['img'].astype(np.float32)
        if results['gt_label'] == 3:
            results['img'][0, 0] = np.inf
        return results


class TestImages:
    def test_infinite_training_image(self, cfg, tmp_path):
        pipeline = cfg.train_dataloader.dataset.dataset.pipeline
        pipeline.insert(-1, dict(type='gplq_mm.PoisonImage'))
        message = train_message(cfg, tmp_path)
        assert 'image with NaN or infinite pixels: mnist5k/' in message
        assert 'Remove or repair it' in message

    def test_infinite_calibration_image(self, cfg, tmp_path):
        cfg.val_dataloader.dataset.pipeline.insert(-1, dict(type='gplq_mm.PoisonImage'))
        message = train_message(cfg, tmp_path)
        assert 'image with NaN or infinite pixels: mnist5k/' in message


class TestFullDisk:
    @pytest.fixture
    def small_disk(self, tmp_path):
        """A file system of 1 MB."""
        folder = tmp_path / 'small'
        folder.mkdir()
        mount = shutil.which('mount')
        command = [mount or 'mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', str(folder)]
        if mount is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip('mounting a small file system needs root')
        yield folder
        subprocess.run(['umount', str(folder)], check=True)

    def test_real_disk(self, small_disk):
        path = small_disk / 'x.pth'
        atomic_write(path, lambda file: torch.save(torch.zeros(1000), file))
        before = path.read_bytes()
        with pytest.raises(OSError, match=r'could not be written.*Free some disk space'):
            atomic_write(path, lambda file: torch.save(torch.zeros(10**6), file))
        assert path.read_bytes() == before
        assert [p.name for p in small_disk.iterdir()] == ['x.pth']

    def test_in_a_run(self, cfg, tmp_path, monkeypatch):
        """The disk is full from the second checkpoint of Stage 1 on."""
        run_dir = Path(cfg.work_dir)
        sync = checkpoint_module.os.fsync

        def full(descriptor):
            is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
            if is_file and list(run_dir.glob('.iter_8.pth.*')):
                raise OSError(28, 'No space left on device')
            sync(descriptor)

        monkeypatch.setattr(checkpoint_module.os, 'fsync', full)
        message = train_message(cfg, tmp_path)
        monkeypatch.undo()
        assert 'No space left on device' in message
        assert 'iter_8.pth could not be written' in message
        assert 'goes on with --resume' in message
        assert sorted(p.name for p in run_dir.glob('*.pth')) == ['calibrated.pth', 'iter_4.pth']
        assert not list(run_dir.glob('.*.pth*'))
        run(cfg, resume=True)
        assert (run_dir / 'summary.json').is_file()

    def test_result_of_a_test(self, cfg, tmp_path, undisturbed):
        out = tmp_path / 'folder_in_the_way'
        out.mkdir()
        message = message_of(
            'test',
            write_config(cfg, tmp_path),
            undisturbed['vit'] / 'w4a4.pth',
            *('--work-dir', tmp_path, '--out', out),
        )
        assert 'could not be written' in message
