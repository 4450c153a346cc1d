"""TensorStore: the same list, in memory or on disk."""

import errno
import tempfile

import pytest
import torch

from gplq_mm.ptq.tensor_store import TensorStore

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
    store = TensorStore(budget)
    for item in ITEMS:
        store.append(item)
    assert len(store) == len(ITEMS)
    assert all(map(same, store, ITEMS))
    assert same(store[2], ITEMS[2])
    assert same(list(store), list(store))
    assert bool(list(folder.rglob('*.pt'))) == (budget < 2**20)
    store.close()


def test_spends_its_memory_and_no_more(folder):
    store = TensorStore(100)
    for _ in range(4):
        store.append(torch.zeros(12))  # 48 bytes
    assert len(list(folder.rglob('*.pt'))) == 2
    store.close()


def test_close_removes_the_folder(folder):
    store = TensorStore(0)
    store.append(torch.zeros(3))
    store.close()
    assert not list(folder.iterdir())
    assert len(store) == 0


def test_nothing_is_left_behind_without_close(folder):
    store = TensorStore(0)
    store.append(torch.zeros(3))
    with pytest.warns(ResourceWarning):
        del store
    assert not list(folder.iterdir())


def test_a_full_disk_is_reported(folder, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError, match=r'No space left.*TMPDIR'):
        TensorStore(0).append(torch.zeros(3))
