"""Calibration: where the grid of an activation lands."""

import pytest
import torch
import torch.multiprocessing as mp
from observer_ranks import RANK_SPECS, observe, observe_on_rank, rank_data

from gplq_mm.quant import ActSpec, build_observer, fake_quantize


def error(x, spec, scale, offset):
    x_hat = fake_quantize(x.double(), scale.double(), offset.double(), *spec.code_range)
    return (x_hat - x).square().mean()


@pytest.mark.parametrize('zero_point', ['none', 'float', 'integer'])
def test_minmax_covers_the_range_exactly(zero_point):
    x = torch.randn(200, 5) * torch.arange(1, 6) + torch.tensor([0.0, 1, -1, 9, -9])
    spec = ActSpec(observer='minmax', zero_point=zero_point)
    scale, offset = observe(spec, (5,), [x])
    low, high = x.amin(0), x.amax(0)
    if zero_point == 'none':
        torch.testing.assert_close(scale, x.abs().amax(0) / 7)
        assert not offset.any()
    elif zero_point == 'float':
        torch.testing.assert_close(offset, low)
        torch.testing.assert_close(offset + 15 * scale, high)
    else:
        torch.testing.assert_close(15 * scale, high.clamp(min=0) - low.clamp(max=0))


@pytest.mark.parametrize('shape', [(1,), (6,), (3, 1, 1), (4, 1)])
def test_each_scale_sees_its_own_slice(shape):
    x = torch.randn(2, 3, 4, 6)
    scale, _ = observe(ActSpec(observer='minmax', zero_point='none'), shape, [x])
    reach = x.abs()
    for axis, size in zip((-3, -2, -1), ((1,) * (3 - len(shape)) + shape), strict=True):
        if size == 1:
            reach = reach.amax(axis, keepdim=True)
    torch.testing.assert_close(scale.flatten(), reach.amax(0).flatten() / 7)
    assert scale.shape == shape


def test_percentile_is_the_quantile_within_a_bin():
    x = torch.randn(4000, 3) * torch.tensor([1.0, 5.0, 0.1])
    spec = ActSpec(observer='percentile', percentile=(0.02, 0.95))
    scale, offset = observe(spec, (3,), x.split(500))
    bins = 32 * 2**spec.bits
    width = (x.amax(0) - x.amin(0)) / bins
    assert ((offset - x.quantile(0.02, 0)).abs() <= 2 * width).all()
    assert ((offset + 15 * scale - x.quantile(0.95, 0)).abs() <= 2 * width).all()


@pytest.mark.parametrize('zero_point', ['none', 'float', 'integer'])
def test_mse_is_never_worse_than_minmax_and_near_the_optimum(zero_point):
    x = torch.cat((torch.randn(2000, 1), 12 * torch.rand(4, 1) + 4))
    spec = ActSpec(zero_point=zero_point)
    found = error(x, spec, *observe(spec, (1,), [x]))
    widest = error(x, spec, *observe(ActSpec(zero_point=zero_point, observer='minmax'), (1,), [x]))
    assert found < 0.8 * widest
    best = widest
    for low in torch.linspace(-5, 0, 41):
        for high in torch.linspace(1, 16, 61):
            if zero_point == 'none':
                scale, offset = high / 7, torch.zeros(())
            else:
                scale, offset = (high - low) / 15, low
                if zero_point == 'integer':
                    offset = -scale * (-low / scale).round()
            best = torch.minimum(best, error(x, spec, scale, offset))
    assert found <= 1.1 * best


@pytest.mark.parametrize('name', ['minmax', 'percentile', 'mse'])
def test_result_does_not_depend_on_the_batches(name):
    x = torch.randn(300, 4)
    spec = ActSpec(observer=name)
    whole = observe(spec, (4,), [x])
    parts = observe(spec, (4,), [x[:1], x[1:7], x[7:7], x[7:]])
    assert all(map(torch.equal, whole, parts))


@pytest.mark.parametrize('name', ['minmax', 'percentile', 'mse'])
def test_integer_zero_point_represents_zero_exactly(name):
    x = torch.randn(300, 4) + torch.tensor([0.0, 3.0, -7.0, 0.5])
    spec = ActSpec(observer=name, zero_point='integer')
    scale, offset = observe(spec, (4,), [x])
    zero_point = -offset / scale
    torch.testing.assert_close(zero_point, zero_point.round())
    assert ((zero_point >= -1e-4) & (zero_point <= 15.0001)).all()
    assert fake_quantize(torch.zeros(4), scale, offset, 0, 15).abs().max() <= 1e-6 * scale.max()


@pytest.mark.parametrize('name', ['minmax', 'percentile', 'mse'])
@pytest.mark.parametrize('zero_point', ['none', 'float', 'integer'])
@pytest.mark.parametrize('value', [0.0, 3.7, -2e4, 1e-12])
def test_constant_channels(name, zero_point, value):
    x = torch.full((50, 2), value)
    spec = ActSpec(observer=name, zero_point=zero_point)
    scale, offset = observe(spec, (2,), [x])
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    out = fake_quantize(x, scale, offset, *spec.code_range)
    # One code at the end of a symmetric grid may lie a step away.
    assert ((out - x).abs() <= 0.15 * abs(value) + 1e-7).all()


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_values_that_are_not_finite(value):
    x = torch.zeros(3, 2)
    x[1, 1] = value
    with pytest.raises(ValueError, match='NaN or an infinite'):
        observe(ActSpec(), (2,), [x])


def test_no_data():
    with pytest.raises(ValueError, match='saw no data'):
        observe(ActSpec(), (2,), [torch.zeros(0, 2)])


def test_further_passes_of_other_observers_do_not_disturb():
    observer = build_observer(ActSpec(observer='minmax'), (2,))
    observer.update(torch.tensor([[0.0, 0.0], [15.0, 30.0]]))
    observer.end_pass()
    observer.update(torch.full((1, 2), 1e6))
    assert observer.compute()[0].tolist() == [1.0, 2.0]


def test_two_processes_find_what_one_finds(tmp_path):
    mp.spawn(observe_on_rank, (str(tmp_path),), nprocs=2)
    expected = 2 * [observe(spec, (3,), [rank_data()]) for spec in RANK_SPECS]
    for rank in range(2):
        found = torch.load(tmp_path / f'{rank}.pth')
        for pair, wanted in zip(found, expected, strict=True):
            assert all(map(torch.equal, pair, wanted))
