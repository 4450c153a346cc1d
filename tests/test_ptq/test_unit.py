"""Whole units, as a method of reconstruction sees them."""

from dataclasses import replace

import pytest
import torch
from builders import build_quantized, images

from gplq_mm.layers import quant_layers, quant_units, weights_disabled
from gplq_mm.ptq import RoundToNearest, quantize_weights


class Halving(RoundToNearest):
    """Compares units with what they are told to be, and halves every scale."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def reconstruct(self, unit):
        values = {name: layer.weight_quantizer.value for name, layer in unit.layers.items()}
        matrices = {name: value.dequantize().requires_grad_() for name, value in values.items()}
        for calls, targets in zip(unit.inputs, unit.targets, strict=True):
            for call, target in zip(calls, targets, strict=True):
                args, kwargs = call
                out = unit.forward(call, matrices)
                torch.testing.assert_close(out, unit.module(*args, **kwargs), rtol=1e-3, atol=1e-4)
                with weights_disabled(unit.module):
                    torch.testing.assert_close(target, unit.module(*args, **kwargs))
        grads = torch.autograd.grad(out.square().sum(), list(matrices.values()))
        assert all(grad.isfinite().all() and grad.any() for grad in grads)
        for name, value in values.items():
            unit.store(name, replace(value, row_scale=value.row_scale / 2))
        self.seen.append(unit.module)


@pytest.mark.parametrize('kind', ['vit', 'swin', 'resnet'])
@pytest.mark.parametrize('layout', ['folded', 'raw'])
def test_a_method_sees_units_and_may_change_them(kind, layout):
    batches = (images(seed=1), images(seed=2))
    model = build_quantized(kind, policy=dict(weight=dict(layout=layout)))
    method = Halving()
    # No memory: inputs and targets come from the disk.
    quantize_weights(model, batches, model, method, memory_bytes=0)
    assert len(method.seen) == len(quant_units(model))
    halved = {name: layer.weight_quantizer.row_scale for name, layer in quant_layers(model).items()}
    quantize_weights(model, batches, model, RoundToNearest())
    for name, layer in quant_layers(model).items():
        assert torch.equal(halved[name] * 2, layer.weight_quantizer.row_scale)
