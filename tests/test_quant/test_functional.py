"""The only rounding code: codes, grid, straight-through gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gplq_mm.quant import (
    dequantize,
    dequantize_log_sqrt2,
    fake_quantize,
    fake_quantize_log_sqrt2,
    quantize,
    quantize_log_sqrt2,
)

RANGES = [(0, 15), (-8, 7), (0, 255), (-128, 127), (0, 3), (-2, 1)]
ranges = st.sampled_from(RANGES)
seeds = st.integers(0, 2**16)
scales = st.floats(1e-3, 1e3)
offsets = st.floats(-20.0, 20.0)  # in steps


def reference(x, scale, offset, qmin, qmax):
    """LSQ+ written out: autograd sees identity rounding, and the clamp."""
    steps = ((x - offset) / scale).clamp(qmin, qmax)
    codes = steps + (steps.round() - steps).detach()
    return codes * scale + offset


def sample(seed, scale=1.0, offset=0.0, limits=(0, 15), count=64):
    """float64 values up to four steps beyond both ends of the grid."""
    generator = torch.Generator().manual_seed(seed)
    low, high = limits
    steps = low - 4 + (high - low + 8) * torch.rand(count, generator=generator, dtype=torch.float64)
    return steps * scale + offset * scale


@settings(deadline=None, max_examples=60)
@given(seeds, scales, offsets, ranges)
def test_codes_are_integers_in_range(seed, scale, offset, limits):
    x = sample(seed, scale, offset, limits).float()
    codes = quantize(x, torch.tensor(scale), torch.tensor(offset * scale), *limits)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= limits[0]
    assert codes.max() <= limits[1]
    assert codes.unique().numel() > 1


@settings(deadline=None, max_examples=60)
@given(seeds, scales, offsets, ranges)
def test_dequantized_codes_have_themselves_as_codes(seed, scale, offset, limits):
    scale, offset = torch.tensor(scale), torch.tensor(offset * scale)
    codes = quantize(sample(seed, 1.0, 0.0, limits).float(), torch.tensor(1.0), None, *limits)
    assert torch.equal(quantize(dequantize(codes, scale, offset), scale, offset, *limits), codes)


@settings(deadline=None, max_examples=60)
@given(seeds, scales, offsets, ranges)
def test_fake_quantize_is_idempotent(seed, scale, offset, limits):
    x = sample(seed, scale, offset, limits).float()
    scale, offset = torch.tensor(scale), torch.tensor(offset * scale)
    once = fake_quantize(x, scale, offset, *limits)
    assert not torch.equal(once, x)
    assert torch.equal(fake_quantize(once, scale, offset, *limits), once)


@settings(deadline=None, max_examples=60)
@given(seeds, scales, offsets, ranges)
def test_error_is_half_a_step_inside_and_the_ends_are_hit_outside(seed, scale, offset, limits):
    x = sample(seed, scale, offset, limits)
    qmin, qmax = limits
    scale, offset = torch.tensor(scale).double(), torch.tensor(offset * scale).double()
    out = fake_quantize(x, scale, offset, qmin, qmax)
    low, high = qmin * scale + offset, qmax * scale + offset
    inside = (x >= low) & (x <= high)
    assert ((out - x).abs()[inside] <= scale / 2 * (1 + 1e-9)).all()
    torch.testing.assert_close(out[x < low], low.expand_as(out)[x < low])
    torch.testing.assert_close(out[x > high], high.expand_as(out)[x > high])


@settings(deadline=None, max_examples=30)
@given(seeds, ranges)
def test_offset_shifts_the_grid(seed, limits):
    x, scale = sample(seed, 0.25, 0.0, limits), torch.tensor(0.25, dtype=torch.float64)
    shift = torch.tensor(3.5, dtype=torch.float64)
    torch.testing.assert_close(
        fake_quantize(x + shift, scale, shift, *limits),
        fake_quantize(x, scale, None, *limits) + shift,
    )


def test_ties_round_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    codes = quantize(x, torch.tensor(1.0), None, -8, 7)
    assert codes.tolist() == [0, 2, 2, 0, -2]


SHAPES = {
    'tensor': ((2, 5, 8), (1,)),
    'channel': ((2, 5, 8), (8,)),
    'feature map': ((2, 3, 4, 4), (3, 1, 1)),
    'head': ((2, 3, 5, 4), (3, 1, 1)),
    'token': ((2, 3, 5, 4), (5, 1)),
}


def leaves(x_shape, scale_shape, with_offset):
    x = (6 * torch.randn(x_shape, dtype=torch.float64)).requires_grad_()
    scale = (0.5 + torch.rand(scale_shape, dtype=torch.float64)).requires_grad_()
    offset = torch.randn(scale_shape, dtype=torch.float64).requires_grad_() if with_offset else None
    return x, scale, offset


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('limits', [(0, 15), (-8, 7)])
@pytest.mark.parametrize('with_offset', [True, False])
def test_gradients_are_those_of_the_straight_through_estimator(shape, limits, with_offset):
    x, scale, offset = leaves(*SHAPES[shape], with_offset)
    inputs = [x, scale, offset] if with_offset else [x, scale]
    upstream = torch.randn_like(x)
    expected = torch.autograd.grad(
        reference(x, scale, offset if with_offset else 0.0, *limits), inputs, upstream
    )
    out = fake_quantize(x, scale, offset, *limits)
    torch.testing.assert_close(out, reference(x, scale, offset if with_offset else 0.0, *limits))
    found = torch.autograd.grad(out, inputs, upstream)
    for gradient, wanted in zip(found, expected, strict=True):
        assert wanted.abs().sum() > 0
        torch.testing.assert_close(gradient, wanted)


def test_grad_scale_touches_scale_and_offset_only():
    x, scale, offset = leaves((4, 8), (8,), True)
    plain = torch.autograd.grad(fake_quantize(x, scale, offset, 0, 15).sum(), (x, scale, offset))
    scaled = torch.autograd.grad(
        fake_quantize(x, scale, offset, 0, 15, 0.125).sum(), (x, scale, offset)
    )
    torch.testing.assert_close(scaled[0], plain[0])
    torch.testing.assert_close(scaled[1], 0.125 * plain[1])
    torch.testing.assert_close(scaled[2], 0.125 * plain[2])


def test_the_ends_of_the_range_pass_gradient():
    x = torch.tensor([0.0, 15.0, -0.1, 15.1], requires_grad=True)
    fake_quantize(x, torch.tensor(1.0), None, 0, 15).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_gradients_flow_to_the_leaves_that_want_them():
    x, scale, offset = leaves((4, 8), (8,), True)
    fake_quantize(x.detach(), scale, offset.detach(), 0, 15).sum().backward()
    assert scale.grad is not None
    assert x.grad is None
    assert offset.grad is None


def reference_log(x, scale, qmax):
    """x_hat ~ x up to the scale, and the scale above it; the last code is zero."""
    codes = (-2 * (x / scale).log2()).round().clamp(0, qmax)
    value = torch.where(codes < qmax, scale.detach() * 2 ** (-codes / 2), 0)
    return torch.where(x <= scale, x + (value - x).detach(), scale)


@pytest.mark.parametrize('shape', SHAPES)
def test_log_sqrt2_gradients(shape):
    x_shape, scale_shape = SHAPES[shape]
    x = torch.rand(x_shape, dtype=torch.float64).pow(4).requires_grad_()
    scale = (0.2 + 0.4 * torch.rand(scale_shape, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn_like(x)
    expected = torch.autograd.grad(reference_log(x, scale, 7), (x, scale), upstream)
    out = fake_quantize_log_sqrt2(x, scale, 7)
    torch.testing.assert_close(out, reference_log(x, scale, 7))
    for gradient, wanted in zip(
        torch.autograd.grad(out, (x, scale), upstream), expected, strict=True
    ):
        assert wanted.abs().sum() > 0
        torch.testing.assert_close(gradient, wanted)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0, 2, width=32), min_size=1, max_size=32), st.sampled_from([3, 15]))
def test_log_sqrt2_codes(values, qmax):
    x, scale = torch.tensor(values), torch.tensor(1.0)
    codes = quantize_log_sqrt2(x, scale, qmax)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= 0
    assert codes.max() <= qmax
    out = dequantize_log_sqrt2(codes, scale, qmax)
    assert torch.equal(quantize_log_sqrt2(out, scale, qmax), codes)
    assert torch.equal(fake_quantize_log_sqrt2(x, scale, qmax), out)
    # Half a step of sqrt(2) is a factor of 2**(1/4); the last step before zero is no exception.
    zero = out == 0
    assert torch.equal(zero, codes == qmax)
    assert (x[zero] <= 2 ** (-(qmax - 0.5) / 2) * (1 + 1e-5)).all()
    inside = (x <= 1) & ~zero
    assert ((out / x)[inside].log2().abs() <= 0.25 + 1e-5).all()
    assert (out[x > 1] == 1).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 8), st.floats(0.01, 1), st.integers(16, 1024), st.integers(0, 2**16))
def test_log_sqrt2_keeps_rows_of_small_probabilities_small(bits, scale, tokens, seed):
    """What is closest to zero becomes zero, so many such values add nothing to their row."""
    qmax, scale = 2**bits - 1, torch.tensor(scale)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(tokens, generator=generator) * scale * 2 ** (-(qmax - 0.4) / 2)
    assert fake_quantize_log_sqrt2(x, scale, qmax).sum() == 0
    row = torch.cat([scale.reshape(1), x])
    assert fake_quantize_log_sqrt2(row, scale, qmax).sum() == scale


@pytest.mark.parametrize('qmax', [3, 15, 255])
def test_zero_probability_is_zero(qmax):
    scale = torch.tensor(0.3)
    codes = quantize_log_sqrt2(torch.zeros(1), scale, qmax)
    assert codes.item() == qmax
    assert dequantize_log_sqrt2(codes, scale, qmax).item() == 0


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_codes_do_not_depend_on_the_precision_around(dtype):
    x, scale, offset = torch.randn(64, 16), torch.rand(16) * 0.3 + 0.1, torch.randn(16)
    low = x.to(dtype)
    codes = quantize(low.float(), scale, offset, 0, 15)
    expected = dequantize(codes, scale, offset)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        full = fake_quantize(low.float(), scale, offset, 0, 15)
        half = fake_quantize(low, scale, offset, 0, 15)
    assert full.dtype == torch.float32
    assert torch.equal(full, expected)
    assert half.dtype == dtype
    assert torch.equal(half, expected.to(dtype))
