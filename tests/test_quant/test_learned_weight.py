"""The learned weight quantizer: LSQ's gradients, its states, and the integers it ends with."""

import pytest
import torch

from gplq_mm.quant import (
    LearnedWeightQuantizer,
    NotCalibratedError,
    PolicyError,
    QuantState,
    WeightSpec,
)

ROWS, COLUMNS, GROUP = 5, 11, 4
W = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) * 0.1
OUTER = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2))


def make(layout='raw', granularity='row', bits=4) -> LearnedWeightQuantizer:
    """Initialized quantizer; some of the weights are clipped."""
    spec = WeightSpec(bits=bits, layout=layout, group_size=GROUP)
    quantizer = LearnedWeightQuantizer(spec, (ROWS, COLUMNS), granularity, 'block.fc')
    generator = torch.Generator().manual_seed(3)
    scale = 0.01 + 0.01 * torch.rand(ROWS if granularity == 'row' else 1, generator=generator)
    multiplier, permutation = quantizer.multiplier, torch.arange(COLUMNS)
    if layout == 'folded':
        multiplier = torch.randint(1, 16, multiplier.shape, generator=generator)
        multiplier = multiplier.clamp(max=spec.max_multiplier)
        permutation = torch.randperm(COLUMNS, generator=generator)
    quantizer.initialize(scale, multiplier, permutation)
    return quantizer


def own_multiplier(quantizer) -> torch.Tensor:
    """Multiplier of every weight in the weight's own order, float64 ``(out, K)``, by loops."""
    result = torch.ones(ROWS, COLUMNS, dtype=torch.float64)
    for j, column in enumerate(quantizer.permutation.tolist()):
        result[:, column] = quantizer.multiplier[:, j // quantizer.group_size].double()
    return result


def reference(quantizer, scale, weight) -> torch.Tensor:
    """LSQ, eq. 1 and 2, in float64, by autograd alone."""
    step = scale * own_multiplier(quantizer)
    v = (weight / step).clamp(*quantizer.spec.code_range)
    return (v + (v.round() - v).detach()) * step


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize(
    ('layout', 'granularity'), [('raw', 'row'), ('raw', 'tensor'), ('folded', 'row')]
)
def test_gradients_are_those_of_lsq(layout, granularity, bits):
    quantizer = make(layout, granularity, bits)
    weight = W.clone().requires_grad_()
    out = quantizer(weight)
    (out * OUTER).sum().backward()

    exact_weight = W.double().requires_grad_()
    scale = quantizer.unit.double().requires_grad_()
    exact = reference(quantizer, scale, exact_weight)
    (exact * OUTER.double()).sum().backward()
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad)
    assert bits == 8 or (weight.grad == 0).any(), 'some weights should be clipped'
    # Section 2.2: 1 / sqrt(weights of a scale * largest code).
    count = COLUMNS if granularity == 'row' else ROWS * COLUMNS
    expected = scale.grad / (count * (2 ** (bits - 1) - 1)) ** 0.5
    torch.testing.assert_close(
        quantizer.ratio.grad.double() * quantizer.unit, expected, rtol=1e-4, atol=1e-6
    )
    assert quantizer.ratio.shape == ((ROWS, 1) if granularity == 'row' else (1, 1))


def test_under_sgd_the_scale_moves_as_in_lsq():
    quantizer = make()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1e-4)
    (quantizer(W) * OUTER).sum().backward()
    optimizer.step()
    scale = quantizer.unit.double().requires_grad_()
    (reference(quantizer, scale, W.double()) * OUTER).sum().backward()
    moved = -1e-4 * scale.grad / (COLUMNS * 7) ** 0.5
    torch.testing.assert_close(
        quantizer.scale().detach() - quantizer.unit, moved.float(), rtol=1e-3, atol=1e-8
    )


def test_under_adam_all_scales_move_by_the_same_factor():
    quantizer = make()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=1e-2)
    (quantizer(W) * OUTER).sum().backward()
    optimizer.step()
    change = (quantizer.scale() / quantizer.unit - 1).abs()
    torch.testing.assert_close(change, torch.full_like(change, 1e-2), rtol=1e-3, atol=0)


