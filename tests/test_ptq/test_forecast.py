"""The estimate of the remaining time follows what steps really take."""

import pytest

from gplq_mm.ptq import forecast
from gplq_mm.ptq.forecast import Forecast


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what a test adds."""
    now = [100.0]
    monkeypatch.setattr(forecast.time, 'monotonic', lambda: now[0])
    return now


def test_right_estimates_count_down(clock):
    plan = Forecast({'forward': 30.0, 'rounding': 10.0})
    assert plan.remaining() == 40.0
    for kind, seconds in (('forward', 20.0), ('rounding', 4.0), ('forward', 10.0)):
        clock[0] += seconds
        plan.book(kind, seconds)
    assert plan.remaining() == pytest.approx(6.0)
    clock[0] += 6.0
    plan.book('rounding', 6.0)
    assert plan.remaining() == 0.0


def test_each_kind_of_work_is_corrected_on_its_own(clock):
    plan = Forecast({'forward': 100.0, 'rounding': 100.0})
    for _ in range(10):
        clock[0] += 15.0  # three times as long as estimated
        plan.book('forward', 5.0)
        clock[0] += 1.0  # a fifth
        plan.book('rounding', 5.0)
    assert plan.remaining() == pytest.approx(50 * 3 + 50 / 5, rel=0.1)


def test_one_short_step_does_not_decide(clock):
    """A first unit of a moment that took ten says little about minutes to come."""
    plan = Forecast({'forward': 100.0})
    clock[0] += 0.1
    plan.book('forward', 0.01)
    assert plan.remaining() == pytest.approx(100.0, rel=0.05)


def test_nothing_to_do_takes_no_time(clock):
    assert Forecast({'forward': 0.0}).remaining() == 0.0


def test_uneven_units(clock):
    """Ten units, the last one as long as all before it: counting would say one tenth is left."""
    plan = Forecast({'forward': 18.0})
    for _ in range(9):
        clock[0] += 2.0
        plan.book('forward', 1.0)
    assert plan.remaining() == pytest.approx(18.0, rel=0.1)
