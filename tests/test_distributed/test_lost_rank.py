"""A rank that dies or hangs ends the others soon, and they say what to do."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from fault_ranks import FAULTS, fail_on_rank
from tiny_ranks import assert_same_training, rank_config
from tiny_runs import ROOT, load, run, run_ranks, weights

import gplq_mm.distributed.lost_rank as module
from gplq_mm.distributed import LostRankError, one_of_the_ranks

ITERATIONS = 100


def long_config(work_dir, pretrained, ranks: int):
    """One epoch of 100 iterations."""
    cfg = rank_config(work_dir, pretrained, ranks)
    images = list(range(16 * ITERATIONS))
    cfg.train_dataloader.dataset.dataset.update(indices=images)
    cfg.default_hooks.checkpoint.interval = 10
    # Slowly, lest a rounding error grow into a code that flips.
    cfg.optim_wrapper.optimizer.lr = 1e-5
    cfg.optim_wrapper.quantizer.lr = 1e-4
    return cfg


def environment(**more: str) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    own = {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': str(ROOT)}
    own |= {'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}
    return {**os.environ, **own, 'PORT': port, 'MASTER_PORT': port, **more}


def descendants(process: int) -> list[int]:
    children = Path(f'/proc/{process}/task/{process}/children').read_text().split()
    return [pid for child in map(int, children) for pid in (child, *descendants(child))]


def process_of(rank: int, launcher: int) -> int:
    """The process of a rank, below its launcher."""
    for pid in descendants(launcher):
        if f'\0RANK={rank}\0'.encode() in Path(f'/proc/{pid}/environ').read_bytes():
            return pid
    raise AssertionError(f'no rank {rank} below process {launcher}')


def wait_for(text: str, log: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize('victim', [pytest.param(0, marks=pytest.mark.slow), 1])
def test_killed_rank(tmp_path, float_checkpoints, victim):
    """kill -9 amid the epoch; then one rank goes on, and ends where one rank alone ends."""
    path, log = tmp_path / 'config.py', tmp_path / 'log'
    long_config(tmp_path / 'run', float_checkpoints['vit'], 2).dump(path)
    script = ROOT / 'tools' / 'dist_train.sh'
    with log.open('w') as file:
        launcher = subprocess.Popen(
            ['bash', script, path, '2'], stdout=file, stderr=subprocess.STDOUT, env=environment()
        )
    wait_for(f'[ 25/{ITERATIONS}]', log, launcher)
    os.kill(process_of(victim, launcher.pid), signal.SIGKILL)
    start = time.monotonic()
    assert launcher.wait(timeout=60) != 0
    assert time.monotonic() - start < 60
    lines = [line for line in log.read_text().splitlines() if 'LostRankError' in line]
    assert len(lines) == 1
    assert f'rank {1 - victim} ' in lines[0]
    assert 'start again with --resume' in lines[0]
    assert 'repeat the command with --resume' in log.read_text().splitlines()[-1]

    last = Path((tmp_path / 'run' / 'last_checkpoint').read_text())
    assert 20 <= load(last)['meta']['iter'] < ITERATIONS
    run(long_config(tmp_path / 'run', float_checkpoints['vit'], 1), resume=True)
    run(long_config(tmp_path / 'undisturbed', float_checkpoints['vit'], 1))
    first, second = (weights(tmp_path / name, 'w32a4') for name in ('undisturbed', 'run'))
    assert_same_training(first, second, weights(tmp_path / 'run', 'calibrated'))


@pytest.mark.slow
def test_hanging_rank(tmp_path, float_checkpoints):
    """The others wait as long as the config says."""
    cfg = long_config(tmp_path / 'run', float_checkpoints['vit'], 2)
    cfg.env_cfg.dist_cfg.timeout = 5
    path = tmp_path / 'config.py'
    cfg.dump(path)
    common = environment(MASTER_ADDR='127.0.0.1', WORLD_SIZE='2')
    ranks, logs = [], [tmp_path / f'log{rank}' for rank in range(2)]
    command = [sys.executable, ROOT / 'tools' / 'train.py', path, '--launcher', 'pytorch']
    try:
        for rank, log in enumerate(logs):
            own = {**common, 'RANK': str(rank), 'LOCAL_RANK': str(rank)}
            with log.open('w') as file:
                ranks.append(
                    subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=own)
                )
        wait_for(f'[ 25/{ITERATIONS}]', logs[0], ranks[0])
        ranks[1].send_signal(signal.SIGSTOP)
        assert ranks[0].wait(timeout=60) == 1
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    last = logs[0].read_text().splitlines()[-1]
    assert last.startswith('LostRankError: rank 0 ended, because another rank was lost or does not')
    assert 'Timed out waiting 5000ms' in last


def test_raising_rank(tmp_path):
    """Ranks without a launcher, none of which ends its process."""
    mp.spawn(fail_on_rank, (str(tmp_path),), nprocs=2)
    for name, (_, cause) in FAULTS.items():
        told, own = ((tmp_path / f'{name}-{rank}.txt').read_text() for rank in range(2))
        assert cause in own
        assert f'LostRankError: rank 1 ended: {cause}' in told


PROGRAM = f"""
import os, runpy
from mmengine.runner import EpochBasedTrainLoop

