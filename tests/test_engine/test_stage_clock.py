"""Seconds and peak memory of stages."""

import subprocess
import sys
import time

import pytest

from gplq_mm.engine import stage_clock
from gplq_mm.engine.stage_clock import StageClock


def test_stages_add_up():
    clock = StageClock()
    for _ in range(2):
        with clock.stage('a'):
            time.sleep(0.02)
    with clock.stage('b'):
        pass
    assert list(clock.seconds) == ['a', 'b']
    assert clock.seconds['a'] >= 0.04 > clock.seconds['b'] >= 0
    assert clock.peak_memory_mb['a'] > 0


PEAK_PROGRAM = """
import torch
from gplq_mm.engine.stage_clock import StageClock
clock = StageClock()
with clock.stage('small'):
    pass
with clock.stage('large'):
    torch.ones(50 * 2**18)  # 50 MB
print(clock.peak_memory_mb['large'] - clock.peak_memory_mb['small'])
"""


def test_peak_sees_what_is_gone():
    # A process of its own: where the peak cannot be reset, what ran before would hide it.
    program = [sys.executable, '-c', PEAK_PROGRAM]
    answer = subprocess.run(program, capture_output=True, text=True, check=True)
    assert float(answer.stdout) > 30


def test_a_peak_that_cannot_be_reset_is_said_once(monkeypatch):
    def refuse(*args):
        raise PermissionError

    said = []
    stage_clock._warn_of_earlier_stages.cache_clear()
    monkeypatch.setattr(stage_clock.Path, 'write_text', refuse)
    monkeypatch.setattr(stage_clock.torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(stage_clock, 'print_log', lambda text, **kwargs: said.append(text))
    clock = StageClock()
    for name in ('a', 'b'):
        with clock.stage(name):
            pass
    stage_clock._warn_of_earlier_stages.cache_clear()
    assert len(said) == 1
    assert 'includes the stages before' in said[0]


def test_an_error_ends_the_stage():
    clock = StageClock()
    with pytest.raises(KeyError), clock.stage('a'):
        raise KeyError
    booked = clock.seconds['a']
    clock.flush()
    assert clock.seconds['a'] == booked


def test_state_in_the_middle_of_a_stage_is_not_counted_twice():
    clock, resumed = StageClock(), StageClock()
    start = time.monotonic()
    with clock.stage('a'):
        time.sleep(0.02)
        saved = clock.state_dict()
        assert saved['seconds']['a'] >= 0.02
        time.sleep(0.02)
    elapsed = time.monotonic() - start
    assert 0.04 <= clock.seconds['a'] <= elapsed
    resumed.load_state_dict(saved)
    with resumed.stage('a'):
        pass
    assert saved['seconds']['a'] <= resumed.seconds['a'] < clock.seconds['a']
