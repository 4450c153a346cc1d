"""Progress of long steps in a log, where there is no terminal."""

import pytest

import gplq_mm.engine.progress as progress


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
