"""Codes, accumulators and linear layers of the CPU kernels on every instruction set."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_layers import (
    ISAS,
    NO_TABLE,
    SEEDS,
    error_of,
    every_isa,
    layers,
    random_input,
    random_layer,
)

from gplq_mm.ops import native, reference
from gplq_mm.quant.functional import quantize

ops = torch.ops.gplq_mm
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_kernels = pytest.mark.skipif(not ISAS, reason='installed without compiled kernels')


@settings(max_examples=60, deadline=None)
@given(layers(), st.sampled_from([(0,), (1,), (5,), (13,), (2, 9)]), SEEDS)
def test_accumulators_are_the_exact_sums(case, shape, seed):
    x = random_input(case, *shape, seed=seed)
    codes = reference.quantize_codes(x, *case.layer[:2], case.grid, case.layer[8])
    expected = case.sums(codes)
    assert torch.equal(reference.int4_accumulate(x, case.layer, case.grid), expected)

    def check():
        sums = ops.int4_accumulate(x, case.layer, case.grid)
        assert sums.dtype == torch.int32
        assert torch.equal(sums, expected)

    every_isa(check)


@settings(max_examples=40, deadline=None)
@given(layers(), st.integers(1, 40), st.sampled_from(DTYPES), SEEDS)
def test_linear_is_the_reference_to_the_last_bit(case, rows, dtype, seed):
    x = random_input(case, rows, seed=seed).to(dtype)
    expected = reference.int4_linear(x, case.layer, case.grid)

    def check():
        out = ops.int4_linear(x, case.layer, case.grid)
        assert out.dtype == dtype
        assert torch.equal(out, expected)

    every_isa(check)


@pytest.mark.parametrize('act_bits', [4, 5, 8])
@pytest.mark.parametrize('weight_bits', [4, 8])
def test_largest_sums_do_not_saturate(isa, weight_bits, act_bits):
    case = random_layer(70, 900, weight_bits, act_bits, group_size=64, seed=act_bits, extreme=True)
    x = torch.full((7, case.columns), 1e4)
    codes = torch.full((7, case.columns), 2**act_bits - 1)
    assert torch.equal(ops.int4_accumulate(x, case.layer, case.grid), case.sums(codes))


def test_sums_up_to_the_end_of_int32(isa):
    columns = (2**31 - 1) // (255 * 128)
    case = random_layer(3, columns, 8, 8, group_size=columns, extreme=True)
    case.layer[7].zero_()
    x = torch.full((1, columns), 1e4)
    codes = torch.full((1, columns), 255)
    sums = ops.int4_accumulate(x, case.layer, case.grid)
    assert torch.equal(sums, case.sums(codes))
    assert sums.abs().max() > 2**30


@pytest.mark.parametrize('columns', [1, 15, 16, 47, 64, 200])
def test_codes_are_those_of_the_simulation_at_ties(isa, columns):
    scale = torch.rand(columns) + 0.01
    offset = torch.randn(columns)
    inverse = scale.reciprocal()
    shift = offset * -inverse
    ties = torch.arange(-3, 19)[:, None] + 0.5
    x = ties * scale + offset
    away = torch.full_like(x, torch.inf)
    x = torch.cat((x, torch.nextafter(x, away), torch.nextafter(x, -away)))
    for low, high in ((0, 15), (-8, 7), (0, 255), (3, 3), (-(2**15), -(2**15) + 200)):
        codes = ops.quantize_codes(x, inverse, shift, [low, high], NO_TABLE)
        simulated = quantize(x, scale, offset, low, high) - low
        assert codes.dtype == torch.uint8
        assert torch.equal(codes.float(), simulated)


@pytest.mark.parametrize('columns', [3, 80])
def test_extreme_values_get_the_last_codes_and_nan_the_first(isa, columns):
    one, zero = torch.ones(columns), torch.zeros(columns)
    values = torch.tensor([torch.inf, -torch.inf, 3e38, -3e38, 5e9, -5e9, torch.nan])
    codes = ops.quantize_codes(values[:, None].expand(-1, columns), one, zero, [-8, 7], NO_TABLE)
    assert codes[:, 0].tolist() == [15, 0, 15, 0, 15, 0, 0]
    assert torch.equal(codes, codes[:, :1].expand(-1, columns))


@pytest.mark.parametrize('levels', [0, 16])
def test_nan_in_a_layer_is_code_zero(isa, levels):
    case = random_layer(66, 50, levels=levels)
    x = random_input(case, 4)
    x[1, 7] = torch.nan
    out = ops.int4_linear(x, case.layer, case.grid)
    assert torch.equal(out, reference.int4_linear(x, case.layer, case.grid))
    assert out.isfinite().all()


@settings(max_examples=20, deadline=None)
@given(st.data(), SEEDS)
def test_strides_do_not_matter(data, seed):
    case = random_layer(65, 37, seed=seed, levels=data.draw(st.sampled_from([0, 16])))
    x = random_input(case, 6, 3, seed=seed)
    expected = ops.int4_linear(x, case.layer, case.grid)
    strided = torch.empty(3, 37, 12).permute(2, 0, 1)[::2].copy_(x)
    assert not strided.is_contiguous()
    layer = list(case.layer)
    index = data.draw(st.integers(0, 8))
    layer[index] = torch.stack((layer[index], layer[index]), -1)[..., 0]
    assert torch.equal(ops.int4_linear(strided, layer, case.grid), expected)


@pytest.mark.parametrize(('rows', 'columns', 'outputs'), [(1, 64, 200), (700, 200, 330)])
def test_threads_do_not_matter(threads, rows, columns, outputs):
    case = random_layer(outputs, columns)
    x = random_input(case, rows)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(ops.int4_linear(x, case.layer, case.grid))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_no_rows_give_an_empty_result(isa):
    case = random_layer(5, 9)
    assert ops.int4_linear(torch.empty(0, 9), case.layer, case.grid).shape == (0, 5)
    assert ops.int4_linear(torch.empty(2, 0, 9), case.layer, case.grid).shape == (2, 0, 5)
    assert ops.quantize_codes(torch.empty(0, 9), *case.layer[:2], [0, 15], NO_TABLE).shape == (0, 9)
    assert ops.int4_linear(torch.ones(9), case.layer, case.grid).shape == (5,)


def changed(case, **fields):
    """The layer of a case with some tensors replaced, by name."""
    tensors = dict(zip(reference.LAYER_FIELDS, case.layer, strict=True))
    for name, change in fields.items():
        tensors[name] = change(tensors[name])
    return list(tensors.values())


def set_first(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


CASE = random_layer(70, 40)
X = random_input(CASE, 3)
BAD_LAYERS = {
    'too few tensors': (CASE.layer[:7], CASE.grid, 'layer must be the 9 tensors'),
    'short grid': (CASE.layer, [0, 15], r'grid must be \[code_min, code_max, group_size\]'),
    'codes beyond a byte': (CASE.layer, [0, 256, 32], 'codes must fit a byte'),
    'no codes': (CASE.layer, [1, 0, 32], r'codes must fit a byte.*got 1\.\.0'),
    'codes far away': (CASE.layer, [-(2**40), -(2**40), 32], 'codes must fit a byte'),
    'no group': (CASE.layer, [0, 15, 0], 'group_size must be at least 1, got 0'),
    'no columns': (changed(CASE, inverse=lambda t: t[:0]), CASE.grid, 'got 0 columns and 70 rows'),
    'no rows': (changed(CASE, row_scale=lambda t: t[:0]), CASE.grid, 'got 40 columns and 0 rows'),
    'double scale': (
        changed(CASE, row_scale=torch.Tensor.double),
        CASE.grid,
        'row_scale must be float32, got float64',
    ),
    'float weight': (
        changed(CASE, weight=torch.Tensor.float), CASE.grid, 'weight must be uint8 or int8'
    ),
    'long position': (
        changed(CASE, position=torch.Tensor.long), CASE.grid, 'position must be int32, got int64'
    ),
    'weight of another width': (
        changed(CASE, weight=lambda t: t[..., :16]),
        CASE.grid,
        r'weight must have shape \[2, 40, 32\], got \[2, 40, 16\]',
    ),
    'bytes said to be nibbles': (
        changed(CASE, weight=lambda t: t.to(torch.int8)), CASE.grid, r'shape \[2, 40, 64\]'
    ),
    'another group size': (CASE.layer, [0, 15, 16], r'multiplier must have shape \[2, 3, 64\]'),
    'short bias': (changed(CASE, bias=lambda t: t[1:]), CASE.grid, r'bias must have shape \[70\]'),
    'position too large': (
        changed(CASE, position=set_first(40)), CASE.grid, r'position must lie in 0\.\.39, got'
    ),
    'position negative': (
        changed(CASE, position=set_first(-1)), CASE.grid, r'position must lie in 0\.\.39, got -1'
    ),
    'multiplier zero': (
        changed(CASE, multiplier=set_first(0)), CASE.grid, r'multiplier must lie in 1\.\.15, got 0'
    ),
    'multiplier too large': (
        changed(CASE, multiplier=set_first(16)), CASE.grid, r'multiplier must lie in 1\.\.15'
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', BAD_LAYERS)
def test_a_bad_layer_is_named_in_the_same_words_everywhere(name):
    layer, grid, message = BAD_LAYERS[name]
    with pytest.raises(ValueError, match=message):
        ops.int4_linear(X, layer, grid)
    assert error_of(ops.int4_linear, X, layer, grid) == error_of(
        reference.int4_linear, X, layer, grid
    )


@pytest.mark.parametrize(
    ('x', 'message'),
    [
        (X.double(), 'the input must be one of float32, float16, bfloat16, got float64'),
        (X.long(), 'got int64'),
        (X[:, 1:], 'the input has 39 columns, the layer takes 40'),
        (torch.tensor(1.0), 'at least one axis'),
    ],
)
def test_a_bad_input_is_named_in_the_same_words_everywhere(x, message):
    with pytest.raises(ValueError, match=message):
        ops.int4_linear(x, CASE.layer, CASE.grid)
    assert error_of(ops.int4_linear, x, CASE.layer, CASE.grid) == error_of(
        reference.int4_linear, x, CASE.layer, CASE.grid
    )


def test_sums_that_could_exceed_int32_are_refused():
    columns = 70000
    case = random_layer(1, columns, 8, 8, group_size=columns)
    x = torch.zeros(1, columns)
    message = 'sums over 70000 columns of codes up to 255 can exceed int32'
    for function in (ops.int4_linear, reference.int4_linear):
        with pytest.raises(ValueError, match=message):
            function(x, case.layer, case.grid)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(inverse=torch.ones(4)), r'inverse must have shape \[5\], got \[4\]'),
        (dict(shift=torch.ones(5).half()), 'shift must be float32, got float16'),
        (dict(grid=[0]), r'grid must be \[code_min, code_max, ...\]'),
        (dict(grid=[0, 300]), 'codes must fit a byte'),
    ],
)
def test_bad_grids_of_quantize_codes(changes, message):
    ones = torch.ones(5)
    given = dict(x=torch.ones(2, 5), inverse=ones, shift=ones, grid=[0, 15], table=NO_TABLE)
    for function in (ops.quantize_codes, reference.quantize_codes):
        with pytest.raises(ValueError, match=message):
            function(**{**given, **changes})


def in_new_process(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, '-c', code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


BACKEND = 'from gplq_mm.ops import native; print(native.backend())'


@needs_kernels
def test_the_environment_chooses_the_instruction_set():
    assert in_new_process(BACKEND, GPLQ_MM_ISA='portable').stdout.strip() == 'portable'
    assert in_new_process(BACKEND, GPLQ_MM_ISA='').stdout.strip() == ISAS[-1]


@needs_kernels
def test_an_unknown_instruction_set_is_an_error():
    answer = in_new_process(BACKEND, GPLQ_MM_ISA='avx1024')
    assert answer.returncode != 0
    last = answer.stderr.strip().splitlines()
    message = "GPLQ_MM_ISA asks for the instruction set 'avx1024'; this machine and build have"
    assert any(message in line and 'portable' in line for line in last)
    with pytest.raises(ValueError, match='avx1024'), native.use_isa('avx1024'):
        pass


@needs_kernels
def test_use_isa_returns_to_what_was_before():
    before = native.backend()
    with native.use_isa('portable'):
        assert native.backend() == 'portable'
    assert native.backend() == before