@pytest.mark.parametrize('use', [lambda q: q(W), lambda q: q.freeze(W)])
def test_uninitialized_says_what_to_do(use):
    quantizer = LearnedWeightQuantizer(WeightSpec(layout='raw'), (ROWS, COLUMNS), name='block.fc')
    assert quantizer.state == QuantState.UNCALIBRATED
    with pytest.raises(NotCalibratedError, match=r'block\.fc has no scale.*DirectQATLoop'):
        use(quantizer)


def test_initialization_keeps_parameters_in_place():
    quantizer = LearnedWeightQuantizer(WeightSpec(layout='raw'), (ROWS, COLUMNS))
    ratio, shapes = quantizer.ratio, {k: v.shape for k, v in quantizer.state_dict().items()}
    quantizer.initialize(torch.full((ROWS,), 0.5), quantizer.multiplier, quantizer.permutation)
    assert quantizer.state == QuantState.LEARNING
    assert quantizer.ratio is ratio
    assert {k: v.shape for k, v in quantizer.state_dict().items()} == shapes
    assert quantizer.scale().unique().tolist() == [0.5]


def test_frozen_has_no_gradient_and_cannot_start_again():
    quantizer = make()
    quantizer.freeze(W)
    assert quantizer.state == QuantState.FROZEN
    assert not any(parameter.requires_grad for parameter in quantizer.parameters())
    weight = W.clone().requires_grad_()
    quantizer(weight).sum().backward()
    assert weight.grad is not None
    assert quantizer.ratio.grad is None
    with pytest.raises(RuntimeError, match=r'block\.fc.*frozen'):
        quantizer.initialize(torch.ones(ROWS), quantizer.multiplier, quantizer.permutation)


def test_a_negative_scale_still_works_and_can_come_back():
    quantizer = make()
    with torch.no_grad():
        quantizer.ratio[0] = -1.0
    out = quantizer(W)
    assert out.isfinite().all()
    out.square().sum().backward()
    assert quantizer.ratio.grad[0] != 0
    assert (quantizer.freeze(W).row_scale > 0).all()
    assert (quantizer.ratio > 0).all()


@pytest.mark.parametrize('freeze', [True, False])
@pytest.mark.parametrize('layout', ['raw', 'folded'])
def test_state_is_saved(layout, freeze):
    quantizer = make(layout)
    with torch.no_grad():
        quantizer.ratio.mul_(1.1)
    if freeze:
        quantizer.freeze(W)
    other = LearnedWeightQuantizer(quantizer.spec, (ROWS, COLUMNS))
    other.load_state_dict(quantizer.state_dict())
    assert other.state == quantizer.state
    assert other.ratio.requires_grad == (not freeze)
    assert torch.equal(other(W), quantizer(W))


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize(
    ('layout', 'granularity'), [('raw', 'row'), ('raw', 'tensor'), ('folded', 'row')]
)
def test_ends_with_the_integers_that_it_simulated(layout, granularity, bits):
    quantizer = make(layout, granularity, bits)
    with torch.no_grad():
        quantizer.ratio.mul_(1 + 0.1 * torch.rand_like(quantizer.ratio))
        simulated = quantizer(W)
    value = quantizer.freeze(W)
    assert value.codes.dtype == torch.int8
    assert value.codes.shape == W.shape
    codes = (simulated.double() / quantizer.step().double()).round()
    assert torch.equal(value.integers().double(), codes * own_multiplier(quantizer))
    torch.testing.assert_close(value.dequantize(), simulated, rtol=1e-6, atol=0)
    if layout == 'raw':
        assert torch.equal(value.dequantize(), simulated)
        assert value.multiplier.unique().tolist() == [1]
        assert torch.equal(value.permutation, torch.arange(COLUMNS))


@pytest.mark.parametrize(
    ('layout', 'granularity', 'message'),
    [('raw', 'column', 'not one of row, tensor'), ('folded', 'tensor', 'layout="raw"')],
)
def test_granularities_that_do_not_exist(layout, granularity, message):
    with pytest.raises(PolicyError, match=message):
        LearnedWeightQuantizer(WeightSpec(layout=layout), (ROWS, COLUMNS), granularity, 'fc')
