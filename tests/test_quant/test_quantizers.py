"""Quantizer modules: states, and what a checkpoint makes of them."""

import copy

import pytest
import torch

from gplq_mm.quant import (
    ActQuantizer,
    ActSpec,
    NotCalibratedError,
    QuantizedWeight,
    QuantState,
    WeightQuantizer,
    WeightSpec,
)

DATA = torch.Generator().manual_seed(1)
X = torch.randn(64, 6, generator=DATA)


def calibrated(freeze=False, x=X, shape=(6,), **spec):
    quantizer = ActQuantizer(ActSpec(**spec), shape, 'block.fc.input')
    quantizer.observe()
    for _ in range(quantizer.observer.num_passes):
        assert torch.equal(quantizer(x), x)
        quantizer.observer.end_pass()
    quantizer.finish_observing()
    if freeze:
        quantizer.freeze()
    return quantizer


def test_states_come_in_order():
    quantizer = ActQuantizer(ActSpec(), (6,))
    assert quantizer.state == QuantState.UNCALIBRATED
    quantizer.observe()
    assert quantizer.state == QuantState.OBSERVING
    assert calibrated().state == QuantState.LEARNING
    assert calibrated(freeze=True).state == QuantState.FROZEN


def test_parameters_keep_their_identity():
    quantizer = ActQuantizer(ActSpec(observer='minmax'), (6,))
    scale, offset = quantizer.scale, quantizer.offset
    quantizer.observe()
    quantizer(X)
    quantizer.observer.end_pass()
    quantizer.finish_observing()
    assert quantizer.scale is scale
    assert quantizer.offset is offset
    torch.testing.assert_close(offset.detach(), X.amin(0))


@pytest.mark.parametrize('use', [lambda q: q(X), lambda q: q.codes(X), lambda q: q.freeze()])
def test_uncalibrated_says_what_to_do(use):
    with pytest.raises(NotCalibratedError, match=r'block\.fc\.input has no scale.*calibration'):
        use(ActQuantizer(ActSpec(), (6,), 'block.fc.input'))


def test_frozen_has_no_gradient_and_cannot_be_calibrated():
    quantizer = calibrated(freeze=True)
    x = X.clone().requires_grad_()
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None and not p.requires_grad for p in quantizer.parameters())
    with pytest.raises(RuntimeError, match=r'block\.fc\.input.*frozen'):
        quantizer.observe()


@pytest.mark.parametrize('zero_point', ['none', 'float', 'integer'])
def test_output_is_made_of_the_codes(zero_point):
    quantizer = calibrated(zero_point=zero_point)
    codes = quantizer.codes(X)
    low, high = quantizer.spec.code_range
    assert codes.min() >= low
    assert codes.max() <= high
    scale, offset = quantizer.grid()
    torch.testing.assert_close(quantizer(X), codes * scale + (0 if offset is None else offset))
    assert {name for name, _ in quantizer.named_parameters()} == (
        {'scale', 'offset'} if zero_point == 'float' else {'scale'}
    )


def test_learned_gradient_is_scaled_as_in_lsq():
    quantizer = calibrated(zero_point='none')
    quantizer(X).sum().backward()
    scale = quantizer.scale.detach().double().requires_grad_()
    steps = (X.double() / scale).clamp(-8, 7)
    ((steps + (steps.round() - steps).detach()) * scale).sum().backward()
    expected = scale.grad / (len(X) * 7) ** 0.5
    torch.testing.assert_close(quantizer.scale.grad.double(), expected, rtol=1e-4, atol=1e-6)


def test_a_negative_scale_still_works_and_can_come_back():
    quantizer = calibrated(zero_point='none')
    with torch.no_grad():
        quantizer.scale[0] = -1.0
    out = quantizer(X)
    assert torch.isfinite(out).all()
    out.square().sum().backward()
    assert torch.isfinite(quantizer.scale.grad).all()
    assert quantizer.scale.grad[0] != 0
    quantizer.freeze()
    assert (quantizer.scale > 0).all()


def test_disabled_is_the_identity():
    quantizer = calibrated()
    quantizer.enabled = False
    assert quantizer(X) is X


@pytest.mark.parametrize('freeze', [True, False])
@pytest.mark.parametrize('zero_point', ['none', 'float', 'integer'])
def test_state_is_saved(freeze, zero_point):
    quantizer = calibrated(freeze, zero_point=zero_point)
    other = ActQuantizer(ActSpec(zero_point=zero_point), (6,))
    other.load_state_dict(quantizer.state_dict())
    assert other.state == quantizer.state
    assert other.scale.requires_grad == (not freeze)
    assert torch.equal(other(X), quantizer(X))


