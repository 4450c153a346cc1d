"""Flags of tools/train.py."""

import json

import pytest
from tiny_runs import fp32_config, gplq_config, load_tool


@pytest.fixture
def merged(tmp_path):
    """Config as tools/train.py would build a runner from it, for given flags."""

    def merge(*flags, cfg=None):
        tool = load_tool('train')
        path = tmp_path / 'my_config.py'
        (cfg or gplq_config(tmp_path / 'run', tmp_path / 'x.pth')).dump(path)
        args = tool.parse_args([str(path), *flags])
        return tool.merge_args(tool.Config.fromfile(args.config), args)

    return merge


def test_work_dir(merged, tmp_path):
    assert merged().work_dir == str(tmp_path / 'run')
    assert merged('--work-dir', 'elsewhere').work_dir == 'elsewhere'
    assert merged(cfg=fp32_config()).work_dir == 'work_dirs/my_config'


def test_resume(merged):
    assert not merged().get('resume', False)
    cfg = merged('--resume')
    assert (cfg.resume, cfg.load_from) == (True, None)
    cfg = merged('--resume', 'iter_4.pth')
    assert (cfg.resume, cfg.load_from) == (True, 'iter_4.pth')


def test_amp(merged):
    assert merged().optim_wrapper.type == 'OptimWrapper'
    assert merged('--amp').optim_wrapper.type == 'gplq_mm.Bf16OptimWrapper'


def test_no_validate(merged):
    cfg = merged('--no-validate')
    assert cfg.val_cfg is None
    assert cfg.val_dataloader is None
    assert cfg.val_evaluator is None


def test_loaders(merged):
    cfg = merged('--no-pin-memory', '--no-persistent-workers')
    assert cfg.train_dataloader.pin_memory is False
    assert cfg.val_dataloader.persistent_workers is False


def test_auto_scale_lr(merged):
    cfg = gplq_config('run', 'x.pth')
    cfg.auto_scale_lr = dict(base_batch_size=32, enable=False)
    assert merged('--auto-scale-lr', cfg=cfg).auto_scale_lr.enable is True


def test_auto_scale_lr_without_its_setting(merged):
    with pytest.raises(SystemExit, match='base_batch_size'):
        merged('--auto-scale-lr')


def test_cfg_options(merged):
    options = ['model.policy.rules=[]', 'optim_wrapper.optimizer.lr=3e-4', 'train_cfg.max_epochs=7']
    cfg = merged('--cfg-options', *options)
    assert cfg.optim_wrapper.optimizer.lr == 3e-4
    assert cfg.train_cfg.max_epochs == 7


def test_launcher(merged):
    assert merged('--launcher', 'slurm').launcher == 'slurm'


def test_whole_run_with_flags(tmp_path, float_checkpoints):
    path = tmp_path / 'config.py'
    cfg = gplq_config(tmp_path / 'unused', float_checkpoints['vit'], train_cfg__max_epochs=1)
    cfg.experiment_name = tmp_path.name
    cfg.dump(path)
    work_dir = tmp_path / 'used'
    flags = ['--amp', '--no-pin-memory', '--cfg-options', 'train_cfg.max_iters=2']
    load_tool('train').main([str(path), '--work-dir', str(work_dir), *flags])
    summary = json.loads((work_dir / 'summary.json').read_text())
    assert summary['act_qat_iterations'] == 2
    assert not (tmp_path / 'unused').exists()


def test_float_training(tmp_path):
    cfg = fp32_config()
    cfg.train_cfg = dict(by_epoch=True, max_epochs=1, val_interval=1)
    cfg.param_scheduler = None
    path = tmp_path / 'config.py'
    cfg.experiment_name = tmp_path.name
    cfg.dump(path)
    load_tool('train').main([str(path), '--work-dir', str(tmp_path / 'run'), '--amp'])
    assert (tmp_path / 'run' / 'epoch_1.pth').is_file()
