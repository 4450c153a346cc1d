"""No image that is scored is learned from, whatever it is called and whatever wraps the sets."""

import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.dataset import BaseDataset, ConcatDataset, RepeatDataset
from mmengine.logging import MMLogger
from mmpretrain.datasets import KFoldDataset
from torch.utils.data import ConcatDataset as TorchConcat
from torch.utils.data import Subset, TensorDataset

import gplq_mm.engine.scored_images as module
from gplq_mm.datasets import SeededDataset
from gplq_mm.engine.scored_images import ScoredImages, infos_of
from gplq_mm.errors import DataError


class Listed(BaseDataset):
    """A data set of these annotations."""

    def __init__(self, infos: list[dict]):
        self.infos = infos
        super().__init__(serialize_data=False)

    def load_data_list(self) -> list[dict]:
        return self.infos


def files(*paths) -> Listed:
    return Listed([dict(img_path=str(path), gt_label=0) for path in paths])


@pytest.fixture
def photos(tmp_path):
    """Six files, all of one size and all different."""
    folder = tmp_path / 'train'
    folder.mkdir()
    for i in range(6):
        (folder / f'{i}.jpg').write_bytes(bytes([i] * 100))
    return [folder / f'{i}.jpg' for i in range(6)]


def refuse(train, *scored, indices=None) -> None:
    ScoredImages(*scored).refuse(train, 'training', indices)


def test_others_are_accepted(photos):
    refuse(files(*photos[:3]), files(*photos[3:]))
    refuse(files(*photos))


def test_the_same_path(photos):
    with pytest.raises(DataError, match=r'^2 training image\(s\) also .*2\.jpg, .*3\.jpg: a score'):
        refuse(files(*photos[:4]), files(photos[5]), files(*photos[2:4]))


def test_only_the_chosen_images_count(photos):
    train, val = files(*photos), files(photos[3])
    refuse(train, val, indices=[0, 5])
    with pytest.raises(DataError, match=r'^1 training image\(s\)'):
        refuse(train, val, indices=[0, 3])


@pytest.mark.parametrize('way', ['relative', 'dots', 'folder', 'symbolic', 'hard', 'copy'])
def test_another_name_of_the_same_photo(photos, tmp_path, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    other = tmp_path / 'val' / 'photo.jpg'
    other.parent.mkdir()
    if way == 'relative':
        other = 'train/4.jpg'
    elif way == 'dots':
        other = 'val/../train/4.jpg'
    elif way == 'folder':
        (tmp_path / 'link').symlink_to('train')
        other = 'link/4.jpg'
    elif way == 'symbolic':
        other.symlink_to(photos[4])
    elif way == 'hard':
        os.link(photos[4], other)
    else:
        shutil.copy(photos[4], other)
    for train, val in ((files(*photos), files(other)), (files(other), files(*photos))):
        with pytest.raises(DataError, match=r'^1 training image\(s\) also belong'):
            refuse(train, val)


def test_few_copies_of_many_are_logged(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(MMLogger.get_current_instance(), 'warning', logged.append)
    paths = [tmp_path / f'{i}.jpg' for i in range(300)]
    for i, path in enumerate(paths):
        path.write_bytes(i.to_bytes(2, 'big'))
    for i in range(3):
        shutil.copy(paths[i], tmp_path / f'copy{i}.jpg')
    copies = [tmp_path / f'copy{i}.jpg' for i in range(3)]
    refuse(files(*paths), files(*copies[:2]))
    (message,) = logged
    assert message.startswith('2 training image(s) also belong')
    with pytest.raises(DataError):
        refuse(files(*paths), files(*copies))
    # A path in common is no accident.
    with pytest.raises(DataError):
        refuse(files(*paths), files(paths[0]))


def test_paths_of_a_large_set_are_all_compared(photos, monkeypatch):
    monkeypatch.setattr(module, 'FILES', 2)
    for photo in photos:
        with pytest.raises(DataError):
            refuse(files(*photos), files(photo))


def seeded(dataset):
    return SeededDataset(dataset, seed=0)


WRAPPERS = {
    'seeded': seeded,
    'repeat': lambda dataset: RepeatDataset(dataset, 2),
    'concat': lambda dataset: ConcatDataset([dataset, dataset]),
    'torch concat': lambda dataset: TorchConcat([dataset, dataset]),
    'subset': lambda dataset: Subset(dataset, range(len(dataset))),
    'nested': lambda dataset: Subset(seeded(ConcatDataset([dataset, dataset])), [0, 1, 2, 3, 4]),
    'object': lambda dataset: SimpleLoader(dataset),
}


class SimpleLoader(SimpleNamespace):
    """A wrapper of somebody else."""

    def __init__(self, dataset):
        super().__init__(dataset=dataset)

    def __len__(self) -> int:
        return len(self.dataset)


@pytest.mark.parametrize('wrap', WRAPPERS.values(), ids=WRAPPERS)
def test_through_any_wrapper(photos, wrap):
    for train, val in (
        (wrap(files(*photos[:3])), files(*photos[2:])),
        (files(*photos[:3]), wrap(files(*photos[2:]))),
    ):
        with pytest.raises(DataError, match=r'2\.jpg'):
            refuse(train, val)
    refuse(wrap(files(*photos[:3])), wrap(files(*photos[3:])))


def test_a_subset_has_its_own_images_only(photos):
    whole = files(*photos)
    refuse(Subset(whole, [0, 2, 4]), Subset(whole, [1, 3, 5]))
    names = [info['img_path'] for info in infos_of(Subset(whole, [5, 1]), [1, 0])]
    assert names == [str(photos[1]), str(photos[5])]


def test_folds_of_one_set(photos):
    whole = dict(type=Listed, infos=files(*photos).infos)
    folds = [
        KFoldDataset(dict(whole), fold=1, num_splits=3, test_mode=mode, seed=0)
        for mode in (False, True)
    ]
    refuse(*folds)
    with pytest.raises(DataError):
        refuse(folds[0], files(*photos))


def test_pixels_without_a_path():
    images = [np.full((4, 4), i, np.uint8) for i in range(4)]
    train, val = (
        Listed([dict(img=image, img_id=0) for image in part]) for part in (images[:2], images[2:])
    )
    refuse(train, val)
    with pytest.raises(DataError, match='pixels'):
        refuse(train, val, Listed([dict(img=images[1])]))


def test_numbers_say_nothing():
    """The first image of one file of annotations is not that of another one."""
    refuse(Listed([dict(img_id=7)]), Listed([dict(img_id=7)]))
    plain = TensorDataset(torch.zeros(3))
    refuse(plain, plain)


def test_names_of_a_package_are_no_files(photos):
    refuse(files('mnist5k/1'), files('mnist5k/2'))
    with pytest.raises(DataError, match=r'example mnist5k/1:'):
        refuse(files('mnist5k/1'), files('mnist5k/1'))
