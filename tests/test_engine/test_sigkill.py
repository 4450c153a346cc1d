"""kill -9 of a real process, then --resume. test_resume.py dies at many more points, faster."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import (
    INTERVAL,
    ROOT,
    assert_same_weights,
    comparable,
    gplq_config,
    read_summary,
    weights,
)

# A small file is written in less time than this test takes to see it.
SLOW_WRITES = """
import os, runpy, sys, time
fsync = os.fsync
os.fsync = lambda file: (time.sleep(0.5), fsync(file))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def command(config: Path, *options: str) -> list[str]:
    return [sys.executable, str(ROOT / 'tools' / 'train.py'), str(config), *options]


def environment() -> dict[str, str]:
    # One computation kernel for the processes here and the run they are compared with.
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'TERM': 'dumb'}


def kill_when(config: Path, log: Path, condition) -> None:
    """Starts a run and kills it as soon as ``condition(text of the log)`` holds."""
    python, *arguments = command(config)
    with log.open('w') as file:
        process = subprocess.Popen(
            [python, '-c', SLOW_WRITES, *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(),
        )
    deadline = time.monotonic() + 240
    try:
        while not condition(log.read_text()):
            assert process.poll() is None, f'ended too early:\n{log.read_text()[-3000:]}'
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.fixture(scope='module')
def reference(tmp_path_factory, float_checkpoints):
    """The undisturbed run, by the same command as the others."""
    folder = tmp_path_factory.mktemp('reference')
    config = folder / 'config.py'
    gplq_config(folder / 'run', float_checkpoints['vit']).dump(config)
    subprocess.run(command(config), env=environment(), check=True, capture_output=True)
    return folder / 'run'


MOMENTS = {
    'calibration': lambda work_dir, text: 'calibration 1/' in text or 'PCA' in text,
    'between checkpoints': lambda work_dir, text: f'[{INTERVAL + 1}/6]' in text,
    'while a checkpoint is written': lambda work_dir, text: list(work_dir.glob('.iter_4.pth.*')),
    'after a checkpoint': lambda work_dir, text: (work_dir / 'iter_8.pth').exists(),
    'Weight-PTQ': lambda work_dir, text: 'w32a4.pth' in text,
    'before the summary': lambda work_dir, text: (work_dir / 'w4a4.pth').exists(),
}
FAST = ('between checkpoints',)


@pytest.mark.parametrize(
    'moment', [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in MOMENTS]
)
def test_kill_9(tmp_path, float_checkpoints, reference, moment):
    work_dir = tmp_path / 'run'
    config = tmp_path / 'config.py'
    gplq_config(work_dir, float_checkpoints['vit']).dump(config)
    kill_when(config, tmp_path / 'log', lambda text: MOMENTS[moment](work_dir, text))
    assert not (work_dir / 'summary.json').exists()
    # What a write that was cut off leaves behind.
    (work_dir / '.iter_4.pth.torn').write_bytes(b'PK\x03\x04 torn')
    subprocess.run(command(config, '--resume'), env=environment(), check=True, capture_output=True)
    assert_same_weights(weights(work_dir), weights(reference))
    assert comparable(read_summary(work_dir)) == comparable(read_summary(reference))
