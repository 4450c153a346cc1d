"""The ops as torch sees them: schemas, fake kernels, compilation, export, want of kernels."""

import logging

import pytest
import torch
from packed_layers import ISAS, random_layer
from torch import nn

from gplq_mm.ops import library, native, reference

ops = torch.ops.gplq_mm
EPS = 1e-6
FIRST, SECOND = random_layer(100, 48), random_layer(48, 100, levels=16)
CONV = random_layer(20, 3 * 4)
ONES = torch.ones(48)


def calls(dtype=torch.float32):
    """One call of every op of this file: name, arguments."""
    x = torch.randn(2, 5, 48, dtype=dtype)
    first, second = (FIRST.layer, FIRST.grid), (SECOND.layer, SECOND.grid)
    hidden = torch.randn(2, 5, 100, dtype=dtype)
    image = torch.randn(2, 3, 9, 8, dtype=dtype)
    return {
        'quantize_codes': (x, *FIRST.layer[:2], FIRST.grid, FIRST.layer[8]),
        'layer_norm': (x, ONES, ONES, EPS),
        'gelu': (x,),
        'int4_accumulate': (x, *first),
        'int4_linear': (x, *first),
        'int4_linear_add': (hidden, *second, x, ONES),
        'int4_norm_linear': (x, ONES, ONES, EPS, *first),
        'int4_mlp': (x, ONES, ONES, EPS, *first, *second, None),
        'int4_conv2d': (image, CONV.layer, CONV.grid, [2, 2, 2, 1, 1, 0, 1, 1]),
    }


@pytest.mark.parametrize('op', calls())
def test_opcheck(op):
    tests = ('test_schema', 'test_faketensor', 'test_aot_dispatch_dynamic')
    torch.library.opcheck(getattr(ops, op).default, calls()[op], test_utils=tests)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('op', calls())
def test_fake_kernels_give_shape_dtype_and_strides(op, dtype):
    args = calls(dtype)[op]
    real = getattr(ops, op)(*args)
    mode = torch._subclasses.FakeTensorMode()

    def fake(value):
        if isinstance(value, torch.Tensor):
            return mode.from_tensor(value)
        return [fake(item) for item in value] if isinstance(value, list) else value

    with mode:
        answer = getattr(ops, op)(*(fake(arg) for arg in args))
    assert (answer.shape, answer.dtype) == (real.shape, real.dtype)
    assert answer.stride() == real.stride()


class Block(nn.Module):
    """A module that calls the fused ops."""

    def __init__(self):
        super().__init__()
        for i, case in enumerate((FIRST, SECOND)):
            for name, tensor in zip(reference.LAYER_FIELDS, case.layer, strict=True):
                self.register_buffer(f'{name}{i}', tensor)

    def layer(self, i):
        return [getattr(self, f'{name}{i}') for name in reference.LAYER_FIELDS]

    def forward(self, x):
        x = ops.int4_mlp(
            x, ONES, ONES, EPS, self.layer(0), FIRST.grid, self.layer(1), SECOND.grid, None
        )
        hidden = ops.int4_linear(x, self.layer(0), FIRST.grid)
        return ops.int4_linear_add(hidden.relu(), self.layer(1), SECOND.grid, x, None) * 2


def test_compiles_into_one_graph_for_any_batch():
    block = Block()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend='aot_eager')
    for batch in (1, 3, 4):
        x = torch.randn(batch, 5, 48)
        assert torch.equal(compiled(x), block(x))


def test_exports_with_a_free_batch():
    block, batch = Block(), torch.export.Dim('batch', min=1, max=64)
    exported = torch.export.export(
        block, (torch.randn(2, 5, 48),), dynamic_shapes=({0: batch},)
    ).module()
    for size in (1, 7):
        x = torch.randn(size, 5, 48)
        assert torch.equal(exported(x), block(x))


def test_every_op_has_a_reference_and_a_fake_kernel():
    assert set(library.SCHEMAS) == set(library._FAKES)
    for name in library.SCHEMAS:
        assert callable(getattr(reference, name))


def test_plain_torch_announces_itself_once(monkeypatch, caplog):
    monkeypatch.setattr(native, '_loaded', False)
    monkeypatch.setattr(native, '_announced', set())
    run = library.announced(reference.int4_linear)
    args = calls()['int4_linear']
    with caplog.at_level(logging.WARNING, 'gplq_mm'):
        first, second = run(*args), run(*args)
    assert torch.equal(first, second)
    (record,) = caplog.records
    assert 'int4 ops on cpu run in plain torch' in record.message
    assert 'without its compiled kernels' in record.message
    assert native.backend() == 'torch'
    assert native.available_isas() == []


def test_kernels_that_do_not_load_are_an_error(monkeypatch):
    class Spec:
        origin = '/nowhere/_C.so'

    monkeypatch.setattr(native, '_loaded', False)
    monkeypatch.setattr(native.importlib.util, 'find_spec', lambda name: Spec)
    with pytest.raises(ImportError, match='install gplq_mm again'):
        native.load()


@pytest.mark.skipif(not ISAS, reason='installed without compiled kernels')
@pytest.mark.parametrize('op', calls())
def test_the_cpu_has_a_kernel_for_every_op(op, monkeypatch):
    def unexpected(device):
        raise AssertionError('plain torch ran')

    monkeypatch.setattr(native, 'announce_reference', unexpected)
    getattr(ops, op)(*calls()[op])
