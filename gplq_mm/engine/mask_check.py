"""Masks that COCO's evaluation cannot read, found before hours of training."""

from mmengine.hooks import Hook

from ..errors import DataError

__all__ = ['MaskCheckHook', 'MaskError']


class MaskError(DataError):
    """An annotation whose mask has no three points."""


def check_masks(evaluator, name: str) -> None:
    """Looks at the annotations of metrics that measure masks.

    pycocotools takes a polygon of two points for a box and fails on it. In training mmdet passes
    such masks over.

    Args:
        evaluator: Evaluator of mmengine.
        name: What the config calls it.

    Raises:
        MaskError: For an annotation with no mask, or one of fewer than three points.
    """
    for metric in evaluator.metrics:
        coco = getattr(metric, '_coco_api', None)
        if coco is None or 'segm' not in getattr(metric, 'metrics', ()):
            continue
        bad = [number for number, item in coco.anns.items() if not _is_mask(item)]
        if bad:
            raise MaskError(
                f'{len(bad)} annotation(s) in the file of {name} have no mask of three points or '
                f'more, for example id {bad[0]} of image {coco.anns[bad[0]]["image_id"]}: remove '
                "or repair them, or measure boxes only (metric='bbox')."
            )


def _is_mask(item: dict) -> bool:
    mask = item.get('segmentation')
    if isinstance(mask, list):
        return bool(mask) and isinstance(mask[0], list) and len(mask[0]) >= 5
    return bool(mask)


class MaskCheckHook(Hook):
    """Checks before anything is computed; belongs to the runner."""

    priority = 'HIGHEST'

    def before_train(self, runner) -> None:
        """Masks of the validation set."""
        if runner.val_loop is not None:
            check_masks(runner.val_loop.evaluator, 'val_evaluator')

    def before_test(self, runner) -> None:
        """Masks of the test set."""
        check_masks(runner.test_loop.evaluator, 'test_evaluator')
