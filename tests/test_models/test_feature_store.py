"""The file of a feature cache: several processes, sudden death, damage."""

import copy
import multiprocessing
import os
import signal
import sqlite3

import pytest
import torch

from gplq_mm.models import FeatureStore, FeatureStoreError
from gplq_mm.models.feature_store import flatten, unflatten

NETWORK = b'network'


def row(value: float) -> dict[str, torch.Tensor]:
    return {'/t0': torch.full((3,), value), '/t1': torch.tensor([int(value)])}


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'folder' / 'features.sqlite'


@pytest.fixture
def filled(path):
    """A closed file with fifty images."""
    store = FeatureStore(path)
    number = store.network(NETWORK)
    store.put(number, {f'{i}'.encode(): {'': torch.full((3000,), float(i))} for i in range(50)})
    store.close()
    return path


def test_gives_back_what_was_put(path):
    store = FeatureStore(path)
    number = store.network(NETWORK)
    outputs = {
        '/t0': torch.randn(2, 5, dtype=torch.bfloat16),
        '/t1/l0': torch.tensor(7),
        '/t1/l1': torch.tensor([True, False]),
        '/t2': torch.empty(0, 3),
    }
    store.put(number, {b'a': outputs})
    found = store.get(number, [b'a', b'b', b'a'])
    assert found.keys() == {b'a'}
    assert found[b'a'].keys() == outputs.keys()
    for name, value in outputs.items():
        assert found[b'a'][name].dtype == value.dtype
        assert torch.equal(found[b'a'][name], value)


def test_networks_do_not_see_each_other(path):
    store = FeatureStore(path)
    one, two = store.network(b'one'), store.network(b'two')
    assert one != two
    assert store.network(b'one') == one
    store.put(one, {b'a': row(1)})
    assert store.get(two, [b'a']) == {}
    store.put(two, {b'a': row(2)})
    assert store.get(one, [b'a'])[b'a']['/t1'] == 1
    assert (store.count(one), store.count(two)) == (1, 1)


def test_the_first_value_of_an_image_stays(path):
    store = FeatureStore(path)
    number = store.network(NETWORK)
    store.put(number, {b'a': row(1)})
    store.put(number, {b'a': row(2), b'b': row(2)})
    found = store.get(number, [b'a', b'b'])
    assert [int(found[key]['/t1']) for key in (b'a', b'b')] == [1, 2]


def test_is_one_file_when_closed_and_opens_again(filled):
    assert [p.name for p in filled.parent.iterdir()] == [filled.name]
    store = FeatureStore(filled)
    number = store.network(NETWORK)
    assert store.count(number) == 50
    store.close()
    assert store.count(number) == 50


def test_a_copy_opens_the_file_for_itself(filled):
    store = FeatureStore(filled)
    number = store.network(NETWORK)
    clone = copy.deepcopy(store)
    clone.put(number, {b'new': row(1)})
    clone.close()
    assert store.get(number, [b'new'])


@pytest.mark.parametrize(
    'value',
    [
        torch.ones(2),
        (torch.ones(1),),
        [torch.ones(1), (torch.zeros(2), [torch.ones(3)])],
        {'b': torch.ones(1), 'a': (torch.zeros(1),)},
        tuple(torch.full((1,), float(i)) for i in range(12)),
    ],
)
def test_nested_outputs_come_back_as_they_were(value):
    flat = flatten(value)
    # A file keeps names in an order of its own.
    again = unflatten(dict(sorted(flat.items())))
    assert type(again) is type(value)
    assert flatten(again).keys() == flat.keys()
    for name, tensor in flatten(again).items():
        assert torch.equal(tensor, flat[name])
    assert str(again) == str({k: again[k] for k in sorted(value)} if type(value) is dict else value)


@pytest.mark.parametrize('value', [None, (), (torch.ones(1), 'text'), {'a/b': torch.ones(1)}])
def test_outputs_that_are_no_tensors_are_refused(value):
    with pytest.raises(FeatureStoreError, match='switch it off'):
        flatten(value)


# -- several processes --------------------------------------------------------------------


def _write(path, rank: int, start) -> None:
    start.wait()
    store = FeatureStore(path)
    number = store.network(NETWORK)
    for i in range(20):
        store.put(number, {f'{rank}-{i}'.encode(): row(rank)})
        assert len(store.get(number, [f'{rank}-{i}'.encode()])) == 1
    store.close()


