"""Sums of errors over batches."""

import math

import pytest
import torch

from gplq_mm.evaluation.error_sums import ErrorSums, decibels


def test_batches_of_different_sizes_are_one_sample():
    exact, value = torch.randn(7, 3), torch.randn(7, 3)
    whole, parts = ErrorSums(), ErrorSums()
    whole.add(value, exact)
    for rows in (slice(0, 1), slice(1, 3), slice(3, 7)):
        parts.add(value[rows], exact[rows])
    first, second = whole.reduce(), parts.reduce()
    assert first == pytest.approx(second)
    difference = (value - exact).double()
    assert first['mae'] == pytest.approx(difference.abs().mean().item())
    assert first['mse'] == pytest.approx(difference.square().mean().item())
    ratio = exact.double().square().sum() / difference.square().sum()
    assert first['sqnr_db'] == pytest.approx(10 * math.log10(ratio))
    assert first['relative_l2'] == pytest.approx(ratio.item() ** -0.5)


def test_no_error_and_no_signal_have_no_ratio():
    equal, empty = ErrorSums(), ErrorSums()
    equal.add(torch.ones(3), torch.ones(3))
    assert equal.reduce() == {'mae': 0, 'mse': 0, 'sqnr_db': None, 'relative_l2': 0}
    assert empty.reduce() == {'mae': 0, 'mse': 0, 'sqnr_db': None, 'relative_l2': None}
    assert decibels(100.0, 1.0) == pytest.approx(20)
