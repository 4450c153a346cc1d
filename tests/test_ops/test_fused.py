"""Layers with what stands before and behind them: LayerNorm, GELU, residual; convolution."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from packed_layers import (
    SEEDS,
    error_of,
    every_isa,
    identity_layer,
    layers,
    random_input,
    random_layer,
)

from gplq_mm.ops import reference

ops = torch.ops.gplq_mm
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-6


@settings(max_examples=40, deadline=None)
@given(layers(), st.integers(0, 20), st.booleans(), st.sampled_from(DTYPES), SEEDS)
def test_linear_add_is_the_reference_to_the_last_bit(case, rows, scaled, dtype, seed):
    x = random_input(case, rows, seed=seed)
    residual = torch.randn(rows, case.rows).to(dtype)
    gamma = torch.randn(case.rows) if scaled else None
    args = (x, case.layer, case.grid, residual, gamma)
    expected = reference.int4_linear_add(*args)

    def check():
        out = ops.int4_linear_add(*args)
        assert out.dtype == dtype
        assert torch.equal(out, expected)

    every_isa(check)


def norm_parameters(columns):
    return torch.rand(columns) + 0.5, torch.randn(columns)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(0, 9), st.sampled_from([0.0, 5.0, 300.0]), SEEDS)
def test_norm_codes_differ_from_torch_only_next_to_ties(columns, rows, mean, seed):
    torch.manual_seed(seed)
    case = identity_layer(columns, torch.ones(columns), torch.zeros(columns), [0, 255])
    case.layer[0], case.layer[1] = torch.full((columns,), 20.0), torch.full((columns,), 100.0)
    x = torch.randn(rows, columns) * 2 + mean
    weight, bias = norm_parameters(columns)
    exact = F.layer_norm(x.double(), (columns,), weight.double(), bias.double(), EPS)
    steps = (exact * 20 + 100).clamp(0, 255)
    # What one float32 rounding of x's mean can do to a normalized value.
    centered = x.double() - x.double().mean(-1, keepdim=True)
    deviation = centered.square().mean(-1, keepdim=True).add(EPS).sqrt()
    allowed = 20 * weight * (2e-6 + 3e-7 * (mean + 2) / deviation)

    def check():
        out = ops.int4_norm_linear(x, weight, bias, EPS, case.layer, case.grid)
        assert ((out - steps).abs() <= 0.5 + allowed).all()

    every_isa(check)


@pytest.mark.parametrize('columns', [5, 96, 384])
def test_norm_linear_of_equal_values_is_the_bias(isa, columns):
    case = random_layer(70, columns)
    weight, bias = norm_parameters(columns)
    x = torch.full((3, columns), 7.25)
    out = ops.int4_norm_linear(x, weight, bias, EPS, case.layer, case.grid)
    assert torch.equal(out, reference.int4_linear(bias.expand(3, -1), case.layer, case.grid))


@pytest.mark.parametrize('dtype', DTYPES)
def test_norm_linear_is_the_reference_to_the_last_bit(isa, dtype):
    case = random_layer(200, 384)
    weight, bias = norm_parameters(384)
    x = torch.randn(2, 100, 384).to(dtype)
    args = (x, weight, bias, EPS, case.layer, case.grid)
    out, expected = ops.int4_norm_linear(*args), reference.int4_norm_linear(*args)
    assert out.dtype == dtype
    assert out.shape == expected.shape
    assert torch.equal(out, expected)


def test_gelu_is_exact_to_a_few_units_in_the_last_place(isa):
    """The first layer hands known values to GELU, the second one's grid is so fine around the
    exact result that the codes tell the error."""
    columns = 1024
    values = torch.linspace(-9, 9, columns)
    first = identity_layer(columns, torch.zeros(columns), values, [0, 15])
    exact = F.gelu(values.double())
    magnitude = values.abs().clamp(min=1).double()
    inverse = (2e6 / magnitude).float()
    shift = (128 - exact * inverse.double()).float()
    second = identity_layer(columns, torch.ones(columns), torch.zeros(columns), [0, 255])
    second.layer[0], second.layer[1] = inverse, shift
    x = torch.zeros(2, columns)
    weight, bias = norm_parameters(columns)
    out = ops.int4_mlp(
        x, weight, bias, EPS, first.layer, first.grid, second.layer, second.grid, None
    )
    error = (out.double() - shift.double()) / inverse.double() - exact
    assert (error.abs() / magnitude).max() < 0.5 / 2e6 + 2.5e-7


@pytest.mark.parametrize(
    ('limits', 'levels'), [([0, 15], 0), ([-8, 7], 0), ([0, 255], 0), ([0, 63], 16)]
)
def test_mlp_is_the_reference_to_the_last_bit(isa, limits, levels):
    """So many values that some are next to a tie, where only an exact GELU rounds as the
    reference does."""
    columns, hidden = 96, 1024
    first = random_layer(hidden, columns, levels=levels)
    second = random_layer(columns, hidden, levels=levels)
    scale = 3 / (limits[1] - limits[0])
    second.layer[0] = torch.full((hidden,), 1 / scale)
    second.layer[1] = torch.full((hidden,), limits[0] + 0.2 / scale)
    second.grid[:2] = limits
    weight, bias = norm_parameters(columns)
    args = (weight, bias, EPS, first.layer, first.grid, second.layer, second.grid, None)
    x = torch.randn(300, columns)
    # Real sizes in front of GELU.
    first.layer[5] *= 2 / reference.int4_norm_linear(x, *args[:5]).std()
    assert torch.equal(ops.int4_mlp(x, *args), reference.int4_mlp(x, *args))


def away_from_ties(values, layer, grid, margin=5e-5):
    """Whether no value ``(..., K)`` stands where a float32 rounding could change its code."""
    steps = values * layer[0].double() + layer[1].double()
    inside = (steps > grid[0] - 1) & (steps < grid[1] + 1)
    return ((steps - steps.floor() - 0.5).abs() > margin)[inside].all()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 80),
    st.integers(1, 200),
    st.integers(0, 15),
    st.booleans(),
    st.sampled_from([0, 16]),
    SEEDS,
)
def test_mlp_is_the_reference_where_no_value_is_next_to_a_tie(
    columns, hidden, rows, scaled, levels, seed
):
    torch.manual_seed(seed)
    first = random_layer(hidden, columns, seed=seed, levels=levels)
    second = random_layer(columns, hidden, seed=seed + 1, levels=levels)
    x = torch.randn(rows, columns)
    gamma = torch.randn(columns) if scaled else None
    weight, bias = norm_parameters(columns)
    assume(rows == 0 or (x.std(-1) > 0.05).all())
    normed = F.layer_norm(x.double(), (columns,), weight.double(), bias.double(), EPS)
    assume(away_from_ties(normed, first.layer, first.grid))
    inner = reference.int4_linear(normed.float(), first.layer, first.grid)
    assume(away_from_ties(F.gelu(inner.double()), second.layer, second.grid))
    args = (x, weight, bias, EPS, first.layer, first.grid, second.layer, second.grid, gamma)
    expected = reference.int4_mlp(*args)

    every_isa(lambda: assert_equal(ops.int4_mlp(*args), expected))


def assert_equal(actual, expected):
    assert torch.equal(actual, expected)


def test_threads_do_not_matter(threads):
    first, second = random_layer(300, 100), random_layer(100, 300)
    x = torch.randn(333, 100)
    weight, bias = norm_parameters(100)
    args = (x, weight, bias, EPS, first.layer, first.grid, second.layer, second.grid, None)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(ops.int4_mlp(*args))
    assert torch.equal(*results)


@st.composite
def convolutions(draw):
    """A layer, an input and a geometry that fit each other."""
    channels = draw(st.integers(1, 5))
    kernel = [draw(st.integers(1, 4)) for _ in range(2)]
    stride = [draw(st.integers(1, 3)) for _ in range(2)]
    padding = [draw(st.integers(0, 2)) for _ in range(2)]
    dilation = [draw(st.integers(1, 2)) for _ in range(2)]
    size = [draw(st.integers(1, 12)) for _ in range(2)]
    for i in (0, 1):
        assume(size[i] + 2 * padding[i] >= dilation[i] * (kernel[i] - 1) + 1)
    bits = draw(st.sampled_from([4, 8]))
    columns = channels * kernel[0] * kernel[1]
    levels = draw(st.sampled_from([0, 16]))
    case = random_layer(
        draw(st.integers(1, 70)), columns, bits, bits, seed=draw(SEEDS), levels=levels
    )
    x = torch.randn(draw(st.integers(0, 3)), channels, *size)
    return case, x, [*kernel, *stride, *padding, *dilation]


@settings(max_examples=50, deadline=None)
@given(convolutions(), st.sampled_from(DTYPES), st.booleans())
def test_conv_is_the_reference_to_the_last_bit(problem, dtype, channels_last):
    case, x, geometry = problem
    x = x.to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    expected = reference.int4_conv2d(x, case.layer, case.grid, geometry)

    def check():
        out = ops.int4_conv2d(x, case.layer, case.grid, geometry)
        assert out.dtype == dtype
        assert out.shape == expected.shape
        assert torch.equal(out, expected)
        assert out.permute(0, 2, 3, 1).is_contiguous()

    every_isa(check)


def test_conv_is_a_convolution_of_codes(isa):
    case = random_layer(9, 3 * 9)
    x = torch.randn(2, 3, 8, 7)
    # The same grid for all taps of a channel, zero on it.
    inverse = torch.tensor([1.0, 2.0, 4.0]).repeat_interleave(9)
    case.layer[0], case.layer[1] = inverse, torch.full((27,), 6.0)
    out = ops.int4_conv2d(x, case.layer, case.grid, [3, 3, 2, 1, 1, 1, 1, 1])
    codes = (x * inverse[::9, None, None] + 6).round().clamp(0, 15)
    padded = F.pad(codes, (1, 1, 1, 1), value=6.0)
    sums = F.conv2d(padded, case.integers.float().reshape(9, 3, 3, 3), stride=(2, 1))
    row_scale, bias, correction = (t[:, None, None] for t in case.layer[5:8])
    expected = (sums - correction) * row_scale + bias
    torch.testing.assert_close(out, expected)


CASE = random_layer(8, 8)
X = torch.randn(3, 8)
LAYER = (CASE.layer, CASE.grid)
ONES = torch.ones(8)
IMAGE = torch.randn(1, 2, 5, 5)
CONV_GRID = [2, 2, 1, 1, 0, 0, 1, 1]
BAD_CALLS = [
    ('int4_linear_add', (X, *LAYER, X[:2], None), r'residual must have shape \[3, 8\], got \[2, 8'),
    ('int4_linear_add', (X, *LAYER, X.double(), None), 'residual must be float32 or float16 or'),
    ('int4_linear_add', (X, *LAYER, X, ONES[:7]), r'gamma must have shape \[8\], got \[7\]'),
    ('int4_norm_linear', (X, ONES[1:], ONES, EPS, *LAYER), r'norm_weight must have shape \[8\]'),
    ('int4_norm_linear', (X, ONES, ONES.double(), EPS, *LAYER), 'norm_bias must be float32 or'),
    (
        'int4_mlp',
        (X, ONES, ONES, EPS, *LAYER, random_layer(8, 9).layer, CASE.grid, None),
        'the first layer gives 8 columns, the second takes 9',
    ),
    (
        'int4_mlp',
        (X, ONES, ONES, EPS, *LAYER, random_layer(9, 8).layer, CASE.grid, None),
        'the second layer gives 9 columns, the input has 8',
    ),
    ('int4_mlp', (X, ONES, ONES, EPS, *LAYER, *LAYER, ONES[:3]), r'gamma must have shape \[8\]'),
    ('int4_conv2d', (IMAGE, *LAYER, CONV_GRID[:7]), 'geometry must be kernel, stride, padding'),
    ('int4_conv2d', (IMAGE, *LAYER, [2, 2, 0, 1, 0, 0, 1, 1]), 'must be at least 1 and padding'),
    ('int4_conv2d', (IMAGE, *LAYER, [2, 2, 1, 1, 0, -1, 1, 1]), 'must be at least 1 and padding'),
    ('int4_conv2d', (IMAGE[0], *LAYER, CONV_GRID), r'must be \(N, C, H, W\), got shape \[2, 5, 5'),
    ('int4_conv2d', (IMAGE.double(), *LAYER, CONV_GRID), 'the input must be one of float32'),
    ('int4_conv2d', (IMAGE[:, :1], *LAYER, CONV_GRID), 'are 4 columns, the layer takes 8'),
    ('int4_conv2d', (IMAGE, *LAYER, [2, 2, 1, 1, 0, 0, 1, 5]), 'the kernel spans 2 x 6'),
]


@pytest.mark.parametrize(('op', 'args', 'message'), BAD_CALLS)
def test_bad_operands_are_named_in_the_same_words_everywhere(op, args, message):
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(*args)
    assert error_of(getattr(ops, op), *args) == error_of(getattr(reference, op), *args)
