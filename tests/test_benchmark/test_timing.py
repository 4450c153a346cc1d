"""Candidates take turns."""

import time
from functools import partial

import pytest

from gplq_mm.benchmark.timing import Timing, interleave, wall_clock

SHORT = partial(wall_clock, sample_seconds=0.01)


def test_rounds_visit_every_candidate_and_start_with_another_each_time():
    calls = []
    candidates = {name: (lambda name=name: calls.append(name)) for name in 'abc'}
    clock = partial(wall_clock, sample_seconds=0)
    timings = interleave(candidates, rounds=3, clock=clock, pause=0)
    assert list(timings) == ['a', 'b', 'c']
    assert all(timing.rounds == 3 for timing in timings.values())
    # Three calls to find out how many fill a sample; a turn is two that do not count and one.
    turns = ''.join(calls)
    assert turns == ''.join(3 * name for name in 'abc' + 'abc' + 'bca' + 'cab')


def test_a_sample_is_as_many_calls_as_fill_it():
    count = 0

    def call() -> None:
        nonlocal count
        count += 1
        time.sleep(0.002)

    (timing,) = interleave({'a': call}, rounds=1, clock=SHORT, pause=0).values()
    assert 6 <= count <= 3 + 2 + 5
    assert 2 <= timing.median_ms < 10


def test_durations_are_milliseconds_per_call():
    candidates = {'short': lambda: time.sleep(0.001), 'long': lambda: time.sleep(0.02)}
    timings = interleave(candidates, rounds=3, clock=SHORT, pause=0)
    assert timings['long'].median_ms >= 20
    assert timings['short'].median_ms < timings['long'].median_ms / 2


def test_statistics():
    assert Timing.of([4.0, 1.0, 3.0, 2.0, 5.0]) == (3.0, 2.0, 4.0, 5)
    assert Timing.of([7.0]) == (7.0, 7.0, 7.0, 1)


def test_no_round_is_an_error():
    with pytest.raises(ValueError, match='at least 1'):
        interleave({'a': int}, rounds=0)


def test_progress_sees_the_rounds():
    seen = []

    def track(items):
        for item in items:
            seen.append(item)
            yield item

    interleave({'a': int}, rounds=2, clock=SHORT, pause=0, track=track)
    assert seen == [0, 1]
