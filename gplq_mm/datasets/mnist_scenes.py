"""Scenes of real MNIST digits with boxes and masks, for detectors: nothing is downloaded."""

import numpy as np
from mmcv import imresize
from mmengine.dataset import BaseDataset

from gplq_mm.registry import DATASETS

from ..errors import SettingError
from .mnist5k import MNIST5k

_SPLITS = {'train': 0, 'val': 1}
# A resized pixel belongs to the digit from this grey value on.
_INK = 64
_ATTEMPTS = 20


def _cut(digit: np.ndarray) -> np.ndarray:
    """The rectangle of a digit that holds ink, uint8, shape (h, w)."""
    rows, columns = np.flatnonzero(digit.any(1)), np.flatnonzero(digit.any(0))
    return digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


@DATASETS.register_module()
class MNISTScenes(BaseDataset):
    """Grey scenes of several MNIST digits, annotated as mmdet's COCO data sets are.

    Scene ``i`` of a split depends on ``seed``, the split and ``i`` alone. Training scenes are made
    of the training digits of :class:`MNIST5k` and validation scenes of its validation digits. A
    sample has ``img`` (uint8, shape (size, size)), ``img_id``, ``img_path`` (an identifier such as
    ``'mnist_scenes/val/00012'``), ``height``, ``width``, ``ori_shape`` and ``img_shape`` as a
    loaded image has them, and ``instances``: dicts with ``bbox`` (x1, y1, x2, y2 in pixels, the
    end exclusive, tight around the mask), ``bbox_label`` (0..9), ``ignore_flag`` and ``mask``
    (COCO's compressed run lengths). No digit covers another, but their boxes may overlap.

    ``CocoMetric`` needs no annotation file: name ``'instances'`` among the ``meta_keys`` of
    ``PackDetInputs``.

    Args:
        split (str): ``'train'`` or ``'val'``.
        num_scenes (int): Number of scenes.
        size (int): Height and width in pixels, at least 32. Defaults to 96.
        max_digits (int): A scene holds 1 to this many digits. Defaults to 6.
        seed (int): Seed of the scenes, not negative. Defaults to 0.
        **kwargs: Further arguments of :class:`mmengine.dataset.BaseDataset`, such as ``pipeline``
            (an image need not be loaded) and ``indices``.

    Raises:
        SettingError: If ``split`` is unknown or a number is out of range.
    """

    METAINFO = {'classes': tuple(str(digit) for digit in range(10))}

    def __init__(
        self,
        split: str,
        num_scenes: int,
        size: int = 96,
        max_digits: int = 6,
        seed: int = 0,
        **kwargs,
    ) -> None:
        if split not in _SPLITS:
            raise SettingError(
                f"MNISTScenes has the splits 'train' and 'val', got split={split!r}."
            )
        if num_scenes < 1 or size < 32 or max_digits < 1 or seed < 0:
            raise SettingError(
                'MNISTScenes needs num_scenes >= 1, size >= 32, max_digits >= 1 and seed >= 0, '
                f'got {num_scenes}, {size}, {max_digits} and {seed}.'
            )
        self.split = split
        self.num_scenes = num_scenes
        self.size = size
        self.max_digits = max_digits
        self.seed = seed
        kwargs.setdefault('test_mode', split == 'val')
        super().__init__(ann_file='', **kwargs)

    def load_data_list(self) -> list[dict]:
        """Compose the scenes."""
        digits = MNIST5k(split=self.split, serialize_data=False)
        cuts = [
            (_cut(info['img']), info['gt_label'])
            for info in map(digits.get_data_info, range(len(digits)))
        ]
        return [self._compose(index, cuts) for index in range(self.num_scenes)]

    def _compose(self, index: int, digits: list[tuple[np.ndarray, int]]) -> dict:
        rng = np.random.default_rng([self.seed, _SPLITS[self.split], index])
        scene = np.zeros((self.size, self.size), np.uint8)
        instances = []
        for _ in range(rng.integers(1, self.max_digits + 1)):
            cut, label = digits[rng.integers(len(digits))]
            height = int(rng.integers(16, min(36, self.size) + 1))
            width = min(max(4, round(cut.shape[1] * height / cut.shape[0])), self.size)
            digit = imresize(cut, (width, height))
            for _ in range(_ATTEMPTS):
                top = int(rng.integers(self.size - height + 1))
                left = int(rng.integers(self.size - width + 1))
                place = scene[top : top + height, left : left + width]
                if not place.any():
                    place[:] = digit
                    instances.append(self._instance(digit >= _INK, top, left, label))
                    break
        return dict(
            img=scene,
            img_id=index,
            img_path=f'mnist_scenes/{self.split}/{index:05d}',
            height=self.size,
            width=self.size,
            ori_shape=(self.size, self.size),
            img_shape=(self.size, self.size),
            instances=instances,
        )

    def _instance(self, ink: np.ndarray, top: int, left: int, label: int) -> dict:
        # It comes with mmdet, which classifiers do without.
        from pycocotools import mask as coco_mask

        mask = np.zeros((self.size, self.size), np.uint8, order='F')
        mask[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        code = coco_mask.encode(mask)
        box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        return dict(
            bbox=[float(edge) for edge in box],
            bbox_label=int(label),
            ignore_flag=0,
            mask=dict(size=list(code['size']), counts=code['counts'].decode('ascii')),
        )

    def extra_repr(self) -> list[str]:
        """Name the split, since there is no file or folder to name."""
        return [f'Split: \t{self.split}']
