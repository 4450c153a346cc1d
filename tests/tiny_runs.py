"""Whole GPLQ runs that take seconds: two small models on a few hundred digits."""

import copy
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS, init_default_scope
from mmpretrain.registry import MODELS
from torch.nn import functional as F
from yapf.yapflib import yapf_api

from gplq_mm.models import steps

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ('vit', 'swin')
ITERATIONS = 12
ITERATIONS_OF_EPOCH = 6
INTERVAL = 4
_run_number = itertools.count()


PREPROCESSOR = dict(num_classes=10, mean=[33.3], std=[78.6], to_rgb=False)
BACKBONES = dict(
    # Random numbers in training (dropout, drop path), so that a resumed run has something to get
    # wrong.
    vit=dict(
        type='VisionTransformer',
        arch=dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64),
        img_size=28,
        patch_size=7,
        in_channels=1,
        drop_rate=0.05,
    ),
    # 8 x 8 tokens in windows that the second block shifts, then 4 x 4 tokens in one window.
    swin=dict(
        type='SwinTransformer',
        arch=dict(embed_dims=16, depths=[2, 1], num_heads=[1, 2]),
        img_size=28,
        patch_size=3,
        patch_cfg=dict(kernel_size=7, padding=0),
        in_channels=1,
        window_size=4,
        out_indices=(1,),
        drop_path_rate=0.1,
    ),
)


def _model(arch: str) -> dict:
    is_vit = arch == 'vit'
    return dict(
        type='ImageClassifier',
        backbone=copy.deepcopy(BACKBONES[arch]),
        neck=None if is_vit else dict(type='GlobalAveragePooling'),
        head=dict(
            type='VisionTransformerClsHead' if is_vit else 'LinearClsHead',
            num_classes=10,
            in_channels=32,
            loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        ),
        init_cfg=dict(type='Xavier', layer='Linear', distribution='uniform'),
    )


def _shrink(cfg: Config, arch: str) -> None:
    """Makes the model and the data of a quickstart config tiny."""
    cfg.model.architecture = _model(arch)
    cfg.data_preprocessor = copy.deepcopy(PREPROCESSOR)
    cfg.train_dataloader.batch_size = 16
    # Serializing collects garbage, which takes a second each time.
    train = list(range(5, 4000, 40))[:96]
    cfg.train_dataloader.dataset.dataset.update(indices=train, serialize_data=False)
    cfg.val_dataloader.batch_size = 50
    cfg.val_dataloader.dataset.update(indices=list(range(3, 1000, 10)), serialize_data=False)
    cfg.test_dataloader = cfg.val_dataloader


def fp32_config(arch: str = 'vit') -> Config:
    """Config of the float model."""
    cfg = Config.fromfile(ROOT / f'configs/quickstart/gplq_{arch}_mnist.py')
    _shrink(cfg, arch)
    cfg.model = cfg.model.architecture
    cfg.custom_hooks = []
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=1)
    cfg.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=3e-3))
    return cfg


def gplq_config(work_dir: Path, pretrained: Path, arch: str = 'vit', **options) -> Config:
    """Config of a GPLQ run of 12 iterations, two epochs.

    Args:
        work_dir: Where the run writes.
        pretrained: Checkpoint of the float model.
        arch: ``'vit'`` or ``'swin'``.
        **options: Dotted keys with ``__`` for the dot, as in ``model__train_weights=False``.
    """
    cfg = Config.fromfile(ROOT / f'configs/quickstart/gplq_{arch}_mnist.py')
    _shrink(cfg, arch)
    cfg.work_dir = str(work_dir)
    cfg.model.pretrained = str(pretrained)
    cfg.train_cfg.update(max_epochs=2, num_diagnostic_images=50)
    cfg.train_cfg.weight_ptq.update(num_images=64, batch_size=32)
    cfg.custom_hooks[0].update(num_images=32, batch_size=16)
    cfg.custom_hooks[1].update(num_images=64, batch_size=32)
    cfg.custom_hooks[2].update(interval=5)
    cfg.default_hooks.checkpoint.interval = INTERVAL
    cfg.default_hooks.logger.interval = 1
    cfg.optim_wrapper.optimizer.lr = 1e-4
    cfg.merge_from_dict({key.replace('__', '.'): value for key, value in options.items()})
    return cfg


def direct_config(work_dir: Path, pretrained: Path, arch: str = 'vit', **options) -> Config:
    """The same run by direct QAT; arguments as in :func:`gplq_config`."""
    cfg = gplq_config(work_dir, pretrained, arch)
    cfg.model.update(direct={}, compensation=None)
    cfg.model.policy.weight = dict(layout='raw')
    cfg.train_cfg.type = 'gplq_mm.DirectQATLoop'
    cfg.train_cfg.pop('weight_ptq')
    cfg.merge_from_dict({key.replace('__', '.'): value for key, value in options.items()})
    return cfg


def probe_config(work_dir: Path, checkpoint: Path, **options) -> Config:
    """Config of a linear probe of the tiny ViT, three epochs of digits without augmentation.

    Args:
        work_dir: Where the run writes.
        checkpoint: ``w4a4.pth`` of a run of :func:`gplq_config`.
        **options: Of ``QuantBackbone``.
    """
    cfg = fp32_config('vit')
    cfg.model.backbone = dict(
        type='gplq_mm.QuantBackbone',
        backbone=cfg.model.backbone,
        checkpoint=str(checkpoint),
        compensation=dict(type='QwT'),
        frozen=True,
        **options,
    )
    cfg.model.init_cfg = None
    cfg.train_dataloader.dataset.dataset.pipeline = cfg.val_dataloader.dataset.pipeline
    cfg.train_cfg = dict(by_epoch=True, max_epochs=3, val_interval=1)
    cfg.param_scheduler = None
    cfg.work_dir = str(work_dir)
    return cfg