def broken(*_args):
    raise KeyError('no such digit')

if os.environ['RANK'] == '1':
    EpochBasedTrainLoop.run_iter = broken
runpy.run_path('{ROOT}/tools/train.py', run_name='__main__')
"""


def test_raising_rank_of_a_program(tmp_path, float_checkpoints):
    """The other one waits for a gradient, and ends before its launcher ends it."""
    script, path = tmp_path / 'script.py', tmp_path / 'config.py'
    script.write_text(PROGRAM)
    rank_config(tmp_path / 'run', float_checkpoints['vit'], 2).dump(path)
    result = run_ranks(2, tmp_path, script, str(path), '--launcher', 'pytorch')
    assert result.returncode != 0
    assert "\nLostRankError: rank 1 ended: KeyError: 'no such digit'" in result.stderr
    assert result.stderr.count("KeyError: 'no such digit'") > 1


@pytest.fixture
def as_rank_3(monkeypatch):
    monkeypatch.setattr(module, 'is_distributed', lambda: True)
    monkeypatch.setattr(module, 'rank_and_world_size', lambda: (3, 4))


@pytest.mark.usefixtures('as_rank_3')
class TestErrors:
    @pytest.mark.parametrize(
        'error',
        [
            RuntimeError('[gloo/transport/tcp/pair.cc:538] Connection closed by peer [::1]:7'),
            RuntimeError('[gloo/transport/tcp/pair.cc:538] Read error [::1]:7: Connection reset'),
            dist.DistBackendError('NCCL error: ncclRemoteError: remote process exited'),
            dist.DistStoreError('Timed out after 601 seconds waiting for clients. 1/4 joined.'),
        ],
    )
    def test_of_communication(self, error):
        with (
            pytest.raises(LostRankError, match='rank 3 ended') as caught,
            one_of_the_ranks(),
        ):
            raise error
        assert str(error) in str(caught.value)

    @pytest.mark.parametrize(
        'error',
        [
            RuntimeError('a shape does not fit'),
            RuntimeError('the loader of images timed out'),
            dist.DistBackendError('NCCL error: ncclInvalidUsage: duplicate GPU'),
            ConnectionResetError('connection reset'),
        ],
    )
    def test_of_anything_else(self, error):
        with pytest.raises(type(error), match=str(error)), one_of_the_ranks():
            raise error

    def test_ended_by_the_launcher(self):
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit, match='rank 3 was ended from outside'), one_of_the_ranks():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == before


def test_alone(tmp_path):
    """A program on its own dies of SIGTERM as ever, and so do its forks."""
    script = tmp_path / 'script.py'
    script.write_text(
        'import os, signal\n'
        'from gplq_mm.distributed import one_of_the_ranks\n'
        'with one_of_the_ranks():\n'
        '    child = os.fork()\n'
        '    os.kill(os.getpid(), signal.SIGTERM) if child == 0 else None\n'
        '    print(os.waitpid(child, 0)[1], flush=True)\n'
        '    os.kill(os.getpid(), signal.SIGTERM)\n'
    )
    result = subprocess.run(
        [sys.executable, script], env=environment(), capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (-signal.SIGTERM, f'{int(signal.SIGTERM)}\n')