def test_several_processes_begin_and_fill_one_file(path):
    context = multiprocessing.get_context('fork')
    start = context.Event()
    processes = [context.Process(target=_write, args=(path, rank, start)) for rank in range(3)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    store = FeatureStore(path)
    assert store.count(store.network(NETWORK)) == 60


def test_a_forked_child_uses_a_connection_of_its_own(filled):
    store = FeatureStore(filled)
    number = store.network(NETWORK)

    def child() -> None:
        store.put(number, {b'of the child': row(1)})
        os._exit(0 if len(store.get(number, [b'of the child', b'7'])) == 2 else 1)

    process = multiprocessing.get_context('fork').Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert len(store.get(number, [b'of the child', b'8'])) == 2


def _write_forever(path, told: int) -> None:
    store = FeatureStore(path)
    number = store.network(NETWORK)
    for i in range(10**6):
        batch = {f'{i}-{j}'.encode(): {'': torch.full((2000,), float(i))} for j in range(8)}
        store.put(number, batch)
        os.write(told, f'{i}\n'.encode())


def test_a_killed_writer_leaves_a_valid_file(path):
    read, write = os.pipe()
    context = multiprocessing.get_context('fork')
    process = context.Process(target=_write_forever, args=(path, write))
    process.start()
    os.close(write)
    with os.fdopen(read) as lines:
        for _ in range(20):
            told = int(lines.readline())
        process.kill()
        told = int([told, *lines.read().split()][-1])
    process.join()
    assert process.exitcode == -signal.SIGKILL
    store = FeatureStore(path)
    number = store.network(NETWORK)
    # Whole batches only, and all that were finished.
    assert store.count(number) in (8 * (told + 1), 8 * (told + 2))
    keys = [f'{i}-{j}'.encode() for i in range(told + 1) for j in range(8)]
    found = store.get(number, keys)
    assert all(float(found[key][''][0]) == int(key.split(b'-')[0]) for key in keys)
    store.put(number, {b'next': row(1)})
    store.close()
    check = sqlite3.connect(path)
    assert check.execute('PRAGMA integrity_check').fetchone() == ('ok',)
    check.close()


# -- files that are none ------------------------------------------------------------------


@pytest.mark.parametrize('content', [b'PK\x03\x04 a checkpoint', b'SQL'])
def test_a_file_of_another_kind_is_refused_and_kept(tmp_path, content):
    path = tmp_path / 'model.pth'
    path.write_bytes(content)
    with pytest.raises(FeatureStoreError, match=r'model\.pth is no feature cache; give .* path'):
        FeatureStore(path).network(NETWORK)
    assert path.read_bytes() == content


def test_a_database_of_another_program_is_refused_and_kept(tmp_path):
    path = tmp_path / 'music.db'
    other = sqlite3.connect(path)
    other.execute('CREATE TABLE songs (name TEXT)')
    other.commit()
    other.close()
    before = path.read_bytes()
    with pytest.raises(FeatureStoreError, match='of another program; give'):
        FeatureStore(path).network(NETWORK)
    assert path.read_bytes() == before


def test_another_format_is_refused(filled):
    connection = sqlite3.connect(filled)
    connection.execute('PRAGMA user_version = 99')
    connection.close()
    with pytest.raises(FeatureStoreError, match='of format 99, not 1; give'):
        FeatureStore(filled).network(NETWORK)


def test_a_truncated_file_is_told(filled):
    filled.write_bytes(filled.read_bytes()[: filled.stat().st_size // 2])
    with pytest.raises(FeatureStoreError, match=r'is damaged .*; remove it together with'):
        _read_all(filled)


def test_an_overwritten_page_is_told(filled):
    content = bytearray(filled.read_bytes())
    content[16384 : 6 * 16384] = os.urandom(5 * 16384)
    filled.write_bytes(content)
    with pytest.raises(FeatureStoreError, match=r'is damaged .*; remove it together with'):
        _read_all(filled)


def test_a_flipped_bit_inside_a_value_is_told(filled):
    content = filled.read_bytes()
    place = content.rindex(torch.full((100,), 31.0).numpy().tobytes())
    filled.write_bytes(content[:place] + b'\x01' + content[place + 1 :])
    with pytest.raises(FeatureStoreError, match=r'is damaged \(a checksum does not match\)'):
        _read_all(filled)


def _read_all(path) -> None:
    store = FeatureStore(path)
    store.get(store.network(NETWORK), [f'{i}'.encode() for i in range(50)])


def test_a_path_that_cannot_be_a_file(tmp_path):
    (tmp_path / 'plain').write_text('')
    with pytest.raises(FeatureStoreError, match=r'cannot be opened .* give it another path'):
        FeatureStore(tmp_path / 'plain' / 'features.sqlite').network(NETWORK)
    with pytest.raises(FeatureStoreError, match='give it another path'):
        FeatureStore(tmp_path).network(NETWORK)


def test_a_lock_that_is_never_released_is_told(filled, monkeypatch):
    monkeypatch.setattr('gplq_mm.models.feature_store.SECONDS_FOR_A_LOCK', 0.05)
    holder = sqlite3.connect(filled, isolation_level=None)
    holder.execute('BEGIN IMMEDIATE')
    with pytest.raises(FeatureStoreError, match='another process holds it'):
        FeatureStore(filled).network(NETWORK)
    holder.close()
