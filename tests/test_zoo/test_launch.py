"""Calls of the training: nothing of their output is lost, and their end is told."""

import sys
from pathlib import Path

import pytest

from gplq_mm.zoo.launch import Line, RunFailedError, Tail, follow, shown, train_command


def python(code: str) -> list[str]:
    return [sys.executable, '-c', code]


def test_lines_are_followed_and_kept(tmp_path):
    log = tmp_path / 'new' / 'console.log'
    log.parent.mkdir()
    log.write_text('earlier\n')
    seen = []
    follow(
        python('import time; print("a", flush=True); time.sleep(0.5); print("b\\nc", end="")'),
        log,
        lambda line, seconds: seen.append((line, seconds)),
    )
    assert [line for line, _ in seen] == ['a', 'b', 'c']
    assert seen[0][1] < seen[1][1]
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
        follow(python(code), tmp_path / 'x.log', lambda *_: None)
    assert 'x.log' in str(error.value)


def test_whoever_stops_following_ends_the_run(tmp_path):
    def stop(line, _seconds):
        raise KeyboardInterrupt

    code = (
        'import pathlib, time; print("x", flush=True); time.sleep(1); '
        f'pathlib.Path({str(tmp_path / "late")!r}).touch(); time.sleep(30)'
    )
    with pytest.raises(KeyboardInterrupt):
        follow(python(code), tmp_path / 'x.log', stop)
    assert not (tmp_path / 'late').exists()


def test_a_tail_copes_with_half_a_line(tmp_path):
    log = tmp_path / 'x.log'
    log.write_text('before\n')
    with Tail(log) as tail, log.open('a') as file:
        for text, lines in (('ha', []), ('lf\nwhole\n', ['half', 'whole']), ('rest', [])):
            file.write(text)
            file.flush()
            assert tail.lines() == lines
        assert tail.lines(ended=True) == ['rest']


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
    assert Line(line).telling == message


def test_the_command_is_shown_as_it_is_typed():
    root = Path('/a/checkout')
    command = train_command(
        root / 'tools' / 'train.py', root / 'configs' / 'x.py', Path('/w'), ['a=[1, 2]'], True
    )
    assert command[0] == sys.executable
    assert shown(command, root) == (
        "python tools/train.py configs/x.py --work-dir /w --resume --cfg-options 'a=[1, 2]'"
    )
