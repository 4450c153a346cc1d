"""Rates of weights and quantizers."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from gplq_mm.layers import act_quantizers, calibrate, quantize_model
from gplq_mm.quant import QuantPolicy

RATE = 0.01


def trained_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4))
    quantize_model(model, QuantPolicy())
    # Channels whose ranges differ by orders of magnitude.
    x = torch.randn(64, 6) * torch.logspace(-3, 2, 6)
    calibrate(model, lambda *_: model(x))
    model(x).square().sum().backward()
    return model


def wrapper_of(model: nn.Module, **quantizer):
    return build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            constructor='gplq_mm.GPLQOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.0),
            quantizer={'lr': RATE, **quantizer},
        ),
    )


def test_relative_steps_are_those_of_the_grid():
    model = trained_model()
    optimizer = wrapper_of(model, relative=True).optimizer
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer.step()
    moved = {name: value.detach() - before[name] for name, value in model.named_parameters()}
    for name, quantizer in act_quantizers(model).items():
        scale, grid = before[f'{name}.scale'], quantizer.qmax - quantizer.qmin
        for key, unit in (('scale', scale), ('offset', scale * grid)):
            gradient = getattr(quantizer, key).grad
            # The first step of Adam is the rate, against the sign of the gradient.
            expected = -RATE * gradient.sign() * unit
            torch.testing.assert_close(moved[f'{name}.{key}'], expected, rtol=1e-3, atol=1e-7)
    assert moved['0.weight'].abs().max() == pytest.approx(1e-4, rel=1e-3)


def test_a_resumed_optimizer_makes_the_same_steps():
    results = []
    for interrupted in (False, True):
        model = trained_model()
        optimizer = wrapper_of(model, relative=True).optimizer
        optimizer.step()
        if interrupted:
            state = optimizer.state_dict()
            optimizer = wrapper_of(model, relative=True).optimizer
            optimizer.load_state_dict(state)
        optimizer.step()
        results.append([parameter.detach() for parameter in model.parameters()])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_weights_of_the_same_rate_take_absolute_steps():
    model = trained_model()
    before = model[0].weight.detach().clone()
    optimizer = wrapper_of(model, relative=True, lr=1e-4).optimizer
    assert [bool(group.get('relative')) for group in optimizer.param_groups] == [False, True]
    optimizer.step()
    assert (model[0].weight.detach() - before).abs().max() == pytest.approx(1e-4, rel=1e-3)


def test_steps_are_absolute_by_default():
    model = trained_model()
    optimizer = wrapper_of(model).optimizer
    scale = model[0].act_quantizer.scale
    before = scale.detach().clone()
    optimizer.step()
    expected = before - RATE * scale.grad.sign()
    torch.testing.assert_close(scale.detach(), expected, rtol=1e-3, atol=1e-6)