def train_fp32(path: Path, arch: str = 'vit', steps: int = 120) -> None:
    """Trains the float model a little and saves it."""
    cfg = fp32_config(arch)
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    model = MODELS.build({**cfg.model, 'data_preprocessor': cfg.data_preprocessor})
    model.init_weights()
    from gplq_mm.datasets.mnist5k import _digits

    images, labels = map(torch.from_numpy, _digits())
    images = (images[:, None].float() - PREPROCESSOR['mean'][0]) / PREPROCESSOR['std'][0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        loss = F.cross_entropy(model(images[batch], mode='tensor'), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, path)


def build_runner(cfg: Config, *hooks: Hook, resume: bool = False):
    """The runner of a config, with hooks of the test."""
    # Laying out the config for a reader takes longer than everything else in a tiny run.
    yapf_api.FormatCode = lambda text, **_style: (text, True)
    cfg = cfg.copy()
    cfg.resume = resume
    # Loggers and message hubs live in global tables; runs of one second would share them.
    cfg.experiment_name = f'tiny_{next(_run_number)}'
    runner = RUNNERS.build(cfg)
    for hook in hooks:
        runner.register_hook(hook, priority='LOWEST')
    return runner


def run(cfg: Config, *hooks: Hook, resume: bool = False):
    """Trains, and returns the runner."""
    runner = build_runner(cfg, *hooks, resume=resume)
    runner.train()
    return runner


def read_summary(work_dir: Path) -> dict:
    """Content of ``summary.json``."""
    return json.loads((Path(work_dir) / 'summary.json').read_text())


def scalars_of(work_dir: Path) -> list[dict]:
    """What the runs in a folder have sent to mmengine's ``LocalVisBackend``, line by line."""
    files = sorted(Path(work_dir).glob('*/vis_data/scalars.json'))
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def load(path: Path) -> dict:
    """A checkpoint, without running code from it."""
    return torch.load(path, map_location='cpu', weights_only=True)


def weights(work_dir: Path, name: str = 'w4a4') -> dict[str, torch.Tensor]:
    """Weights of a checkpoint of a run."""
    return load(Path(work_dir) / f'{name}.pth')['state_dict']


def assert_same_weights(first: dict, second: dict) -> None:
    """Bitwise equality of two state dicts."""
    assert first.keys() == second.keys()
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert not different, f'{len(different)} of {len(first)} differ, such as {different[:3]}'


def _rounded(value):
    """Floats to nine digits: float64 sums of BLAS depend on where its memory lies."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f'{value:.9g}') if isinstance(value, float) else value


def comparable(summary: dict) -> dict:
    """What of a summary must not depend on interruptions."""
    keys = ('top1', 'weight_drift', 'weight_drift_history', 'ptq_error', 'feature_distance')
    keys += ('calibration', 'weight_ptq', 'act_qat_iterations', 'policy', 'transfer', 'images')
    keys += ('difference_to_fp32',)
    return {key: _rounded(summary[key]) for key in keys}


def run_ranks(
    ranks: int, folder: Path, script: Path, *arguments: str
) -> subprocess.CompletedProcess:
    """Runs a script on the CPU in one process, or in several by torchrun.

    Args:
        ranks: Number of processes.
        folder: Working directory.
        script: The script.
        *arguments: Of the script.
    """
    command = [sys.executable]
    if ranks > 1:
        command += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']
    command += [str(script), *arguments]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    environment['PYTHONPATH'] = str(ROOT)
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=280, cwd=folder
    )


def load_tool(name: str):
    """A script of tools/ as a module."""
    yapf_api.FormatCode = lambda text, **_style: (text, True)
    spec = importlib.util.spec_from_file_location(f'tool_{name}', ROOT / 'tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Killed(BaseException):
    """Stands for kill -9: nothing in the code under test may handle it."""


def die_in_weight_ptq(patch, position: int) -> None:
    """Weight-PTQ of the runs that follow dies in a unit.

    Args:
        patch: ``pytest.MonkeyPatch``; undone, nothing dies any more.
        position: Number of the unit, from 1.
    """
    quantize_weights = steps.quantize_weights

    def dying(model, batches, forward, method, report, **options):
        def dying_report(progress):
            report(progress)
            if progress.position == position:
                raise Killed

        return quantize_weights(model, batches, forward, method, dying_report, **options)

    patch.setattr(steps, 'quantize_weights', dying)


class KillHook(Hook):
    """Ends the run at the end of an iteration, after all other hooks.

    Args:
        iteration: Finished iterations at the time of death.
    """

    def __init__(self, iteration: int):
        self.iteration = iteration

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if runner.iter + 1 == self.iteration:
            raise Killed


class KillAt(Hook):
    """Dies when the runner reaches a point that has a hook.

    Args:
        point: Name of the hook method.
        count: Dies the n-th time, from 1.
    """

    def __init__(self, point: str, count: int = 1):
        self.left = count
        setattr(self, point, self._strike)

    def _strike(self, *_args, **_kwargs) -> None:
        self.left -= 1
        if not self.left:
            raise Killed
