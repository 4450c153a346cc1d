"""Streaming second moment against the whole data, and over two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from gplq_mm.ptq import SecondMoment

ROOT = Path(__file__).resolve().parents[2]


def data(rows=1000, features=24, mean=30.0):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(features, features, generator=generator)
    offset = mean * torch.randn(features, generator=generator)
    return torch.randn(rows, features, generator=generator) @ mixing + offset


def assert_statistics_of(moment: SecondMoment, x: torch.Tensor) -> None:
    x = x.double().reshape(-1, x.shape[-1])
    assert moment.count == len(x)
    torch.testing.assert_close(moment.mean, x.mean(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moment.second_moment(), x.T @ x / len(x), rtol=1e-9, atol=1e-9)
    covariance = torch.atleast_2d(torch.cov(x.T, correction=0))
    # The mean is far larger than the spread: here a float32 sum is off by 1e-3.
    torch.testing.assert_close(moment.covariance(), covariance, rtol=1e-6, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any),
    st.integers(1, 20),
    st.integers(1, 300),
)
def test_any_partition_gives_the_statistics_of_the_whole(sizes, features, chunk):
    x = data(sum(sizes), features)
    moment = SecondMoment(features)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('gplq_mm.ptq.statistics.CHUNK_ELEMENTS', chunk)
        for part in x.split(sizes):
            moment.update(part)
    assert_statistics_of(moment, x)


def test_leading_dimensions_and_dtypes():
    x = torch.randint(0, 16, (2, 5, 7, 24)).float()
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64):
        moment = SecondMoment(24)
        moment.update(x.to(dtype))
        assert_statistics_of(moment, x)


@pytest.mark.parametrize('largest', [1, 15, 63, 64, 255])
@pytest.mark.parametrize('signed', [False, True])
def test_sums_of_integers_are_exact(largest, signed):
    x = torch.randint(-largest if signed else 0, largest + 1, (3000, 24)).float()
    x[:, 0] = largest
    moment, plain = SecondMoment(24, largest_integer=largest), SecondMoment(24)
    for part in x.split((1, 0, 1500, 1499)):
        moment.update(part)
        plain.update(part)
    assert torch.equal(moment.mean, x.double().mean(0))
    outer = (x.long().T @ x.long()).double()
    assert torch.equal(moment.second_moment(), outer / len(x))
    assert torch.equal(moment.covariance(), plain.covariance())


def test_sums_of_integers_may_exceed_what_float32_holds():
    rows = 2**24 // 63**2 + 2
    moment = SecondMoment(2, largest_integer=63)
    with torch.autocast('cpu', torch.bfloat16):
        moment.update(torch.tensor([[63.0, 1.0]]).expand(rows, 2))
    outer = torch.tensor([[63**2, 63], [63, 1]], dtype=torch.float64)
    assert torch.equal(moment.second_moment(), outer)


@pytest.mark.parametrize('features', range(1, 35))
def test_sums_of_integers_of_any_width(features):
    for rows in (1, 2, 7, 33):
        x = torch.randint(-15, 16, (rows, features))
        moment = SecondMoment(features, largest_integer=15)
        moment.update(x)
        assert torch.equal(moment.second_moment(), (x.T @ x).double() / rows)


def test_integers_must_be_finite():
    moment = SecondMoment(2, largest_integer=15)
    with pytest.raises(ValueError, match='non-finite'):
        moment.update(torch.tensor([[1.0, torch.nan]]))
    assert moment.count == 0


def test_mean_only_keeps_no_outer_products():
    x = data(300)
    moment = SecondMoment(24, mean_only=True)
    for part in x.split(64):
        moment.update(part)
    moment.reduce()
    assert moment.count == len(x)
    torch.testing.assert_close(moment.mean, x.double().mean(0), rtol=1e-9, atol=1e-9)
    for result in (moment.second_moment, moment.covariance):
        with pytest.raises(RuntimeError, match='mean_only'):
            result()


def test_results_are_symmetric_with_a_diagonal_that_is_not_negative():
    moment = SecondMoment(6)
    moment.update(torch.randn(50, 1).expand(50, 6) * 1e-3 + 1e4)
    constant = SecondMoment(3)
    constant.update(torch.full((77, 3), 0.1))
    for matrix in (moment.second_moment(), moment.covariance(), constant.covariance()):
        assert torch.equal(matrix, matrix.T)
        assert (matrix.diagonal() >= 0).all()


def test_autocast_does_not_lower_the_precision():
    x, moment = data(), SecondMoment(24)
    with torch.autocast('cpu', torch.bfloat16):
        moment.update(x)
    assert_statistics_of(moment, x)


def test_reading_does_not_disturb():
    x, moment = data(), SecondMoment(24)
    moment.update(x[:500])
    moment.covariance().zero_()
    moment.mean.zero_()
    moment.second_moment().zero_()
    moment.update(x[500:])
    assert_statistics_of(moment, x)


def test_reduce_of_one_process_changes_nothing_and_closes():
    x, moment = data(), SecondMoment(24)
    moment.update(x)
    moment.reduce()
    moment.reduce()
    assert_statistics_of(moment, x)
    with pytest.raises(RuntimeError, match='reduced'):
        moment.update(x)


def test_empty_statistics_are_refused():
    moment = SecondMoment(3)
    moment.update(torch.zeros(0, 3))
    for read in (moment.second_moment, moment.covariance, lambda: moment.mean):
        with pytest.raises(ValueError, match='empty'):
            read()


def test_bad_input_is_refused_and_leaves_the_statistics_alone():
    x, moment = data(), SecondMoment(24)
    moment.update(x)
    for value in (torch.nan, torch.inf, -torch.inf):
        bad = data(10)
        bad[3, 5] = value
        with pytest.raises(ValueError, match='non-finite'):
            moment.update(bad)
    both = data(10)
    both[0, 0], both[1, 0] = torch.inf, -torch.inf
    with pytest.raises(ValueError, match='non-finite'):
        moment.update(both)
    for bad in (torch.zeros(3, 5), torch.tensor(1.0)):
        with pytest.raises(ValueError, match='24 features'):
            moment.update(bad)
    assert_statistics_of(moment, x)
    with pytest.raises(ValueError, match='features'):
        SecondMoment(0)


def _reduce_in_rank(rank: int, folder: str) -> None:
    dist.init_process_group('gloo', init_method=f'file://{folder}/init', rank=rank, world_size=2)
    moment = SecondMoment(24)
    # Ranks hold different amounts.
    moment.update(data()[:300] if rank == 0 else data()[300:])
    moment.reduce()
    moment.reduce()
    torch.save((moment.count, moment.mean, moment.covariance()), f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def test_two_processes_give_the_statistics_of_one(tmp_path):
    # This file as a program: under pytest's importlib mode a spawned child cannot import it.
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    moment = SecondMoment(24)
    moment.update(data())
    first, second = (torch.load(tmp_path / f'{rank}.pt') for rank in range(2))
    assert first[0] == second[0] == 1000
    assert torch.equal(first[2], second[2])
    torch.testing.assert_close(first[1], moment.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first[2], moment.covariance(), rtol=1e-9, atol=1e-9)


if __name__ == '__main__':
    _reduce_in_rank(int(sys.argv[1]), sys.argv[2])
