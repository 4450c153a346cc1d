"""The Triton kernels of training compiled, without a GPU, for the devices they are meant for."""

import re
from importlib.util import find_spec

import pytest
import torch
from triton_targets import SHARED, CompileOnly

pytestmark = pytest.mark.skipif(find_spec('triton') is None, reason='triton is not installed')

GRID, WIDE_GRID, FINE = [0, 15, 4], [-8, 7, 12], [0, 63, 10]
NO_TABLE, TABLE = torch.empty(0, dtype=torch.uint8), torch.arange(64, dtype=torch.uint8)


@pytest.fixture(scope='module')
def ops():
    import triton

    from gplq_mm.ops import triton_common, triton_training

    if triton.knobs.runtime.interpret or triton_common.INTERPRETED:
        pytest.skip('TRITON_INTERPRET is set: kernels are interpreted in this process')
    return triton_training


@pytest.fixture(params=SHARED)
def compiler(request, monkeypatch, tmp_path):
    with CompileOnly(monkeypatch, request.param, tmp_path) as entered:
        yield entered


def check(compiler, *names):
    """The kernels that were launched, and what holds of all of them."""
    assert compiler.names == list(names)
    for name, compiled in compiler.launched:
        ptx = compiled.asm['ptx']
        assert compiled.metadata.shared <= SHARED[compiler.capability], name
        # Rounding once or twice is written in the kernel, never the compiler's choice.
        assert not re.search(r'\b(mad\S*|add|mul|sub)\.f32', ptx), name
        # Every run adds in the same order.
        assert not re.search(r'\b(atom|red)\.', ptx), name


# A linear layer, heads of attention in two bytes a state, and both with levels.
@pytest.mark.parametrize(
    ('shape', 'scale_shape', 'dtype', 'table', 'grid'),
    [
        ((64, 197, 384), (384,), torch.float32, NO_TABLE, GRID),
        ((8, 6, 197, 64), (6, 1, 1), torch.bfloat16, NO_TABLE, WIDE_GRID),
        ((64, 197, 384), (384,), torch.bfloat16, TABLE, FINE),
        ((8, 6, 197, 64), (6, 1, 1), torch.float32, TABLE.expand(6, 64), FINE),
    ],
)
def test_fake_quant(ops, compiler, shape, scale_shape, dtype, table, grid):
    x, scale = torch.empty(shape, dtype=dtype), torch.ones(scale_shape)
    quantizer = scale, scale, table, grid
    _, state = ops.fake_quant(x, *quantizer)
    ops.fake_quant_values(state, *quantizer)
    ops.fake_quant_backward(x, state, *quantizer)
    check(compiler, 'encode_kernel', 'decode_kernel', 'fake_quant_backward_kernel')
    for name, compiled in compiler.launched:
        # Sixteen bytes a thread and instruction.
        for access in ('ld', 'st'):
            assert re.search(rf'{access}\.global\.v4\.b32', compiled.asm['ptx']), (name, access)
        if name != 'fake_quant_backward_kernel':
            assert 'fma.rn.f32' in compiled.asm['ptx']


@pytest.mark.parametrize(('table', 'grid'), [(NO_TABLE, GRID), (TABLE, FINE)])
def test_gelu(ops, compiler, table, grid):
    x, scale = torch.empty(64, 1536, dtype=torch.float16), torch.ones(1536)
    ops.gelu_fake_quant(x, scale, None, table, grid)
    ops.gelu_fake_quant_backward(x.float(), x, scale, None, table, grid)
    check(compiler, 'gelu_kernel', 'gelu_backward_kernel')


# Tokens of DeiT, and of Swin with windows of 7, a bias and a mask.
@pytest.mark.parametrize(('tokens', 'added'), [(197, False), (49, True)])
@pytest.mark.parametrize(('table', 'grid'), [(NO_TABLE, GRID), (TABLE.expand(3, 64), FINE)])
def test_softmax(ops, compiler, tokens, added, table, grid):
    scores, scale = torch.empty(4, 3, tokens, tokens), torch.ones(1)
    bias, mask = (scores[0], scores[:2, 0]) if added else (None, None)
    rest = (0.125, bias, mask, scale, None, table, grid, True)
    ops.softmax_fake_quant_(scores, *rest)
    ops.softmax_fake_quant_backward_(torch.empty_like(scores), scores, *rest)
    check(compiler, 'softmax_kernel', 'softmax_backward_kernel')


def test_odd_sizes_compile(ops, compiler):
    """Those that are 1, which Triton makes constants of, and those that no vector fits."""
    for shape, scale_shape in [((1,), ()), ((3, 1), (3, 1)), ((1, 1, 5, 5), (1, 1, 1))]:
        x, scale = torch.empty(shape), torch.ones(scale_shape)
        _, state = ops.fake_quant(x, scale, None, NO_TABLE, GRID)
        ops.fake_quant_backward(x, state, scale, None, NO_TABLE, GRID)
    scores = torch.empty(1, 1, 1, 1)
    rest = (scores[0], scores[0], scale, None, NO_TABLE, GRID, False)
    ops.softmax_fake_quant_(scores, 1.0, *rest)
    check(compiler, *['encode_kernel', 'fake_quant_backward_kernel'] * 3, 'softmax_kernel')
