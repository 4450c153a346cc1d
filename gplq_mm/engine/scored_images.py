"""The images that a model is scored on, found again among those that it learns from."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, cached_property

import numpy as np
from mmengine.logging import MMLogger
from torch.utils.data import Dataset

from ..errors import DataError
from .shared_datasets import shared_datasets

# Of a larger training set so many files are compared, evenly drawn; the paths of all are.
FILES = 10_000
# ImageNet's own training set has some photos of its validation set under other names.
TOLERATED = 0.01
SHOWN = 3


def infos_of(dataset: Dataset, indices: Iterable[int] | None = None) -> Iterator[Mapping]:
    """Annotations of a data set, through its wrappers; none where it has none to tell.

    Args:
        dataset: Data set.
        indices: Which of its images. Defaults to all.
    """
    indices = range(len(dataset)) if indices is None else indices
    if hasattr(dataset, 'get_data_info'):
        for index in indices:
            yield dataset.get_data_info(index)
    elif hasattr(dataset, 'datasets'):
        starts = np.cumsum([0, *map(len, dataset.datasets)])
        for index in indices:
            part = int(np.searchsorted(starts, index, 'right')) - 1
            yield from infos_of(dataset.datasets[part], [index - starts[part]])
    elif hasattr(dataset, 'dataset'):
        inner = getattr(dataset, 'indices', None)
        yield from infos_of(
            dataset.dataset, indices if inner is None else [inner[i] for i in indices]
        )


@cache
def _real_folder(folder: str) -> str:
    # Data that come with a package have names that look like paths and are none.
    return os.path.realpath(folder) if os.path.isdir(folder) else folder


def image_name(info: Mapping) -> str | None:
    """What tells an image from all others: its place, or a digest of pixels that have none.

    None where the annotation says nothing but a number, which means another image elsewhere.
    """
    path = info.get('img_path')
    if isinstance(path, str | os.PathLike):
        folder, name = os.path.split(path)
        return os.path.join(_real_folder(folder), name)
    if isinstance(info.get('img'), np.ndarray):
        return f'pixels {hashlib.sha256(np.ascontiguousarray(info["img"])).hexdigest()[:16]}'
    return None


def _digest(path: str) -> bytes:
    with open(path, 'rb') as file:
        return hashlib.sha256(file.read()).digest()


class ScoredImages:
    """Images of validation and test sets.

    Args:
        *datasets: The data sets.
    """

    def __init__(self, *datasets: Dataset):
        names = (image_name(info) for dataset in datasets for info in infos_of(dataset))
        self._names = {name for name in names if name is not None}
        self._digest = cache(_digest)

    @cached_property
    def _files(self) -> dict[tuple[int, int], str]:
        """Device and inode, which links share, to a path."""
        return {(stat.st_dev, stat.st_ino): path for path, stat in _stats(self._names)}

    @cached_property
    def _sizes(self) -> dict[int, list[str]]:
        sizes: dict[int, list[str]] = {}
        for path, stat in _stats(self._names):
            sizes.setdefault(stat.st_size, []).append(path)
        return sizes

    def refuse(self, dataset: Dataset, what: str, indices: Sequence[int] | None = None) -> None:
        """Refuses to learn from an image that is scored.

        An image is the same if its path is, if a link leads to the same file, or if a file has the
        same content. Some of the latter may happen unmeant, and are logged.

        Args:
            dataset: What is learned from.
            what: What its images do, such as ``'training'``.
            indices: Which of its images. Defaults to all.

        Raises:
            DataError: If it has scored images.
        """
        names = dict.fromkeys(map(image_name, infos_of(dataset, indices)))
        names.pop(None, None)
        same = {name: name for name in names if name in self._names}
        files = list(names)[:: max(1, -(-len(names) // FILES))]
        equal = {}
        for path, stat in _stats(files if self._names else ()):
            if path not in same:
                if twin := self._files.get((stat.st_dev, stat.st_ino)):
                    same[path] = twin
                elif twin := self._with_content(path, stat.st_size):
                    equal[path] = twin
        if not same and not equal:
            return
        message = _message(what, {**same, **equal})
        if not same and len(equal) < TOLERATED * len(files):
            MMLogger.get_current_instance().warning(message)
        else:
            raise DataError(message)

    def _with_content(self, path: str, size: int) -> str | None:
        twins = self._sizes.get(size, ())
        return next((twin for twin in twins if self._digest(twin) == self._digest(path)), None)


def _stats(paths: Iterable[str]) -> Iterator[tuple[str, os.stat_result]]:
    """Those of ``paths`` that are files of this machine."""
    for path in paths:
        with suppress(OSError):
            yield path, os.stat(path)


def _message(what: str, found: Mapping[str, str]) -> str:
    examples = [
        name if name == twin else f'{name} (there as {twin})'
        for name, twin in sorted(found.items())[:SHOWN]
    ]
    return (
        f'{len(found)} {what} image(s) also belong to the validation or test set, for example '
        f'{", ".join(examples)}: a score on these says nothing, so take them out of one of the two '
        'sets (fold and without_fold of gplq_mm.ImageNetFolder part a folder in two).'
    )


def scored_images(runner) -> ScoredImages:
    """Those of a runner's validation and test set, read once."""
    if 'scored_images' not in vars(runner):
        datasets = []
        if runner.val_loop is not None:
            datasets.append(runner.val_loop.dataloader.dataset)
        test, val = runner.cfg.get('test_dataloader'), runner.cfg.get('val_dataloader')
        if test is not None and (val is None or test['dataset'] != val['dataset']):
            # A test set whose files are not here cannot have lent images to training.
            with suppress(FileNotFoundError):
                datasets.append(shared_datasets(runner).build(test['dataset']))
        vars(runner)['scored_images'] = ScoredImages(*datasets)
    return vars(runner)['scored_images']