def test_a_run_killed_while_observing_starts_again():
    quantizer = ActQuantizer(ActSpec(), (6,))
    quantizer.observe()
    quantizer(X)
    other = ActQuantizer(ActSpec(), (6,), 'x')
    other.load_state_dict(quantizer.state_dict())
    assert other.state == QuantState.UNCALIBRATED
    with pytest.raises(NotCalibratedError):
        other(X)


def test_another_number_of_tokens():
    quantizer = calibrated(x=torch.randn(2, 9, 4), shape=(9, 1), granularity='token')
    with pytest.raises(ValueError, match=r'9 scales along axis -2.*has 7'):
        quantizer(torch.randn(2, 7, 4))


def integers(**changes):
    generator = torch.Generator().manual_seed(2)
    options = dict(
        codes=torch.randint(-8, 8, (3, 10), generator=generator, dtype=torch.int8),
        row_scale=torch.rand(3, generator=generator),
        multiplier=torch.randint(1, 16, (3, 3), generator=generator, dtype=torch.uint8),
        permutation=torch.randperm(10, generator=generator),
        group_size=4,
    )
    return QuantizedWeight(**{**options, **changes})


def filled():
    quantizer = WeightQuantizer(WeightSpec(group_size=4), (3, 10), 'fc')
    quantizer.set(integers(), torch.randn(3))
    return quantizer


def test_weight_quantizer_holds_and_forgets():
    quantizer = WeightQuantizer(WeightSpec(group_size=4), (3, 10), 'fc')
    assert not quantizer.is_quantized
    assert not quantizer.state_dict()
    with pytest.raises(RuntimeError, match='run Stage 2 first'):
        _ = quantizer.value
    value = integers()
    quantizer.set(value, torch.randn(3))
    expected = torch.zeros(3, 10)
    for j, column in enumerate(value.permutation.tolist()):
        expected[:, column] = value.codes[:, j].float() * value.multiplier[:, j // 4].float()
    assert torch.equal(quantizer.integers(), expected)
    torch.testing.assert_close(value.dequantize(), expected * value.row_scale[:, None])
    other = integers(codes=torch.ones(3, 10, dtype=torch.int8))
    quantizer.set(other, torch.zeros(3))  # nothing of the first is left
    assert not torch.equal(quantizer.integers(), expected)
    quantizer.clear()
    assert not quantizer.is_quantized
    assert not quantizer.state_dict()


def test_weight_quantizer_is_saved_loaded_and_copied():
    quantizer = filled()
    quantizer.integers()
    clone = copy.deepcopy(quantizer)
    other = WeightQuantizer(quantizer.spec, (3, 10))
    other.load_state_dict(quantizer.state_dict())
    expected = quantizer.integers()
    quantizer.clear()
    for twin in (clone, other):
        assert torch.equal(twin.integers(), expected)
        assert twin.codes.dtype == torch.int8
    other.load_state_dict({})  # back to a checkpoint from before Stage 2
    assert not other.is_quantized


def test_weight_quantizer_is_loaded_onto_its_own_device():
    other = WeightQuantizer(WeightSpec(group_size=4), (3, 10)).to('meta')
    with pytest.warns(UserWarning, match='meta'):  # it stands for the GPU
        other.load_state_dict(filled().state_dict())
    assert {buffer.device.type for buffer in other.buffers()} == {'meta'}


@pytest.mark.parametrize(
    'changes',
    [
        dict(codes=torch.full((3, 10), 8, dtype=torch.int8)),
        dict(codes=torch.full((3, 10), -9, dtype=torch.int8)),
        dict(codes=torch.zeros(3, 9, dtype=torch.int8)),
        dict(group_size=5),
        dict(multiplier=torch.ones(3, 3)),
    ],
)
def test_weight_quantizer_checks_what_it_takes(changes):
    quantizer = WeightQuantizer(WeightSpec(group_size=4), (3, 10), 'block.fc')
    with pytest.raises(ValueError, match=r'block\.fc'):
        quantizer.set(integers(**changes), torch.zeros(3))
    assert not quantizer.is_quantized


def test_float_multipliers_are_held_as_they_are():
    spec = WeightSpec(group_size=4, group_scale='float')
    quantizer = WeightQuantizer(spec, (3, 10), 'block.fc')
    value = integers(multiplier=torch.rand(3, 3))
    quantizer.set(value, torch.zeros(3))
    other = WeightQuantizer(spec, (3, 10))
    other.load_state_dict(quantizer.state_dict())
    for holder in (quantizer, other):
        assert torch.equal(holder.value.multiplier, value.multiplier)
        assert torch.equal(holder.value.dequantize(), value.dequantize())
        sums = holder.integers().double().abs().sum(1)
        assert sums.max() <= holder.largest_row_sum() < sums.max() + 1
    with pytest.raises(ValueError, match=r"block\.fc.*uint8.*group_scale='float'"):
        quantizer.set(integers(), torch.zeros(3))
