"""Calls of the training: nothing of their output is lost, and their end is told."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gplq_mm.engine.launch import RunFailedError, follow, shown, telling, train_command


def python(code: str) -> list[str]:
    return [sys.executable, '-c', code]


def test_lines_are_followed_and_kept(tmp_path):
    log = tmp_path / 'console.log'
    log.write_text('earlier\n')
    seen = []
    follow(
        python('import time; print("a", flush=True); time.sleep(0.5); print("b\\nc", end="")'),
        log,
        lambda line: seen.append((line, time.monotonic())),
    )
    assert [line for line, _ in seen] == ['a', 'b', 'c']
    assert seen[1][1] - seen[0][1] > 0.3, 'lines come when all is over'
    assert log.read_text() == 'earlier\na\nb\nc'


@pytest.mark.parametrize(
    ('code', 'message'),
    [
        ('print("first"); raise SystemExit("ValueError: because")', 'failed: ValueError: because'),
        ('import os; os.kill(os.getpid(), 9)', 'was ended by signal 9'),
    ],
)
def test_a_failure_is_told_with_its_last_line(tmp_path, code, message):
    with pytest.raises(RunFailedError, match=message) as error:
        follow(python(code), tmp_path / 'new' / 'x.log', lambda _: None)
    assert 'x.log' in str(error.value)


LATE = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'


def has_ended(process: int) -> bool:
    """Whether a process ends within some seconds; a zombie has ended."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            status = Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if status == 'Z':
            return True
        time.sleep(0.05)
    return False


def test_whoever_stops_following_ends_the_run(tmp_path):
    seen = []

    def stop(line: str) -> None:
        seen.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow(python(LATE), tmp_path / 'x.log', stop)
    assert has_ended(seen[0])


def test_a_run_does_not_outlive_a_starter_that_was_killed(tmp_path):
    log = tmp_path / 'x.log'
    starter = (
        'import sys; from pathlib import Path; from gplq_mm.engine.launch import follow; '
        f'follow([sys.executable, "-c", {LATE!r}], Path({str(log)!r}), lambda line: None)'
    )
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(python(starter), cwd=root) as process:
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().endswith('\n')):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    assert has_ended(int(log.read_text()))


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        (
            '2026/11/28 02:54:13 - mmengine - INFO - Epoch(train)  [1][60/63]  base_lr: 5e-06 '
            'lr: 5e-06  eta: 0:00:22  time: 0.1  data_time: 0.01  loss: 0.0606  loss_pca: 1.3',
            'Epoch(train)  [1][60/63]  eta: 0:00:22  loss: 0.0606',
        ),
        ('2026/11/28 02:54:13 - mmengine - INFO - evaluation of w4a4', 'evaluation of w4a4'),
        ('2026/11/28 02:54:13 - mmengine - INFO - GPU 0: none', None),
        ('ValueError: x', None),
    ],
)
def test_telling_lines(line, message):
    assert telling(line) == message


def test_the_command_is_shown_as_it_is_typed():
    root = Path('/a/checkout')
    command = train_command(root, root / 'configs' / 'x.py', Path('/w'), ['a=[1, 2]'], True)
    assert command[0] == sys.executable
    assert shown(command, root) == (
        "python tools/train.py configs/x.py --work-dir /w --resume --cfg-options 'a=[1, 2]'"
    )
