"""Folders of ImageNet photos, scored over all 1,000 classes whatever subset is present."""

import hashlib
import logging
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
from mmengine.logging import print_log
from mmpretrain.datasets import BaseDataset
from mmpretrain.datasets.categories import IMAGENET_CATEGORIES

from gplq_mm.registry import DATASETS

from ..errors import DataError, SettingError

_EXTENSIONS = ('.jpg', '.jpeg', '.png')
_WNID = re.compile(r'n\d{8}')


@lru_cache(maxsize=1)
def wnid_to_index() -> dict[str, int]:
    """Map the 1,000 WordNet ids of ImageNet-1k to their class indices 0..999."""
    # Imported on use: timm loads its whole model zoo, and only this data set needs the list.
    from timm.data import ImageNetInfo

    return {wnid: index for index, wnid in enumerate(ImageNetInfo('imagenet-1k').label_names())}


def fold_of(path: Path, count: int) -> int:
    """The fold, in ``0..count - 1``, that a photo belongs to, by its class folder and its name.

    Nothing else decides, so that a photo stays in its fold whatever is added or taken away.
    """
    name = f'{path.parent.name}/{path.name}'.encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:8], 'big') % count


def _parse_fold(text: str) -> tuple[int, int]:
    """``'INDEX/COUNT'`` as two numbers."""
    match = re.fullmatch(r'(\d+)/(\d+)', text)
    index, count = map(int, match.groups()) if match else (0, 0)
    if index >= count or count < 2:
        raise SettingError(
            f"the fold {text!r} is not of the form INDEX/COUNT: for the first of five write '0/5'."
        )
    return index, count


@DATASETS.register_module()
class ImageNetFolder(BaseDataset):
    """A folder with one subfolder per WordNet id, such as ImageNet-1k, Imagenette or a part.

    The label is the wnid's index among the 1,000 ImageNet-1k classes and not its rank among the
    folders present, so that a 1,000-way classifier is scored 1000-way on any subset.

    Args:
        fold (str, optional): Take one part of the photos only: ``'0/5'`` is the first of five of
            about the same size. A photo's part depends on its class folder and file name alone.
            Defaults to None.
        without_fold (str, optional): Take all photos but those of such a part, which a data set
            with the same ``fold`` has. Defaults to None.
        max_images (int, optional): Of these, take only so many, drawn evenly at random with
            ``seed`` and kept in order. Defaults to None, which takes all.
        seed (int): Seed of that draw. Defaults to 0.
        **kwargs: Further arguments of :class:`mmpretrain.datasets.BaseDataset`: ``data_root``, the
            folder or its parent, ``data_prefix``, the folder below it, ``pipeline``, ...

    Raises:
        FileNotFoundError: If the folder is missing, or holds no wnid folder or no image.
        DataError: If a subfolder is no ImageNet-1k wnid, or no photo is in the part.
        SettingError: If a fold is not ``INDEX/COUNT``, or ``max_images`` is not in 1..number of
            images.
    """

    METAINFO = {'classes': IMAGENET_CATEGORIES}

    def __init__(
        self,
        fold: str | None = None,
        without_fold: str | None = None,
        max_images: int | None = None,
        seed: int = 0,
        **kwargs,
    ) -> None:
        self.fold = fold
        self.without_fold = without_fold
        self.max_images = max_images
        self.seed = seed
        super().__init__(ann_file='', **kwargs)

    def load_data_list(self) -> list[dict]:
        """List the images, sorted by wnid and then by file name."""
        root = Path(self.img_prefix)
        data_list = []
        for folder in self._class_folders(root):
            label = wnid_to_index()[folder.name]
            images = sorted(p for p in folder.iterdir() if p.suffix.lower() in _EXTENSIONS)
            if not images:
                print_log(f'{folder} holds no image.', logger='current', level=logging.WARNING)
            data_list.extend(dict(img_path=str(path), gt_label=label) for path in images)
        if not data_list:
            raise FileNotFoundError(
                f'The class folders in {root} hold no {"/".join(_EXTENSIONS)} file: unpack the '
                'images into them.'
            )
        return self._limit(self._part(data_list))

    @staticmethod
    def _class_folders(root: Path) -> list[Path]:
        if not root.is_dir():
            raise FileNotFoundError(
                f'The image folder {root} does not exist: set the environment variable that the '
                'data config names (GPLQ_IMAGENETTE for Imagenette), or pass --cfg-options with '
                "each dataloader's data_root, such as val_dataloader.dataset.data_root=FOLDER."
            )
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith('.'))
        if not any(_WNID.fullmatch(folder.name) for folder in folders):
            raise FileNotFoundError(
                f'{root} has no subfolder named by a WordNet id such as n01440764: give the '
                'folder that holds the class folders, often .../train or .../val.'
            )
        unknown = [folder.name for folder in folders if folder.name not in wnid_to_index()]
        if unknown:
            names = ', '.join(unknown[:5]) + (', ...' if len(unknown) > 5 else '')
            raise DataError(
                f'{len(unknown)} subfolder(s) of {root} are no ImageNet-1k class ({names}): '
                'rename them to their WordNet id or move them away.'
            )
        return folders

    def _part(self, data_list: list[dict]) -> list[dict]:
        for name, wanted in (('fold', True), ('without_fold', False)):
            text = getattr(self, name)
            if text is None:
                continue
            index, count = _parse_fold(text)
            data_list = [
                data
                for data in data_list
                if (fold_of(Path(data['img_path']), count) == index) == wanted
            ]
            if not data_list:
                raise DataError(
                    f'no photo of {self.img_prefix} is left with {name}={text}: choose fewer '
                    'folds, or add photos.'
                )
        return data_list

    def _limit(self, data_list: list[dict]) -> list[dict]:
        if self.max_images is None:
            return data_list
        if not 1 <= self.max_images <= len(data_list):
            raise SettingError(
                f'max_images={self.max_images} is not in 1..{len(data_list)}, the number of '
                f'images in {self.img_prefix}.'
            )
        chosen = np.random.default_rng(self.seed).permutation(len(data_list))[: self.max_images]
        return [data_list[i] for i in sorted(chosen)]

    def extra_repr(self) -> list[str]:
        """Name the folder."""
        return [f'Folder: \t{self.img_prefix}']
