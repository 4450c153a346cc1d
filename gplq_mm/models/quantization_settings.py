"""The settings of :func:`gplq_mm.quantize_`: completed from the base config and checked."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from ..distributed import rank_and_world_size
from ..errors import DataError, SettingError
from ..layers import build_compensation
from ..ptq import build_weight_ptq
from .training_losses import check_count
from .weight_tuning import tuning_settings

MIMICRY = ('mimic', 'distill', 'block_mimic', 'task_weight', 'feature_layer', 'teacher_dtype')
TRAINING = ('saved_bytes', 'gradient_checkpointing', 'train_weights')
TRAIN_KEYS = (
    'loader',
    'epochs',
    'max_iters',
    'optim_wrapper',
    'loss',
    'weight_tuning',
    *MIMICRY,
    *TRAINING,
)
AGAIN = 'give a loader that can be read again, as torch.utils.data.DataLoader'


@cache
def _base() -> Config:
    """The base config of all runs, which holds the defaults."""
    package = Path(__file__).resolve().parents[1]
    places = (package / '.mim', package.parent)
    path = next(p / 'configs/_base_/gplq.py' for p in places if (p / 'configs').is_dir())
    return Config.fromfile(path)


def default(name: str) -> Any:
    """A copy of a setting of ``configs/_base_/gplq.py``, such as ``'gplq_policy'``."""
    value = copy.deepcopy(_base()[name])
    return value.to_dict() if hasattr(value, 'to_dict') else value


def images_of(kind: str) -> int:
    """How many images a hook of the configs sees, such as ``'CalibrationHook'``."""
    hooks = default('gplq_hooks')
    return next(hook['num_images'] for hook in hooks if hook['type'] == f'gplq_mm.{kind}')


def _named(setting: Any, name: str) -> dict:
    """A setting with a ``type``, of which the name alone will do."""
    if isinstance(setting, str):
        return {'type': setting}
    if not isinstance(setting, Mapping):
        raise SettingError(f'{name}={setting!r} must be a name or dict(type=..., ...).')
    return dict(setting)


def _check_loader(loader: Any, name: str) -> None:
    if isinstance(loader, (torch.Tensor, str, Mapping)) or not isinstance(loader, Iterable):
        raise SettingError(
            f'{name} must be a loader of images, as of torch.utils.data.DataLoader, or a list of '
            f'batches; it is a {type(loader).__name__}. Of one batch make a list: [batch].'
        )
    if hasattr(loader, '__len__') and not len(loader):
        raise DataError(f'{name} yields no images: its length is 0; give at least one batch.')


def weight_ptq_of(setting: Mapping | str | None) -> tuple[Callable, int]:
    """The PTQ method, and how many images it sees.

    Raises:
        SettingError: For what is none.
    """
    ptq = default('gplq_train_cfg')['weight_ptq']
    # Of the images that a run reads itself; here they come in the loader's batches.
    ptq.pop('batch_size')
    ptq.update(_named(setting or {}, 'weight_ptq'))
    images = ptq.pop('num_images')
    check_count(images, 'weight_ptq.num_images')
    return build_weight_ptq(ptq), images


def compensation_of(setting: Mapping | str | None) -> dict | None:
    """Config of the compensation, or None.

    Raises:
        SettingError: For what is none.
    """
    if setting is None:
        return None
    cfg = default('gplq_compensation') if setting == 'default' else _named(setting, 'compensation')
    build_compensation(cfg, axis=-1)
    return cfg


def calibration_of(setting: Any, train: dict | None) -> tuple[Iterable, int]:
    """The loader of calibration images, and how many the activations are calibrated on.

    Args:
        setting: A loader, or ``dict(loader=..., num_images=...)``, or None for that of ``train``.
        train: Of :func:`train_of`, or None.

    Raises:
        SettingError: For what is none, or has to train afterwards and cannot.
        DataError: For a loader that is empty.
    """
    images = images_of('CalibrationHook')
    if isinstance(setting, Mapping):
        unknown = set(setting) - {'loader', 'num_images'}
        if unknown or 'loader' not in setting:
            raise SettingError(
                'calibration must be a loader, or have a loader and may have num_images; it has '
                f'{sorted(setting)}.'
            )
        images, setting = setting.get('num_images', images), setting['loader']
    check_count(images, 'calibration.num_images')
    training = None if train is None else train['loader']
    loader = training if setting is None else setting
    _check_loader(loader, 'calibration')
    if loader is training and isinstance(training, Iterator):
        raise SettingError(
            'train.loader yields its batches once, and calibration would take the first ones; '
            f'{AGAIN}, or one of its own as calibration.'
        )
    return loader, images


def train_of(setting: Any) -> dict:
    """``train`` of the call, completed.

    Raises:
        SettingError: For a setting that is unknown or cannot be used, as a loader that ends after
            the first of several epochs.
        DataError: For a loader that is empty.
    """
    found = sorted(setting) if isinstance(setting, Mapping) else type(setting).__name__
    if 'loader' not in found or not set(found) <= set(TRAIN_KEYS):
        raise SettingError(
            f'train must be dict(loader=...) and may have {", ".join(TRAIN_KEYS[1:])}; it is or '
            f'has {found}.'
        )
    _check_loader(setting['loader'], 'train.loader')
    if rank_and_world_size()[1] > 1:
        raise SettingError(
            'quantize_(train=...) trains in one process; for several use tools/train.py.'
        )
    train = {
        'epochs': default('gplq_train_cfg')['max_epochs'],
        'max_iters': None,
        'loss': None,
        'mimic': default('gplq_mimic'),
        **setting,
    }
    check_count(train['epochs'], 'train.epochs')
    if train['max_iters'] is not None:
        check_count(train['max_iters'], 'train.max_iters')
    elif train['epochs'] > 1 and isinstance(train['loader'], Iterator):
        raise SettingError(
            f'train.loader yields its batches once, not {train["epochs"]} times; {AGAIN}.'
        )
    wrapper = default('gplq_optim_wrapper')
    for key, value in train.get('optim_wrapper', {}).items():
        merges = isinstance(value, Mapping) and isinstance(wrapper.get(key), Mapping)
        wrapper[key] = {**wrapper[key], **value} if merges else value
    tuning = tuning_settings(train.get('weight_tuning'))
    if tuning is not None and isinstance(train['loader'], Iterator) and train['max_iters'] is None:
        raise SettingError(
            'train.loader yields its batches once, and weight_tuning goes on where Stage 1 has '
            f'ended; {AGAIN}, or set max_iters.'
        )
    return {**train, 'optim_wrapper': wrapper, 'weight_tuning': tuning}


def batches_of(loader: Iterable, epochs: int | None, whole: bool) -> Iterator[tuple[str, Any]]:
    """Batches of all epochs of training, each with the words that name it.

    Args:
        loader: As often as there are epochs.
        epochs: How many; None for no end.
        whole: Whether no epoch may be shorter than the first.

    Raises:
        DataError: For an epoch without a batch, or one that is too short.
    """
    first = 0
    for epoch in count(1) if epochs is None else range(1, epochs + 1):
        number = 0
        for number, batch in enumerate(loader, start=1):
            yield f'batch {number} of epoch {epoch} of train.loader', batch
        if not number or (whole and number < first):
            than = f', and {first} in the first' if first else ''
            raise DataError(
                f'train.loader yields {number} batches in epoch {epoch}{than}; {AGAIN}.'
            )
        first = first or number
