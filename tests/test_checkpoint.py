"""Checkpoints: read without running code, written without tearing."""

import errno
from collections import OrderedDict

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from safetensors.torch import save_file
from torch import nn

from gplq_mm.checkpoint import (
    CheckpointError,
    atomic_write,
    load_float_weights,
    read_checkpoint,
    state_dict_of,
    to_plain,
)


def test_atomic_write_makes_folders_and_replaces(tmp_path):
    path = tmp_path / 'a' / 'b.pth'
    for text in (b'one', b'two'):
        atomic_write(path, lambda file, text=text: file.write(text))
        assert path.read_bytes() == text
    assert [p.name for p in path.parent.iterdir()] == ['b.pth']


@pytest.mark.parametrize(
    ('failure', 'raised'),
    [
        (OSError(errno.ENOSPC, 'No space left on device'), OSError),
        (RuntimeError('PytorchStreamWriter failed writing file'), OSError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (TypeError('cannot pickle'), TypeError),
    ],
)
def test_a_failing_write_leaves_the_earlier_file(tmp_path, failure, raised):
    path = tmp_path / 'latest.pth'
    path.write_bytes(b'good')

    def write(file):
        file.write(b'half of it')
        raise failure

    with pytest.raises(raised) as caught:
        atomic_write(path, write)
    assert path.read_bytes() == b'good'
    assert [p.name for p in tmp_path.iterdir()] == ['latest.pth']
    if raised is OSError:
        assert 'latest.pth could not be written' in str(caught.value)
        assert 'earlier file, if any, is intact' in str(caught.value)


def test_a_full_disk_under_torch_save(tmp_path):
    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, _data):
            raise OSError(errno.ENOSPC, 'No space left on device')

        def flush(self):
            pass

    with pytest.raises(OSError, match='could not be written'):
        atomic_write(tmp_path / 'x.pth', lambda file: torch.save(torch.zeros(4), Full(file)))
    assert not list(tmp_path.iterdir())


def test_reads_what_runners_write(tmp_path):
    buffer = HistoryBuffer()
    buffer.update(1.5)
    content = {
        'state_dict': OrderedDict(w=torch.ones(2)),
        'message_hub': {'log_scalars': OrderedDict(loss=buffer)},
        'meta': {'epoch': 3, 'seed': np.float64(2.5), 'lr': [1e-3]},
    }
    torch.save(content, tmp_path / 'a.pth')
    loaded = read_checkpoint(tmp_path / 'a.pth')
    assert torch.equal(state_dict_of(loaded)['w'], torch.ones(2))
    assert loaded['meta']['epoch'] == 3
    assert loaded['message_hub']['log_scalars']['loss'].mean() == 1.5


class Method:
    def __reduce__(self):
        return (getattr, (HistoryBuffer, '__init__'))


def test_getattr_serves_histories_only(tmp_path):
    torch.save({'w': torch.zeros(1), 'x': Method()}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match='objects other than tensors'):
        read_checkpoint(tmp_path / 'a.pth')


def test_reads_safetensors(tmp_path):
    save_file({'w': torch.arange(3.0)}, tmp_path / 'a.safetensors')
    assert state_dict_of(read_checkpoint(tmp_path / 'a.safetensors'))['w'].tolist() == [0, 1, 2]
    (tmp_path / 'b.safetensors').write_bytes(b'\xff' * 50)
    with pytest.raises(CheckpointError, match=r'b\.safetensors'):
        read_checkpoint(tmp_path / 'b.safetensors')


class Command:
    def __reduce__(self):
        return (print, ('this must not run',))


@pytest.mark.parametrize('content', [b'', b'not a checkpoint', b'PK\x03\x04' + b'\0' * 40])
def test_foreign_and_empty_files(tmp_path, content):
    (tmp_path / 'x.pth').write_bytes(content)
    with pytest.raises(CheckpointError, match=r'x\.pth'):
        read_checkpoint(tmp_path / 'x.pth')


def test_missing_truncated_pickled_and_bare(tmp_path, capsys):
    with pytest.raises(CheckpointError, match=r'none\.pth does not exist'):
        read_checkpoint(tmp_path / 'none.pth')
    with pytest.raises(CheckpointError, match='does not exist'):
        read_checkpoint(tmp_path)
    path = tmp_path / 'x.pth'
    torch.save({'w': torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match='again'):
        read_checkpoint(path)
    torch.save({'w': torch.zeros(1), 'meta': Command()}, path)
    with pytest.raises(CheckpointError, match='foreign code'):
        read_checkpoint(path)
    assert 'must not run' not in capsys.readouterr().out
    torch.save(torch.zeros(3), path)
    with pytest.raises(CheckpointError, match='holds a Tensor'):
        read_checkpoint(path)


@pytest.mark.parametrize(
    'content',
    [{'state_dict': {'module.w': 1}}, {'model': {'w': 1}}, {'w': 1, 'epoch': 3}, {'module.w': 1}],
)
def test_weights_are_found_under_the_usual_keys(content):
    def tensors(value):
        if isinstance(value, dict):
            return {k: v if k == 'epoch' else tensors(v) for k, v in value.items()}
        return torch.tensor(float(value))

    assert state_dict_of(tensors(content)) == {'w': torch.tensor(1.0)}
    with pytest.raises(CheckpointError, match='no weights'):
        state_dict_of({'state_dict': {}, 'meta': 1})


def test_load_float_weights_checks_what_it_loads(tmp_path):
    source, path = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), tmp_path / 'a.pth'
    torch.save({'state_dict': source.state_dict()}, path)
    target = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    load_float_weights(target, path)
    assert all(map(torch.equal, target.parameters(), source.parameters()))
    torch.save({f'architecture.{k}': v for k, v in source.state_dict().items()}, path)
    load_float_weights(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), path)
    other = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    with pytest.raises(
        CheckpointError, match=r'3 have another shape.*\(4, 3\) instead of \(5, 3\)'
    ):
        load_float_weights(other, path)
    with pytest.raises(CheckpointError, match=r'2 parameters are missing.*2\.weight'):
        load_float_weights(nn.Sequential(*source, nn.Linear(2, 2)), path)


def test_statistics_of_batch_norm_are_weights(tmp_path):
    model, path = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)), tmp_path / 'a.pth'
    state = model.state_dict()
    del state['1.running_var']
    torch.save({'state_dict': state}, path)
    with pytest.raises(CheckpointError, match=r'1 parameters are missing.*1\.running_var'):
        load_float_weights(model, path)


def test_to_plain_can_be_read_back(tmp_path):
    content = {
        'a': np.float32(1.5),
        'b': [np.int64(2), (np.arange(3), 'x')],
        'c': OrderedDict(d=torch.ones(1)),
    }
    path = tmp_path / 'a.pth'
    torch.save(to_plain(content), path)
    loaded = torch.load(path, weights_only=True)
    assert loaded['a'] == 1.5
    assert loaded['b'][0] == 2
    assert loaded['b'][1][0].tolist() == [0, 1, 2]
    assert type(loaded['c']) is dict
