"""Progress of long steps in a log, where there is no terminal."""

import time
from io import StringIO

import pytest
from rich.console import Console

import gplq_mm.progress as progress
from gplq_mm.ptq import Progress


@pytest.fixture
def lines(monkeypatch):
    """Log lines, with a clock that advances four seconds an item."""
    found = []
    now = iter(range(0, 10_000, 4))

    class Logger:
        def info(self, text):
            found.append(text)

    monkeypatch.setattr(progress.MMLogger, 'get_current_instance', Logger)
    monkeypatch.setattr(progress.time, 'monotonic', lambda: next(now))
    return found


def test_lines_name_step_count_and_remaining_time(lines):
    assert list(progress.track(iter('abcdefghij'), 10, 'calibration')) == list('abcdefghij')
    assert lines[0] == 'calibration: 3/10, 12 s elapsed, 28 s remaining'
    assert lines[-1] == 'calibration: 10/10, 40 s elapsed, 0 s remaining'
    assert len(lines) == 4


def test_items_come_one_at_a_time(lines):
    """Nothing is read ahead: the items may be whole batches."""
    asked = []

    def source():
        for index in range(5):
            asked.append(index)
            yield index

    for item in progress.track(source(), 5, 'x'):
        assert asked[-1] == item


def test_other_ranks_are_silent(lines, monkeypatch):
    monkeypatch.setattr(progress, 'is_main_process', lambda: False)
    assert list(progress.track(range(10), 10, 'x')) == list(range(10))
    assert lines == []


def test_nothing_to_do(lines):
    assert list(progress.track([], 0, 'x')) == []


def stage2(position, elapsed, remaining):
    names = ['', 'backbone.layers.0', 'backbone.layers.1', 'head']
    return Progress(names[position], position, 3, elapsed, remaining)


STEPS = [
    stage2(0, 1.0, 99.0),
    stage2(1, 5.0, 45.0),
    stage2(1, 12.0, 36.0),
    stage2(2, 20.0, 20.0),
    stage2(2, 30.0, 10.0),
    stage2(3, 40.0, 0.0),
]


def test_weight_ptq_in_a_log(lines, monkeypatch):
    monkeypatch.setattr(progress, 'Console', lambda **_: Console(file=StringIO()))
    with progress.show_weight_ptq() as report:
        for step in STEPS:
            report(step)
    assert lines == [
        'Weight-PTQ: 1%, 0/3 units, 1 s elapsed, 99 s remaining',
        'Weight-PTQ: 25%, 1/3 backbone.layers.0, 12 s elapsed, 36 s remaining',
        'Weight-PTQ: 75%, 2/3 backbone.layers.1, 30 s elapsed, 10 s remaining',
        'Weight-PTQ: done, 3 units in 40 s',
    ]


def test_weight_ptq_in_a_terminal(lines, monkeypatch):
    """One bar whose length is time, over all units."""
    stream = StringIO()
    terminal = Console(file=stream, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(progress, 'Console', lambda **_: terminal)
    shown = []
    with progress.show_weight_ptq() as report:
        # The images are read first, with a bar of their own.
        assert stream.getvalue() == ''
        for step in (*STEPS, stage2(3, 4000.0, 3725.0)):
            report(step)
            stream.truncate(0)
            time.sleep(0.3)  # it is drawn ten times a second
            shown.append(stream.getvalue())
    for text, expected in zip(
        shown,
        [
            ('0/3 units', '1%', '0:00:01, 0:01:39 remaining'),
            ('1/3 backbone.layers.0', '10%', '0:00:05, 0:00:45 remaining'),
            ('1/3 backbone.layers.0', '25%', '0:00:12, 0:00:36 remaining'),
            ('2/3 backbone.layers.1', '50%', '0:00:20, 0:00:20 remaining'),
            ('2/3 backbone.layers.1', '75%', '0:00:30, 0:00:10 remaining'),
            ('3/3 head', '100%', '0:00:40, 0:00:00 remaining'),
            ('3/3 head', '52%', '1:06:40, 1:02:05 remaining'),
        ],
        strict=True,
    ):
        assert all(part in text for part in ('Weight-PTQ', *expected)), text
    assert lines == []


def fail():
    with progress.show_weight_ptq() as report:
        report(STEPS[0])
        raise RuntimeError('inside')


def test_an_error_ends_the_bar(monkeypatch):
    terminal = Console(file=StringIO(), force_terminal=True)
    monkeypatch.setattr(progress, 'Console', lambda **_: terminal)
    for _ in range(2):
        # A console that still showed the first bar would refuse the second.
        with pytest.raises(RuntimeError, match='inside'):
            fail()


def test_an_error_in_a_log_is_not_the_end_of_the_work(lines, monkeypatch):
    monkeypatch.setattr(progress, 'Console', lambda **_: Console(file=StringIO()))
    with pytest.raises(RuntimeError, match='inside'):
        fail()
    assert lines == ['Weight-PTQ: 1%, 0/3 units, 1 s elapsed, 99 s remaining']


def test_other_ranks_are_silent_in_weight_ptq(lines, monkeypatch):
    monkeypatch.setattr(progress, 'is_main_process', lambda: False)
    with progress.show_weight_ptq() as report:
        report(STEPS[-1])
    assert lines == []
