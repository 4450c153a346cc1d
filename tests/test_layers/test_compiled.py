"""The compiled kernels in place of the simulation: the same numbers, and only inside."""

import pytest
import torch
from builders import build_quantized, images
from packed_models import assert_close_but_for_flips
from torch.utils._python_dispatch import TorchDispatchMode

from gplq_mm.layers import (
    QuantAttention,
    compiled_products,
    find_blocks,
    quant_layers,
    weights_disabled,
)
from gplq_mm.ops import native
from gplq_mm.ptq import RoundToNearest, round_weights

KINDS = ('vit', 'swin', 'resnet')
needs_kernels = pytest.mark.skipif(
    not native.is_loaded(), reason='gplq_mm was installed without kernels'
)


class Ops(TorchDispatchMode):
    """Counts calls of our ops."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func.name().partition('::')
        if namespace == 'gplq_mm':
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def finished(kind, policy=None):
    model = build_quantized(kind, policy)
    round_weights(model, RoundToNearest())
    return model


def counted(model):
    with Ops() as ops, torch.no_grad():
        output = model(images())
    return output, {k: v for k, v in ops.counts.items() if k.startswith('int4')}


@needs_kernels
@pytest.mark.parametrize('kind', KINDS)
def test_every_product_runs_in_a_kernel_and_gives_the_same(kind):
    model = finished(kind)
    expected, ops = counted(model)
    assert ops == {}
    with compiled_products(model):
        output, ops = counted(model)
    assert torch.equal(output, expected)
    attentions = sum(isinstance(module, QuantAttention) for module in model.modules())
    assert ops.get('int4_attention', 0) == attentions
    assert sum(ops.values()) == attentions + len(quant_layers(model))
    assert counted(model)[1] == {}
    assert not any('forward' in m.__dict__ or 'attend' in m.__dict__ for m in model.modules())


@needs_kernels
@pytest.mark.parametrize('kind', ['vit', 'swin'])
def test_latent_weights_share_the_attention(kind):
    model = finished(kind)
    with weights_disabled(model):
        expected = counted(model)[0]
        with compiled_products(model):
            output, ops = counted(model)
    assert set(ops) == {'int4_attention'}
    assert torch.equal(output, expected)


@needs_kernels
def test_part_of_a_model():
    model = finished('vit')
    expected = counted(model)[0]
    block = find_blocks(model)[0]
    with compiled_products(model.get_submodule(block)):
        output, ops = counted(model)
    assert ops == {'int4_attention': 1, 'int4_linear': 4}
    assert torch.equal(output, expected)


@pytest.mark.parametrize(
    'policy',
    [
        dict(preset='paper'),
        dict(weight=dict(group_scale='float')),
        dict(exclude=[r'\.probs$']),
    ],
    ids=['raw', 'float groups', 'float probs'],
)
def test_what_has_no_kernel_stays(policy):
    model = finished('vit', policy)
    expected = counted(model)[0]
    with compiled_products(model):
        assert_close_but_for_flips(counted(model)[0], expected)


def test_layers_that_learn_stay():
    model = build_quantized('vit', freeze=False)
    expected = model(images())
    with compiled_products(model):
        output = model(images())
        output.sum().backward()
        assert torch.equal(output, expected)
    assert all(q.grad is not None for q in model.parameters() if q.requires_grad)


def test_an_error_inside_leaves_nothing_behind():
    model = finished('vit')
    with pytest.raises(RuntimeError, match='inside'), compiled_products(model):
        raise RuntimeError('inside')
    assert counted(model)[1] == {}


def test_nothing_happens_without_kernels(monkeypatch):
    model = finished('vit')
    monkeypatch.setattr(native, '_loaded', False)
    with compiled_products(model):
        assert counted(model)[1] == {}
