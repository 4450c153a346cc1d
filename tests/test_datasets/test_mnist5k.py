import numpy as np
import pytest
import torch

from gplq_mm.datasets import MNIST5k
from gplq_mm.registry import DATASETS


@pytest.fixture(scope='module')
def splits():
    return {split: MNIST5k(split=split) for split in ('train', 'val')}


def test_split_is_stratified_and_disjoint(splits):
    train, val = splits['train'], splits['val']
    assert np.bincount(train.get_gt_labels()).tolist() == [400] * 10
    assert np.bincount(val.get_gt_labels()).tolist() == [100] * 10
    ids = [d.get_data_info(i)['img_path'] for d in (train, val) for i in range(len(d))]
    assert len(set(ids)) == 5000


def test_no_digit_is_in_both_splits(splits):
    """Identifiers differ by construction; the pictures have to differ as well."""
    pictures = {
        split: {dataset[i]['img'].tobytes() for i in range(len(dataset))}
        for split, dataset in splits.items()
    }
    assert not pictures['train'] & pictures['val']


def test_split_does_not_depend_on_the_random_state(splits):
    np.random.seed(123)
    again = MNIST5k(split='train')
    for i in (0, 1999, 3999):
        first, second = splits['train'].get_data_info(i), again.get_data_info(i)
        assert first['img_path'] == second['img_path']
        assert np.array_equal(first['img'], second['img'])


def test_sample(splits):
    sample = splits['train'][5]
    assert sample['img'].shape == (28, 28)
    assert sample['img'].dtype == np.uint8
    assert sample['img'].max() > 200  # light ink ...
    assert sample['img'][0, 0] == 0  # ... on a dark background
    assert sample['sample_idx'] == 5
    assert sample['img_path'].startswith('mnist5k/')


def test_samples_are_copies(splits):
    """A transform that writes into the image must not change the digit for later epochs."""
    splits['val'][3]['img'][:] = 7
    assert not (splits['val'][3]['img'] == 7).all()


def test_mmpretrain_pipeline():
    dataset = DATASETS.build(
        dict(
            type='gplq_mm.MNIST5k',
            split='val',
            pipeline=[dict(type='Resize', scale=32), dict(type='PackInputs')],
            indices=20,
        )
    )
    assert len(dataset) == 20
    assert dataset.metainfo['classes'] == tuple('0123456789')
    packed = dataset[0]
    assert packed['inputs'].shape == (1, 32, 32)
    assert packed['inputs'].dtype == torch.uint8
    assert packed['data_samples'].gt_label.tolist() == [0]
    assert packed['data_samples'].img_path == dataset.get_data_info(0)['img_path']


def test_unknown_split():
    with pytest.raises(ValueError, match=r"'train' and 'val', got split='test'"):
        MNIST5k(split='test')
