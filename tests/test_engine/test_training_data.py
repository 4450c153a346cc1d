"""Where in the training data a checkpoint stands, and who may go on from there."""

import pytest
from torch.utils.data import DataLoader

import gplq_mm.engine.training_data as module
from gplq_mm.checkpoint import CheckpointError
from gplq_mm.engine.training_data import TrainingData

SAVED = TrainingData(images=96, batch=16, iterations=6).state_dict()


def data(monkeypatch, ranks: int, images: int = 96, batch: int = 16, **options) -> TrainingData:
    monkeypatch.setattr(module, 'rank_and_world_size', lambda: (0, ranks))
    own = list(range(0, images, ranks))
    loader = DataLoader(range(images), batch_size=batch, sampler=own, **options)
    return TrainingData.of(loader)


@pytest.mark.parametrize('ranks', [1, 2, 4])
def test_ranks_have_no_part_in_it(monkeypatch, ranks):
    found = data(monkeypatch, ranks, batch=16 // ranks)
    assert found.state_dict() == SAVED
    found.require_same(SAVED)


@pytest.mark.parametrize(
    ('options', 'cause', 'mend'),
    [
        (dict(ranks=2), 'in batches of 16 over', 'train_dataloader.batch_size=8,'),
        (dict(ranks=1, batch=8), r'in batches of 8 \(8 on each of 1', 'batch_size=16,'),
        (dict(ranks=3, batch=5), r'15 \(5 on each of 3', 'number of ranks that divides 16'),
        (dict(ranks=1, images=80), 'amid 96 training images .* has 80', 'with the data that'),
        (dict(ranks=2, images=97, batch=8), 'has 97', 'with the data that'),
    ],
)
def test_another_place_is_refused(monkeypatch, options, cause, mend):
    found = data(monkeypatch, **options)
    with pytest.raises(CheckpointError, match=f'{cause}.*{mend}.*new run in another work dir'):
        found.require_same(SAVED)


def test_epochs_of_another_length_are_refused(monkeypatch):
    """127 images on 8 ranks: one is repeated, so that there is a full batch of 128."""
    saved = data(monkeypatch, 8, images=127, drop_last=True)
    found = data(monkeypatch, 1, images=127, batch=128, drop_last=True)
    assert (saved.iterations, found.iterations) == (1, 0)
    with pytest.raises(CheckpointError, match='resume with drop_last, and on as many ranks'):
        found.require_same(saved.state_dict())
