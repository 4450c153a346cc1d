"""Which images calibrate."""

import pytest
import torch

import gplq_mm.engine.calibration_set as module
from gplq_mm.engine import CalibrationSet
from gplq_mm.engine.scored_images import ScoredImages
from gplq_mm.errors import DataError

TRAIN = dict(
    type='gplq_mm.MNIST5k',
    split='train',
    indices=list(range(0, 4000, 40)),
    serialize_data=False,
    pipeline=[dict(type='mmpretrain.PackInputs')],
)


def inputs(images: CalibrationSet, *args) -> torch.Tensor:
    return torch.cat([torch.stack(batch['inputs']) for batch in images.batches(*args)])


def ids(images: CalibrationSet, *args) -> list[str]:
    return [s.img_path for batch in images.batches(*args) for s in batch['data_samples']]


def test_fixed_by_the_seed():
    first, second = (CalibrationSet(TRAIN, 20, seed=3) for _ in range(2))
    assert first.describe() == second.describe()
    assert first.describe()['seed'] == 3
    assert torch.equal(inputs(first), inputs(second))
    assert first.image_ids != CalibrationSet(TRAIN, 20, seed=4).image_ids


def test_description_names_the_images_that_are_read():
    images = CalibrationSet(TRAIN, 20, batch_size=8)
    assert ids(images) == images.image_ids == images.describe()['image_ids']
    assert len(set(images.image_ids)) == images.describe()['num_images'] == 20


def test_fewer_images_are_the_first_ones():
    large, small = CalibrationSet(TRAIN, 30), CalibrationSet(TRAIN, 10)
    assert large.image_ids[:10] == small.image_ids
    assert ids(large, 10) == small.image_ids


def test_all_of_them_if_more_are_asked_for():
    assert len(CalibrationSet(TRAIN, 1000).image_ids) == 100


@pytest.mark.parametrize('count', [8, 9])
def test_ranks_share_the_images(monkeypatch, count):
    shares = []
    for rank in range(2):
        monkeypatch.setattr(module, 'rank_and_world_size', lambda rank=rank: (rank, 2))
        images = CalibrationSet(TRAIN, count)
        shares.append(ids(images))
    assert sorted(shares[0] + shares[1]) == sorted(images.image_ids)
    assert abs(len(shares[0]) - len(shares[1])) <= 1


def test_more_ranks_than_images(monkeypatch):
    monkeypatch.setattr(module, 'rank_and_world_size', lambda: (0, 4))
    with pytest.raises(DataError, match='cannot be dealt out to 4 ranks'):
        CalibrationSet(TRAIN, 3)


@pytest.mark.parametrize('count', [0, -1])
def test_empty(count):
    with pytest.raises(DataError, match='is empty'):
        CalibrationSet(TRAIN, count)


def test_scored_images():
    scored = ScoredImages(CalibrationSet(TRAIN, 1).dataset)
    with pytest.raises(DataError, match=r'20 calibration image\(s\) also belong'):
        CalibrationSet(TRAIN, 20, scored=scored)


def test_scored_images_that_are_others():
    val = CalibrationSet({**TRAIN, 'split': 'val', 'indices': [0, 1]}, 1).dataset
    assert CalibrationSet(TRAIN, 20, scored=ScoredImages(val)).image_ids


def test_config_is_not_changed():
    before = dict(TRAIN)
    CalibrationSet(TRAIN, 5)
    assert before == TRAIN
