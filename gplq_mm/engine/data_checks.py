"""What model and data must agree on, found out before hours of training."""

import re

from mmengine.hooks import Hook
from torch import nn

from ..errors import DataError, SettingError
from .scored_images import scored_images
from .weights import unwrap


class DataCheckHook(Hook):
    """Checks images, classes and masks before anything is computed; belongs to the runner."""

    priority = 'HIGHEST'

    def before_train(self, runner) -> None:
        """Training and validation set."""
        dataset = runner.train_loop.dataloader.dataset
        check_class_count(unwrap(runner.model), dataset, 'train_dataloader')
        if runner.val_loop is not None:
            self._check(runner, runner.val_loop, 'val')
        scored_images(runner).refuse(dataset, 'training')

    def before_test(self, runner) -> None:
        """Test set."""
        self._check(runner, runner.test_loop, 'test')

    @staticmethod
    def _check(runner, loop, mode: str) -> None:
        check_class_count(unwrap(runner.model), loop.dataloader.dataset, f'{mode}_dataloader')
        check_masks(loop.evaluator, f'{mode}_evaluator')


def check_class_count(model: nn.Module, dataset, name: str) -> None:
    """Compares the box and mask heads of a detector with a data set's ``metainfo['classes']``.

    The RPN head tells objects from background only, and classifiers may know more classes than a
    subset of their data has; neither is compared.

    Args:
        model: Any model; nothing is compared where it has no such heads.
        dataset: Data set of mmengine, or a wrapper with its ``metainfo``.
        name: What the config calls the data set.

    Raises:
        SettingError: If they differ.
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
            raise SettingError(
                f'{path} predicts {count} classes and the data set of {name} has {len(classes)} '
                f'({shown}): set num_classes={len(classes)} in the heads, or '
                f"{name}.dataset.metainfo=dict(classes=...) to the head's classes."
            )


def check_masks(evaluator, name: str) -> None:
    """Looks at the annotations of metrics that measure masks.

    pycocotools takes a polygon of two points for a box and fails on it. In training mmdet passes
    such masks over.

    Args:
        evaluator: Evaluator of mmengine.
        name: What the config calls it.

    Raises:
        DataError: For an annotation with no mask, or one of fewer than three points.
    """
    for metric in evaluator.metrics:
        coco = getattr(metric, '_coco_api', None)
        if coco is None or 'segm' not in getattr(metric, 'metrics', ()):
            continue
        bad = [number for number, item in coco.anns.items() if not _is_mask(item)]
        if bad:
            raise DataError(
                f'{len(bad)} annotation(s) in the file of {name} have no mask of three points or '
                f'more, for example id {bad[0]} of image {coco.anns[bad[0]]["image_id"]}: remove '
                "or repair them, or measure boxes only (metric='bbox')."
            )


def _is_mask(item: dict) -> bool:
    mask = item.get('segmentation')
    if isinstance(mask, list):
        return bool(mask) and isinstance(mask[0], list) and len(mask[0]) >= 5
    return bool(mask)
