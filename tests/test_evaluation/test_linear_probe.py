"""The linear probe finds what is linearly readable, alike on one rank and on several."""

import pytest
import torch
import torch.multiprocessing as mp
from probe_ranks import probe_data, probe_on_rank

from gplq_mm.evaluation import linear_probe


def test_separable_classes_are_read_and_noise_is_not():
    train, val = probe_data()
    result = linear_probe(train, val)
    assert result == {'top1': 100.0, 'num_train': 91, 'num_val': 45}
    shuffled = (train[0], train[1][torch.randperm(91)])
    assert linear_probe(shuffled, val)['top1'] < 70


def test_scale_and_place_of_features_do_not_matter():
    """They are standardised: one of a thousandth of the size counts as much."""
    train, val = probe_data(noise=0.6)
    factor = torch.tensor([1e-3, 1e3, 1.0, 7.0])
    moved = [(features * factor + 100 * factor, labels) for features, labels in (train, val)]
    assert linear_probe(*moved) == linear_probe(train, val)
    assert 40 < linear_probe(train, val)['top1'] < 100


def test_same_result_every_time():
    data = probe_data(noise=0.6)
    assert linear_probe(*data) == linear_probe(*data)


def test_labels_that_training_has_not_count_as_wrong():
    train, (features, labels) = probe_data()
    labels[:9] = 44
    assert linear_probe(train, (features, labels))['top1'] == pytest.approx(80.0)


def test_bad_input():
    train, val = probe_data()
    with pytest.raises(ValueError, match='two classes at least'):
        linear_probe((train[0], torch.zeros_like(train[1])), val)
    val[0][3, 1] = float('nan')
    with pytest.raises(ValueError, match='not finite'):
        linear_probe(train, val)


def test_two_processes_find_what_one_finds(tmp_path):
    mp.spawn(probe_on_rank, (str(tmp_path),), nprocs=2)
    train, val = probe_data(noise=0.6)
    for rank in range(2):
        rows, result = torch.load(tmp_path / f'{rank}.pth')
        assert torch.equal(rows, train[0])
        assert result == linear_probe(train, val)
