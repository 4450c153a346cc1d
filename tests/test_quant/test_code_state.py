"""What is kept of an activation for backward: the exact code, and a coarse residual."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gplq_mm.quant import quantize
from gplq_mm.quant.code_state import decode_state, encode_state, level_bits_of, state_dtype

GRIDS = [(0, 15), (-8, 7), (0, 7), (-4, 3), (0, 255), (-128, 127), (0, 3)]


def sample(seed, low, high, count=257):
    """Values in steps, two beyond both ends, some of them exactly on codes and on borders."""
    generator = torch.Generator().manual_seed(seed)
    steps = low - 2 + (high - low + 4) * torch.rand(count, generator=generator)
    steps[::5] = steps[::5].round()
    steps[1::7] = steps[1::7].round() + 0.5
    return steps


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**16),
    st.sampled_from(GRIDS),
    st.sampled_from([1, 2]),
    st.floats(1e-3, 1e3),
    st.sampled_from([None, -1.7, 0.4]),
)
def test_codes_are_exact_and_residuals_within_half_a_level(seed, grid, num_bytes, scale, offset):
    low, high = grid
    num_bytes = 2 if high - low > 15 else num_bytes
    bits = level_bits_of(low, high, num_bytes)
    scale = torch.tensor([scale])
    offset = None if offset is None else offset * scale
    x = sample(seed, low, high) * scale + (0 if offset is None else offset)
    exact, state = encode_state(x, scale, offset, low, high, bits)
    codes, residual, outside = decode_state(state, low, high, bits)

    assert state.dtype == state_dtype(low, high, bits)
    assert state.element_size() == num_bytes
    assert torch.equal(exact, quantize(x, scale, offset, low, high))
    assert torch.equal(codes, exact)
    steps = (x.double() - (0 if offset is None else offset.double())) / scale.double()
    clear = ((steps - low).abs() > 1e-3) & ((steps - high).abs() > 1e-3)
    assert torch.equal(outside[clear], ((steps < low) | (steps > high))[clear])
    inside = clear & ~outside
    # At +-1/2 the outermost level is one and a half steps of a level away.
    error = (residual.double() - (codes.double() - steps))[inside].abs()
    assert error.max() <= 1.01 / (2**bits - 1) + 1e-4 * (high - low)


@pytest.mark.parametrize('grid', GRIDS)
def test_no_rounding_is_no_residual(grid):
    low, high = grid
    x = torch.arange(low, high + 1).float()
    bits = level_bits_of(low, high, 2)
    codes, residual, outside = decode_state(
        encode_state(x, torch.ones(1), None, low, high, bits)[1], low, high, bits
    )
    assert torch.equal(codes, x)
    assert not residual.any()
    assert not outside.any()


def test_nan_stays_in_the_codes():
    codes, state = encode_state(torch.tensor([float('nan'), 1.0]), torch.ones(1), None, 0, 15, 4)
    assert codes.isnan().tolist() == [True, False]
    assert state.dtype == torch.uint8
