"""Triton kernels of training against the reference, in Triton's interpreter on the CPU.

Run by test_triton.py in a process of its own, as triton_cases.py is.
"""

import math
import os
from types import SimpleNamespace

os.environ['TRITON_INTERPRET'] = '1'

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gplq_mm.ops import (
    training_attention,
    training_reference,
    triton_common,
    triton_softmax,
    triton_training,
)
from gplq_mm.quant.code_state import level_bits_of
from gplq_mm.quant.functional import to_steps

few = settings(max_examples=12, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Shapes of an input and of a scale: one number, one a column, and along other axes.
LAYOUTS = [
    ((3, 5, 7), ()),
    ((2, 1100), (1,)),
    ((9,), (9,)),
    ((3, 11, 130), (130,)),
    ((75, 33), (1, 33)),
    # Channels of an image, heads, tokens, items, and channels of pixels.
    ((2, 3, 6, 5), (3, 1, 1)),
    ((2, 3, 40, 33), (1, 3, 1, 1)),
    ((2, 5, 17), (5, 1)),
    ((4, 5, 3), (4, 1, 1)),
    ((5, 6, 1, 1), (6, 1, 1)),
    ((4, 1), (4, 1)),
]
layouts = st.sampled_from(LAYOUTS)
column_layouts = st.sampled_from([(shape, scale) for shape, scale in LAYOUTS if 1 not in scale])


def make_grid(bits: int, signed: bool = False, num_bytes: int = 1) -> list[int]:
    low = -(2 ** (bits - 1)) if signed else 0
    high = low + 2**bits - 1
    return [low, high, level_bits_of(low, high, 2 if bits == 8 else num_bytes)]


NO_TABLE = torch.empty(0, dtype=torch.uint8)
grids = st.builds(make_grid, st.integers(2, 8), st.booleans(), st.integers(1, 2))
# Levels: whether there is a table, whether every head of the input has its own.
tables = st.sampled_from(['', 'one', 'heads'])


def make_table(kind, shape, grid):
    """A table of sixteen levels for an input, if any, and the grid that goes with it."""
    if not kind:
        return NO_TABLE, grid
    heads = shape[-3:-2] if kind == 'heads' else ()
    levels = torch.rand(*heads, 64).argsort(-1)[..., :16].sort(-1).values
    position = torch.arange(64).expand(*heads, 64)
    nearest = (position[..., None] - levels[..., None, :]).abs().argmin(-1)
    return levels.gather(-1, nearest).to(torch.uint8), make_grid(6, num_bytes=2 - grid[2] % 2)


def make_numbers(shape, grid, with_offset):
    """Scale and offset of a grid that covers some of a normal distribution."""
    scale = (torch.rand(shape) + 0.5) * 4 / (grid[1] - grid[0] + 1)
    centre = scale * (grid[0] + grid[1]) / -2
    return scale, centre + torch.randn(shape) * 0.3 if with_offset else None


def off_borders(x, scale, offset, grid):
    """1 where a float's last digit decides neither the code of ``x`` nor what counts as inside."""
    steps = to_steps(x, scale, offset)
    from_tie = (steps - steps.floor() - 0.5).abs()
    from_end = torch.minimum((steps - grid[0]).abs(), (steps - grid[1]).abs())
    return ((from_tie > 1e-3) & (from_end > 1e-3)).float()


def close(actual, expected, size: float = 1.0):
    """Equal up to rounding of sums of numbers of about ``size``."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * size)


@few
@given(layouts, grids, tables, st.booleans(), st.sampled_from(DTYPES), seeds)
def test_values_and_states_are_equal(layout, grid, kind, with_offset, dtype, seed):
    torch.manual_seed(seed)
    shape, scale_shape = layout
    table, grid = make_table(kind, shape, grid)
    scale, offset = make_numbers(scale_shape, grid, with_offset)
    x = 2 * torch.randn(shape)
    # On or next to a tie or an end of the grid, and far outside.
    at = torch.randint(2 * grid[0] - 2, 2 * grid[1] + 3, shape) / 2
    exact = at * scale if offset is None else at * scale + offset
    x = torch.where(torch.rand(shape) < 0.5, exact, x).to(dtype)
    x.view(-1)[0], x.view(-1)[-1] = math.inf, -1e4
    given_x = (x, scale, offset, table, grid)
    values, state = triton_training.fake_quant(*given_x)
    expected, expected_state = training_reference.fake_quant(*given_x)
    assert (values.dtype, state.dtype) == (torch.float32, expected_state.dtype)
    assert torch.equal(values, expected)
    assert torch.equal(state, expected_state)
    again = triton_training.fake_quant_values(state, scale, offset, table, grid)
    assert torch.equal(again, expected)


@few
@given(layouts, grids, tables, st.booleans(), st.sampled_from(DTYPES), seeds)
def test_backward(layout, grid, kind, with_offset, dtype, seed):
    torch.manual_seed(seed)
    shape, scale_shape = layout
    table, grid = make_table(kind, shape, grid)
    quantizer = (*make_numbers(scale_shape, grid, with_offset), table, grid)
    _, state = training_reference.fake_quant(2 * torch.randn(shape), *quantizer)
    arguments = (torch.randn(shape).to(dtype), state, *quantizer)
    actual = triton_training.fake_quant_backward(*arguments)
    expected = training_reference.fake_quant_backward(*arguments)
    assert torch.equal(actual[0], expected[0])
    for ours, theirs in zip(actual[1:], expected[1:], strict=True):
        close(ours, theirs, size=grid[1] - grid[0])


@few
@given(column_layouts, grids, tables, st.booleans(), st.sampled_from(DTYPES), seeds)
def test_gelu(layout, grid, kind, with_offset, dtype, seed):
    torch.manual_seed(seed)
    shape, scale_shape = layout
    table, grid = make_table(kind and 'one', shape, grid)
    scale, offset = make_numbers(scale_shape, grid, with_offset)
    x = (2 * torch.randn(shape)).to(dtype)
    sure = off_borders(torch.nn.functional.gelu(x.float()), scale, offset, grid)
    given_x = (x, scale, offset, table, grid)
    expected = training_reference.gelu_fake_quant(*given_x)
    close(triton_training.gelu_fake_quant(*given_x) * sure, expected * sure)
    grad = torch.randn(shape) * sure
    actual = triton_training.gelu_fake_quant_backward(grad, *given_x)
    expected = training_reference.gelu_fake_quant_backward(grad, *given_x)
    close(actual[0], expected[0])
    close(actual[1] * sure, expected[1] * sure)
    for ours, theirs in zip(actual[2:], expected[2:], strict=True):
        close(ours, theirs, size=grid[1] - grid[0])


SCORES = (4, 3, 7, 9)


@few
@given(
    keys=st.integers(1, 70),
    scale_shape=st.sampled_from([(), (3, 1, 1), (1, 3, 1, 1), (7, 1), (4, 1, 1, 1)]),
    bits=st.integers(2, 8),
    kind=tables,
    flags=st.tuples(*[st.booleans()] * 3),
    row_relative=st.booleans(),
    seed=seeds,
)
def test_softmax(keys, scale_shape, bits, kind, flags, row_relative, seed):
    torch.manual_seed(seed)
    shape = (*SCORES[:3], keys)
    bits = 6 if kind else bits
    table, grid = make_table(kind, shape, make_grid(bits))
    # As large as the numerators, or as probabilities; the largest lie outside.
    scale = (torch.rand(scale_shape) + 0.5) / 2**bits / (1 if row_relative else keys**0.5)
    offset = torch.rand(scale_shape) * 0.1 * scale if flags[0] else None
    bias = torch.randn(shape[1:]) if flags[1] else None
    mask = torch.where(torch.rand(2, 7, keys) < 0.3, -100.0, 0.0) if flags[2] else None
    rest = (0.7, bias, mask, scale, offset, table, grid, row_relative)
    scores = 2 * torch.randn(shape)
    actual, expected = scores.clone(), scores.clone()
    total = triton_training.softmax_fake_quant_(actual, *rest)
    close(total, training_reference.softmax_fake_quant_(expected, *rest))
    probs = training_reference._numerators(scores, *rest[:3])
    probs = probs if row_relative else probs / probs.sum(-1, keepdim=True)
    sure = off_borders(probs, scale, offset, grid)
    close(actual * sure, expected * sure)
    actual, actual_grad = scores.clone(), torch.randn(shape) * sure
    expected, expected_grad = scores.clone(), actual_grad.clone()
    sums = triton_training.softmax_fake_quant_backward_(actual_grad, actual, *rest)
    wanted = training_reference.softmax_fake_quant_backward_(expected_grad, expected, *rest)
    close(actual_grad, expected_grad)
    close(actual * sure, expected * sure)
    for ours, theirs in zip(sums, wanted, strict=True):
        close(ours, theirs, size=2**bits)


@pytest.mark.parametrize('kind', ['', 'one'])
def test_nan_stays_in_the_values(kind):
    x = torch.randn(4, 40)
    x[1, 3] = math.nan
    quantizer = (
        torch.full((40,), 0.1),
        torch.full((40,), -0.7),
        *make_table(kind, x.shape, [0, 15, 4]),
    )
    values, state = triton_training.fake_quant(x, *quantizer)
    expected, expected_state = training_reference.fake_quant(x, *quantizer)
    assert torch.equal(values.isnan(), x.isnan())
    assert torch.equal(values.nan_to_num(), expected.nan_to_num())
    assert torch.equal(state, expected_state)
    values = triton_training.gelu_fake_quant(x, *quantizer)
    assert torch.equal(values.isnan(), x.isnan())


@pytest.mark.parametrize('row_relative', [False, True])
def test_a_nan_score_spoils_its_row(row_relative):
    scores, grad = torch.randn(1, 2, 3, 40), torch.randn(1, 2, 3, 40)
    scores[0, 1, 2, 5] = math.nan
    spoiled = torch.zeros(scores.shape, dtype=torch.bool)
    spoiled[0, 1, 2] = True
    rest = (1.0, None, None, torch.tensor(0.05), None, NO_TABLE, [0, 15, 4], row_relative)
    forward = scores.clone()
    total = triton_training.softmax_fake_quant_(forward, *rest)
    assert torch.equal(forward.isnan(), spoiled)
    assert torch.equal(total.isnan(), spoiled[..., :1])
    sums = triton_training.softmax_fake_quant_backward_(grad, scores, *rest)
    assert torch.equal(grad.isnan(), spoiled)
    assert sums[0].isnan()


def test_any_memory_format():
    x = torch.randn(2, 3, 8, 9).to(memory_format=torch.channels_last)
    quantizer = torch.rand(3, 1, 1) + 0.1, None, NO_TABLE, make_grid(4)
    values, state = triton_training.fake_quant(x, *quantizer)
    expected = training_reference.fake_quant(x, *quantizer)
    assert values.is_contiguous()
    assert torch.equal(values, expected[0])
    actual = triton_training.fake_quant_backward(x.mT.contiguous().mT, state, *quantizer)
    expected = training_reference.fake_quant_backward(x, state, *quantizer)
    assert torch.equal(actual[0], expected[0])
    close(actual[1], expected[1], size=15)


def test_large_tensors_count_in_64_bits(monkeypatch):
    monkeypatch.setattr(triton_common, 'WIDE_FROM', 1)
    test_backward.hypothesis.inner_test(
        ((3, 11, 130), (130,)), make_grid(4), 'heads', True, torch.float32, 0
    )
    layout = ((2, 5, 1100), (5, 1))
    test_backward.hypothesis.inner_test(layout, make_grid(4), '', True, DTYPES[0], 0)
    test_softmax.hypothesis.inner_test(9, (3, 1, 1), 4, 'heads', (True,) * 3, True, 0)


def test_nothing_to_do():
    scale, empty = torch.ones(5), torch.empty(0, 5)
    quantizer = scale, None, NO_TABLE, make_grid(4)
    values, state = triton_training.fake_quant(empty, *quantizer)
    assert values.shape == state.shape == (0, 5)
    assert triton_training.fake_quant_values(state, *quantizer).shape == (0, 5)
    assert triton_training.gelu_fake_quant(empty, *quantizer).shape == (0, 5)
    for sums in (
        triton_training.fake_quant_backward(empty, state, *quantizer)[1:],
        triton_training.gelu_fake_quant_backward(empty, empty, *quantizer)[2:],
        triton_training.softmax_fake_quant_backward_(
            empty.view(0, 1, 1, 5), empty.view(0, 1, 1, 5), 1.0, None, None,
            scale[:1], *quantizer[1:], True,
        ),
    ):  # fmt: skip
        assert not torch.stack(sums).any()


def test_long_rows_of_scores_take_the_reference(monkeypatch, caplog):
    monkeypatch.setattr(triton_softmax, 'MAX_KEYS', 8)
    scores, grad = torch.randn(1, 1, 2, 9), torch.randn(1, 1, 2, 9)
    rest = (1.0, None, None, torch.tensor(0.1), None, NO_TABLE, make_grid(4), True)
    copies = scores.clone(), grad.clone()
    triton_training.softmax_fake_quant_backward_(grad, scores, *rest)
    training_reference.softmax_fake_quant_backward_(copies[1], copies[0], *rest)
    assert torch.equal(grad, copies[1])
    assert 'over 9 keys' in caplog.text


def test_wrong_operands_are_named():
    x, rest = torch.randn(3, 5), (None, NO_TABLE, make_grid(4))
    with pytest.raises(ValueError, match='one axis longer than 1'):
        triton_training.fake_quant(x, torch.ones(4), *rest)
    with pytest.raises(ValueError, match='got float64'):
        triton_training.fake_quant_backward(
            x.double(), torch.zeros(3, 5, dtype=torch.uint8), torch.ones(5), *rest
        )
    with pytest.raises(ValueError, match='one a column'):
        triton_training.gelu_fake_quant(x, torch.ones(3, 1), *rest)
    scores = torch.randn(1, 2, 3, 4)
    rest = (1.0, None, None, torch.ones(1), *rest, True)
    with pytest.raises(ValueError, match='grad must be contiguous'):
        triton_training.softmax_fake_quant_backward_(torch.randn(1, 2, 4, 3).mT, scores, *rest)


@pytest.mark.parametrize('kind', ['', 'heads'])
@pytest.mark.parametrize('row_relative', [False, True])
def test_attention_is_made_of_them(row_relative, kind, monkeypatch):
    heads = 3
    table, grid = make_table(kind, (heads, 1, 1), make_grid(8))
    # As a projection gives them: heads side by side in memory.
    q, k, v, above = torch.randn(4, 2, 10, heads, 8).transpose(2, 3).unbind()
    shapes = [(heads, 1, 1), (), (8,), (heads, 1, 1)]
    scales = [torch.full(shape, 4 / (grid[1] + 1)) for shape in shapes]
    offsets = [*(torch.full(shape, -2.0) for shape in shapes[:3]), None]
    bias = torch.randn(heads, 10, 10)
    rest = (0.35, bias, None, scales, offsets, [table] * 4, grid * 4, row_relative)

    def run(backend):
        ops = {
            name: SimpleNamespace(default=getattr(backend, name))
            for name in training_reference.__all__
        }
        monkeypatch.setattr(torch.ops, 'gplq_mm', SimpleNamespace(**ops))
        out, *states, total = training_attention.attention_fake_quant(q, k, v, *rest)
        grads = training_attention.attention_fake_quant_backward(above, states, total, *rest)
        return [out, total, *grads]

    for ours, theirs in zip(run(triton_training), run(training_reference), strict=True):
        # A code of a probability that rounding of a score flips changes by a 64th.
        assert (ours - theirs).abs().max() <= 0.02 * (theirs.abs().max() + 1e-3)
