"""Triton kernels against the reference, in Triton's interpreter on the CPU.

Run by test_triton.py in a process of its own: the interpreter must be switched on before triton
is imported for the first time.
"""

import math
import os

os.environ['TRITON_INTERPRET'] = '1'

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_layers import NO_TABLE, level_table
from rich.console import Console

from gplq_mm.benchmark import gpu, report
from gplq_mm.ops import reference, triton_gemm, triton_layer, triton_ops, triton_quantize
from gplq_mm.quant.packing import pack_multiplier_panels, pack_panels

CPU = torch.device('cpu')
few = settings(max_examples=12, deadline=None, derandomize=True)


def make_layer(
    rows: int,
    columns: int,
    group_size: int = 32,
    bits: int = 4,
    act_bits: int = 4,
    signed: bool = False,
    levels: int = 0,
) -> tuple[list[torch.Tensor], list[int]]:
    """Random operands of a layer, all integers as large as they may be somewhere."""
    if levels:
        act_bits, signed = 6, False
    limit = min(2 ** (bits - 1), 127)
    largest = max(1, min(15, 127 // limit))
    groups = -(-columns // group_size)
    codes = torch.randint(-limit, 2 ** (bits - 1), (rows, columns), dtype=torch.int8)
    factors = torch.randint(1, largest + 1, (rows, groups), dtype=torch.uint8)
    code_min = -(2 ** (act_bits - 1)) if signed else 0
    code_max = code_min + 2**act_bits - 1
    layer = [
        torch.rand(columns) * 2**act_bits / 4 + 0.5,
        torch.rand(columns) * 2 ** (act_bits - 1),
        pack_panels(codes, bits),
        pack_multiplier_panels(factors),
        torch.randperm(columns).int(),
        torch.rand(rows) * 0.01,
        torch.randn(rows),
        torch.randint(-50, 50, (rows,), dtype=torch.int32),
        level_table(levels, torch.default_generator) if levels else NO_TABLE,
    ]
    return layer, [code_min, code_max, group_size]


layers = st.fixed_dictionaries(
    dict(
        rows=st.integers(1, 90),
        columns=st.integers(1, 200),
        group_size=st.sampled_from([16, 32, 48, 64]),
        bits=st.integers(2, 8),
        act_bits=st.integers(2, 8),
        signed=st.booleans(),
        levels=st.sampled_from([0, 0, 8, 16]),
    )
)
seeds = st.integers(0, 2**31)


@few
@given(layers, st.integers(0, 20), seeds)
def test_accumulators_are_equal(shape, m, seed):
    torch.manual_seed(seed)
    layer, grid = make_layer(**shape)
    x = 2 * torch.randn(m, shape['columns'])
    expected = reference.int4_accumulate(x, layer, grid)
    actual = triton_ops.int4_accumulate(x, layer, grid)
    assert actual.dtype == torch.int32
    assert torch.equal(actual, expected)


@pytest.mark.parametrize('act_bits', [4, 7, 8])
@pytest.mark.parametrize('bits', [4, 8])
def test_the_largest_sums_are_exact(bits, act_bits):
    layer, grid = make_layer(3, 700, 64, bits, act_bits)
    code, factor = (-8, 15) if bits == 4 else (-127, 1)
    layer[2] = pack_panels(torch.full((3, 700), code, dtype=torch.int8), bits)
    layer[3] = pack_multiplier_panels(torch.full((3, 11), factor, dtype=torch.uint8))
    x = torch.full((2, 700), 1e6)
    actual = triton_ops.int4_accumulate(x, layer, grid)
    assert torch.equal(actual, reference.int4_accumulate(x, layer, grid))
    assert int((actual + layer[7]).min()) == 700 * (2**act_bits - 1) * code * factor


@pytest.mark.parametrize('group_size', [32, 64, 300])
@pytest.mark.parametrize('act_bits', [4, 6, 8])
def test_weights_may_be_unpacked_before_or_within_the_product(group_size, act_bits):
    layer, grid = make_layer(70, 150, group_size, act_bits=act_bits)
    x = torch.randn(17, 150)
    prepared = triton_layer.prepared_layer(layer, grid, CPU)
    assert prepared.unpacks_in_loop
    codes = triton_quantize.quantize(x, prepared, 17)
    expected = reference.int4_accumulate(x, layer, grid)
    for in_loop in (True, False):
        out = torch.empty(17, 70, dtype=torch.int32)
        triton_gemm.multiply(codes, prepared, out, unpack_in_loop=in_loop)
        assert torch.equal(out, expected)


def test_the_benchmark_times_every_form_of_the_product():
    bench = report.Bench(Console(), 1, lambda call: lambda: float(call() is not None) + 1)
    gpu.linear(bench, [1, 2], [('odd', 3, 33, 65)], CPU)
    assert {row['shape'] for row in bench.rows} == {'3x33x65', '6x33x65'}
    assert len({row['impl'] for row in bench.rows}) * 2 == len(bench.rows) == 10


@few
@given(st.integers(1, 9), st.integers(1, 70), st.integers(2, 8), st.booleans(), seeds)
def test_codes_are_equal(m, columns, bits, signed, seed):
    torch.manual_seed(seed)
    code_min = -(2 ** (bits - 1)) if signed else 0
    grid = [code_min, code_min + 2**bits - 1, 32]
    inverse, shift = torch.rand(columns) * 5 + 0.1, torch.randn(columns) * 3
    x = 3 * torch.randn(m, columns)
    # What falls on or next to a tie, and what falls far outside.
    x[:, ::2] = (torch.randint(-300, 300, x[:, ::2].shape) / 2 - shift[::2]) / inverse[::2]
    x[0, 0], x[-1, -1], x[-1, 0] = math.inf, -1e30, math.nan
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        given_x = x.to(dtype)
        operands = (given_x, inverse, shift, grid, NO_TABLE)
        actual = triton_ops.quantize_codes(*operands)
        assert actual.dtype == torch.uint8
        assert torch.equal(actual, reference.quantize_codes(*operands))


def test_ties_go_to_even():
    x = torch.arange(-4, 40).float()[None] / 2
    codes = triton_ops.quantize_codes(x, torch.ones(44), torch.zeros(44), [0, 15, 32], NO_TABLE)
    assert torch.equal(codes[0].float(), x[0].round().clamp(0, 15))


@pytest.mark.parametrize('columns', [1, 33, 64])
def test_levels_are_equal(columns):
    table = level_table(16, torch.default_generator)
    inverse, shift = torch.rand(columns) * 5 + 0.1, torch.randn(columns) * 3 + 20
    x = 8 * torch.randn(40, columns)
    x[0, 0], x[1, 0], x[2, 0] = math.inf, -1e30, math.nan
    operands = (x, inverse, shift, [0, 63], table)
    expected = reference.quantize_codes(*operands)
    assert torch.equal(triton_ops.quantize_codes(*operands), expected)
    assert set(expected.unique().tolist()) <= set(table.tolist())


@pytest.mark.parametrize('levels', [0, 16])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_linear(dtype, levels):
    layer, grid = make_layer(65, 97, levels=levels)
    x = torch.randn(3, 5, 97).to(dtype)
    actual = triton_ops.int4_linear(x, layer, grid)
    assert actual.dtype == dtype
    expected = reference.int4_linear(x, layer, grid)
    if dtype == torch.bfloat16:
        # The interpreter cuts the bits that a device rounds.
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(actual, expected)


@pytest.mark.parametrize('with_gamma', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_linear_add(dtype, with_gamma):
    layer, grid = make_layer(33, 64)
    x, residual = torch.randn(4, 64).to(dtype), torch.randn(4, 33).to(dtype)
    gamma = torch.rand(33) if with_gamma else None
    actual = triton_ops.int4_linear_add(x, layer, grid, residual, gamma)
    assert torch.equal(actual, reference.int4_linear_add(x, layer, grid, residual, gamma))


def agree(actual, expected, steps: float, flipped: float = 0.02):
    """Equal up to float rounding, but for a few values that a flipped tie moved by ``steps``."""
    off = (actual.float() - expected.float()).abs()
    close = off <= 2e-5 + 2e-5 * expected.float().abs()
    assert off.max() <= steps + 1e-4
    assert (~close).float().mean() <= flipped


@few
@given(st.integers(1, 130), st.integers(2, 150), st.sampled_from([4, 8]), seeds)
def test_norm_linear(rows, columns, act_bits, seed):
    torch.manual_seed(seed)
    layer, grid = make_layer(rows, columns, act_bits=act_bits)
    x = torch.randn(5, columns) * 3 + 2
    norm = torch.rand(columns) + 0.5, torch.randn(columns)
    expected = reference.int4_norm_linear(x, *norm, 1e-5, layer, grid)
    actual = triton_ops.int4_norm_linear(x, *norm, 1e-5, layer, grid)
    agree(actual, expected, 127 * 0.01)


@pytest.mark.parametrize('levels', [0, 16])
@pytest.mark.parametrize(('act_bits1', 'act_bits2'), [(4, 4), (4, 8), (8, 4)])
@pytest.mark.parametrize('hidden', [64, 130])
def test_mlp(act_bits1, act_bits2, hidden, levels):
    layer1, grid1 = make_layer(hidden, 48, act_bits=act_bits1)
    layer2, grid2 = make_layer(48, hidden, act_bits=act_bits2, levels=levels)
    layer1[5] /= 10
    x = torch.randn(2, 9, 48)
    norm = torch.rand(48) + 0.5, torch.randn(48)
    gamma = torch.rand(48)
    arguments = (x, *norm, 1e-6, layer1, grid1, layer2, grid2, gamma)
    expected = reference.int4_mlp(*arguments)
    # The hidden codes are worth testing only if they are not all the same.
    assert expected.sub(x).std() > 0.1
    agree(triton_ops.int4_mlp(*arguments), expected, 127 * 0.01)


@pytest.mark.parametrize(
    ('size', 'geometry'),
    [
        ((16, 16), (8, 8, 8, 8, 0, 0, 1, 1)),
        ((9, 7), (3, 2, 2, 1, 1, 0, 1, 1)),
        ((8, 9), (3, 3, 1, 2, 2, 1, 2, 1)),
    ],
)
def test_conv2d(size, geometry):
    layer, grid = make_layer(20, 3 * geometry[0] * geometry[1])
    x = torch.randn(2, 3, *size)
    expected = reference.int4_conv2d(x, layer, grid, list(geometry))
    for given_x in (x, x.to(memory_format=torch.channels_last)):
        actual = triton_ops.int4_conv2d(given_x, layer, grid, list(geometry))
        assert actual.stride() == expected.stride()
        assert torch.equal(actual, expected)


def attention_operands(windows, tokens, heads, depth, bits, signed, levels=False):
    """qkv, heads, scale, grids, limits, tables."""
    low = -(2 ** (bits - 1)) if signed else 0
    limits = [low, low + 2**bits - 1] * 3 + [0, 2**bits - 1]
    grids = torch.rand(4, 2, heads) * 0.1
    grids[:, 0] += 4 / 2**bits
    if not signed:
        grids[:3, 1] -= 2.0
    grids[3, 0], grids[3, 1] = 1 / 2**bits, 0.01
    qkv = torch.randn(windows, tokens, 3 * heads * depth)
    tables = [NO_TABLE] * 4
    if levels:
        tables = [
            torch.stack([level_table(24, torch.default_generator) for _ in range(heads)])
            for _ in range(4)
        ]
    return qkv, heads, depth**-0.5, grids, limits, tables


@pytest.mark.parametrize('row_relative', [True, False])
@pytest.mark.parametrize(
    ('tokens', 'depth', 'bits', 'signed', 'levels'),
    [
        (17, 8, 4, False, False),
        (49, 32, 4, True, False),
        (70, 24, 8, False, False),
        (17, 8, 6, False, True),
        (49, 32, 6, False, True),
    ],
)
def test_attention(tokens, depth, bits, signed, levels, row_relative):
    operands = attention_operands(2, tokens, 3, depth, bits, signed, levels)
    arguments = (*operands, row_relative, None, None, None, 0)
    expected = reference.int4_attention(*arguments)
    # A code of a probability that rounding of the scores flips moves its row by a step of it.
    flipped = 0.02 if bits == 4 else 0.1
    agree(triton_ops.int4_attention(*arguments), expected, 2.5 / 2**bits, flipped)


def test_attention_of_shifted_windows():
    windows, tokens, heads, depth = 4, 9, 2, 16
    qkv, *operands = attention_operands(1, 31, heads, depth, 4, True)
    # 30 tokens, 6 places of padding that read row 30.
    rows = torch.full((windows * tokens,), 30, dtype=torch.int32)
    rows[torch.randperm(windows * tokens)[:30]] = torch.randperm(30).int()
    rows = rows.reshape(windows, tokens)
    bias = torch.randn(heads, tokens, tokens)
    mask = torch.where(torch.rand(2, tokens, tokens) < 0.3, -100.0, 0.0)
    arguments = (qkv[0], *operands, True, bias, mask, rows, 30)
    expected = reference.int4_attention(*arguments)
    agree(triton_ops.int4_attention(*arguments), expected, 2.5 / 16)


def test_no_rows():
    layer, grid = make_layer(5, 40)
    norm = torch.ones(40), torch.zeros(40)
    assert triton_ops.int4_linear(torch.empty(2, 0, 40), layer, grid).shape == (2, 0, 5)
    assert triton_ops.int4_norm_linear(torch.empty(0, 40), *norm, 1e-5, layer, grid).shape == (0, 5)
    assert triton_ops.quantize_codes(torch.empty(0, 40), *layer[:2], grid, layer[8]).shape == (
        0,
        40,
    )


def test_preparation_follows_the_weight():
    layer, grid = make_layer(40, 64)
    first = triton_layer.prepared_layer(layer, grid, CPU)
    assert triton_layer.prepared_layer(list(layer), grid, CPU) is first
    layer[2].copy_(make_layer(40, 64)[0][2])
    assert triton_layer.prepared_layer(layer, grid, CPU) is not first
    x = torch.randn(3, 64)
    expected = reference.int4_linear(x, layer, grid)
    assert torch.equal(triton_ops.int4_linear(x, layer, grid), expected)
    kept = len(triton_layer._prepared)
    del layer[2]
    assert len(triton_layer._prepared) == kept - 1


@pytest.mark.parametrize(
    ('place', 'wrong', 'message'),
    [
        (0, torch.ones(5), 'shift must have shape'),
        (2, torch.zeros(1, 64, 16, dtype=torch.uint8), 'weight must have shape'),
        (3, torch.full((1, 2, 64), 200, dtype=torch.uint8), 'multiplier'),
        (4, torch.zeros(64, dtype=torch.int64), 'position must be int32'),
        (4, torch.zeros(64, dtype=torch.int32), 'each of 0..63 once'),
        (7, torch.zeros(40), 'correction must be'),
        (8, torch.zeros(64, dtype=torch.uint8), 'codes must be positions 0..63'),
    ],
)
def test_wrong_operands_are_named(place, wrong, message):
    layer, grid = make_layer(40, 64)
    layer[place] = wrong
    with pytest.raises(ValueError, match=message):
        triton_ops.int4_linear(torch.randn(3, 64), layer, grid)


def test_wrong_inputs_are_named():
    layer, grid = make_layer(40, 64)
    with pytest.raises(ValueError, match='63 columns, the layer takes 64'):
        triton_ops.int4_linear(torch.randn(3, 63), layer, grid)
    with pytest.raises(ValueError, match='got float64'):
        triton_ops.int4_linear(torch.randn(3, 64).double(), layer, grid)
    with pytest.raises(ValueError, match='residual'):
        triton_ops.int4_linear_add(torch.randn(3, 64), layer, grid, torch.randn(3, 41), None)
    with pytest.raises(ValueError, match='codes must fit a byte'):
        triton_ops.int4_linear(torch.randn(3, 64), layer, [0, 300, 32])


def test_gelu_is_exact():
    layer1, grid1 = make_layer(64, 8)
    layer2, grid2 = make_layer(8, 64)
    first, inverse, shift, second = triton_layer.prepared_mlp(layer1, grid1, layer2, grid2, CPU)
    x = torch.randn(6, 8)
    hidden = torch.empty(6, 128)
    codes = triton_quantize.quantize(x, first, 6)
    triton_gemm.multiply(codes, first, hidden, gelu=True)
    expected = F.gelu(reference.int4_linear(x, layer1, grid1))
    # The rows of the first layer stand as the second reads them: two columns a byte.
    order = second.source.long().clone()
    halves = torch.stack((hidden[:, ::2], hidden[:, 1::2]), 1).flatten(1)
    torch.testing.assert_close(halves[:, :64], expected[:, order[:64]], rtol=1e-6, atol=1e-6)
    assert (inverse.shape, shift.shape) == ((128,), (128,))
