"""Annotations whose masks COCO's evaluation could not read."""

from types import SimpleNamespace

import pytest

from gplq_mm.engine.data_checks import check_masks
from gplq_mm.errors import DataError

TRIANGLE = [[1, 1, 5, 1, 5, 5]]
RLE = dict(size=[4, 4], counts=[3, 4, 9])


def evaluator(*masks, metrics=('bbox', 'segm')):
    anns = {i: dict(id=i, image_id=10 + i, segmentation=m) for i, m in enumerate(masks)}
    coco = SimpleNamespace(_coco_api=SimpleNamespace(anns=anns), metrics=list(metrics))
    return SimpleNamespace(metrics=[SimpleNamespace(), coco])


@pytest.mark.parametrize('mask', [None, [], [[]], [3, 4], [[1, 1]], [[1, 1, 2, 2]], {}])
def test_is_refused(mask):
    with pytest.raises(DataError, match=r'^2 annotation.* of val have .*id 1 of image 11: remove'):
        check_masks(evaluator(TRIANGLE, mask, RLE, mask), 'val')
    assert check_masks(evaluator(mask, metrics=['bbox']), 'val') is None


def test_is_read():
    assert check_masks(evaluator(TRIANGLE, RLE, [*TRIANGLE, *TRIANGLE]), 'val') is None


def test_a_metric_without_a_file_of_annotations():
    metric = SimpleNamespace(_coco_api=None, metrics=['segm'])
    assert check_masks(SimpleNamespace(metrics=[metric]), 'val') is None
