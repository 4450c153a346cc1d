"""Detectors and their data must agree on the number of classes."""

import re

from mmengine.hooks import Hook
from torch import nn

from ..errors import SettingError
from .weights import unwrap

__all__ = ['ClassCountError', 'ClassCountHook', 'check_class_count']


class ClassCountError(SettingError):
    """A head predicts another number of classes than the data set has."""


def check_class_count(model: nn.Module, dataset, name: str) -> None:
    """Compares the box and mask heads of a detector with a data set's ``metainfo['classes']``.

    The RPN head tells objects from background only, and classifiers may know more classes than a
    subset of their data has; neither is compared.

    Args:
        model: Any model; nothing is compared where it has no such heads.
        dataset: Data set of mmengine, or a wrapper with its ``metainfo``.
        name: What the config calls the data set.

    Raises:
        ClassCountError: If they differ.
    """
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    if classes is None:
        return
    for path, module in model.named_modules():
        count = getattr(module, 'num_classes', None)
        is_head = re.search(r'(?:^|\.)(?:bbox|mask)_head(?:\.\d+)?$', path)
        # A mask head that knows no classes has one mask for all of them.
        if not is_head or not isinstance(count, int) or getattr(module, 'class_agnostic', False):
            continue
        if count != len(classes):
            shown = ', '.join(classes[:5]) + (', ...' if len(classes) > 5 else '')
            raise ClassCountError(
                f'{path} predicts {count} classes and the data set of {name} has {len(classes)} '
                f'({shown}): set num_classes={len(classes)} in the heads, or '
                f"{name}.dataset.metainfo=dict(classes=...) to the head's classes."
            )


class ClassCountHook(Hook):
    """Compares before anything is computed; belongs to the runner."""

    priority = 'HIGHEST'

    def before_train(self, runner) -> None:
        """Training and validation set."""
        self._check(runner, 'train')
        if runner.val_loop is not None:
            self._check(runner, 'val')

    def before_test(self, runner) -> None:
        """Test set."""
        self._check(runner, 'test')

    @staticmethod
    def _check(runner, mode: str) -> None:
        loop = getattr(runner, f'{mode}_loop')
        check_class_count(unwrap(runner.model), loop.dataloader.dataset, f'{mode}_dataloader')
