"""TensorStore: the same list, in memory or on disk."""

import errno
import tempfile

import pytest
import torch
from mmpretrain.structures import DataSample

from gplq_mm.ptq.tensor_store import Memory, TensorStore

ITEMS = [
    torch.randn(4, 3),
    ((torch.arange(5), (8, 8)), {'mask': None, 'bias': torch.randn(2).half()}),
    {'inputs': [torch.randn(2, 2)], 'name': 'a.png'},
]


def same(a, b):
    if torch.is_tensor(a):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    return tmp_path


@pytest.mark.parametrize('budget', [0, 50, 2**20])
def test_gives_back_what_was_put_in(budget, folder):
    store = TensorStore(Memory(budget))
    for item in ITEMS:
        store.append(item)
    assert len(store) == len(ITEMS)
    assert all(map(same, store, ITEMS))
    assert same(store[2], ITEMS[2])
    assert same(list(store), list(store))
    assert bool(list(folder.rglob('*.pt'))) == (budget < 2**20)
    store.close()


def test_spends_its_memory_and_no_more(folder):
    store = TensorStore(Memory(100))
    for _ in range(4):
        store.append(torch.zeros(12))  # 48 bytes
    assert len(list(folder.rglob('*.pt'))) == 2
    store.close()


def test_close_removes_the_folder(folder):
    store = TensorStore(Memory(0))
    store.append(torch.zeros(3))
    store.close()
    assert not list(folder.iterdir())
    assert len(store) == 0


def test_nothing_is_left_behind_without_close(folder):
    store = TensorStore(Memory(0))
    store.append(torch.zeros(3))
    with pytest.warns(ResourceWarning):
        del store
    assert not list(folder.iterdir())


def test_a_full_disk_is_reported(folder, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError, match=r'No space left.*TMPDIR'):
        TensorStore(Memory(0)).append(torch.zeros(3))


def test_stores_share_their_memory_and_give_it_back(folder):
    memory = Memory(100)
    first, second = TensorStore(memory), TensorStore(memory)
    for store in (first, second):
        store.append(torch.zeros(12))  # 48 bytes
    second.append(torch.ones(12))
    assert memory.free == 4
    assert len(list(folder.rglob('*.pt'))) == 1
    first.drop(0)
    first.append(torch.full((12,), 2.0))
    assert first[0] is None
    assert torch.equal(first[1], torch.full((12,), 2.0))
    assert torch.equal(second[1], torch.ones(12))
    first.close()
    second.close()
    assert memory.free == 100
    assert not list(folder.iterdir())


@pytest.mark.parametrize('budget', [0, 100])
def test_items_are_replaced(budget, folder):
    memory = Memory(budget)
    store = TensorStore(memory)
    for value in (1.0, 2.0):
        store.append(torch.full((10,), value))
    store[0] = [torch.full((20,), 3.0)]
    assert same(list(store), [[torch.full((20,), 3.0)], torch.full((10,), 2.0)])
    store[0] = torch.zeros(1)
    assert same(store[0], torch.zeros(1))
    assert memory.free == budget - (44 if budget else 0)
    store.close()


def test_annotations_stay_in_memory(folder):
    """What the data loader adds to the images is no tensor, and no file may hold it."""
    store, sample = TensorStore(Memory(0)), DataSample(metainfo={'img_path': 'a.png'})
    store.append({'inputs': torch.ones(2), 'data_samples': [sample]})
    item = store[0]
    assert item['data_samples'][0] is sample
    assert torch.equal(item['inputs'], torch.ones(2))
    store.close()


def test_a_view_counts_as_what_it_keeps(folder):
    memory = Memory(1000)
    store = TensorStore(memory)
    store.append(torch.zeros(100)[:1])
    assert memory.free == 600
    store.close()
