"""All quantizers of a model at once."""

import pytest
import torch
from builders import build_float, build_quantized, images

import gplq_mm.quant.observers as observers
from gplq_mm.layers import (
    act_quantizers,
    calibrate,
    freeze_activations,
    is_calibrated,
    quantize_model,
    quantizers_disabled,
    require_frozen,
    weights_disabled,
)
from gplq_mm.ptq import RoundToNearest, quantize_weights, round_weights
from gplq_mm.quant import NotCalibratedError, QuantPolicy, QuantState


def fresh(**policy):
    model = build_float('vit')
    quantize_model(model, QuantPolicy(**policy))
    return model


@pytest.mark.parametrize('preset', ['gplq', 'paper'])
@torch.no_grad()
def test_calibration_sees_the_float_model(preset):
    # The paper's preset mixes observers of one and of two passes.
    model, passes = fresh(preset=preset), []
    expected = build_float('vit')
    expected.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k in expected.state_dict()}
    )

    def run_pass(index, count):
        passes.append((index, count))
        torch.testing.assert_close(model(images()), expected(images()), rtol=1e-5, atol=1e-5)

    assert not is_calibrated(model)
    calibrate(model, run_pass)
    assert passes == [(0, 2), (1, 2)]
    assert is_calibrated(model)
    assert not torch.allclose(model(images()), expected(images()))


@torch.no_grad()
def test_histograms_take_turns_in_bounded_memory(monkeypatch):
    policy = dict(activation=dict(bits=8))
    model, bounded = fresh(**policy), fresh(**policy)
    bounded.load_state_dict(model.state_dict())
    quantizers, held, passes = act_quantizers(bounded).values(), [], []

    def run_pass(index, count):
        passes.append((index, count))
        bounded(images())
        counts = [getattr(q.observer, 'counts', None) for q in quantizers]
        held.append(sum(c.nbytes for c in counts if c is not None))

    calibrate(model, lambda _index, _passes: model(images()))
    # As much as the largest alone; and blocks of two channels.
    largest = max(q.scale.numel() for q in quantizers) * 32 * 256 * 8
    monkeypatch.setattr(observers, 'BLOCK_BINS', 2 * 32 * 256)
    calibrate(bounded, run_pass, histogram_bytes=largest)
    assert held[0] == 0
    assert largest / 2 < max(held) <= largest
    assert passes == [(i, len(passes)) for i in range(len(passes))]
    assert 3 < len(passes) < len(quantizers)
    for name, value in model.state_dict().items():
        assert torch.equal(value, bounded.state_dict()[name]), name


@torch.no_grad()
def test_an_observer_of_three_passes_has_them_all(monkeypatch):
    counted = []
    monkeypatch.setattr(observers.MinMaxObserver, 'num_passes', 3)
    monkeypatch.setattr(
        observers.MinMaxObserver, '_count', lambda self, _: counted.append(self.finished_passes)
    )
    # The paper's preset has observers of two passes, too.
    model, passes = fresh(preset='paper'), []

    def run_pass(index, count):
        passes.append((index, count))
        model(images())

    calibrate(model, run_pass)
    assert passes == [(0, 3), (1, 3), (2, 3)]
    assert counted.count(1) == counted.count(2) > 0


def test_calibration_names_the_quantizer_that_saw_nothing():
    model = fresh()
    with torch.no_grad(), pytest.raises(ValueError, match=r'patch_embed\.projection\.input: .*saw'):
        calibrate(model, lambda _index, _passes: None)


def test_frozen_is_required_and_final():
    model = build_quantized('vit', freeze=False)
    with pytest.raises(NotCalibratedError, match='is LEARNING'):
        require_frozen(model)
    freeze_activations(model)
    require_frozen(model)
    assert {q.state for q in act_quantizers(model).values()} == {QuantState.FROZEN}
    with pytest.raises(RuntimeError, match='frozen'):
        calibrate(model, lambda _index, _passes: model(images()))
    with pytest.raises(NotCalibratedError):
        freeze_activations(fresh())


@torch.no_grad()
def test_switches_restore_what_they_found_even_after_an_error():
    model = build_quantized('vit', compensation=dict(type='QwT'))
    activations_only = model(images())
    quantize_weights(model, [images(seed=1), images(seed=2)], model, RoundToNearest())
    both = model(images())
    with weights_disabled(model):
        torch.testing.assert_close(model(images()), activations_only)
        with quantizers_disabled(model):
            latent = model(images())
        torch.testing.assert_close(model(images()), activations_only)
    assert torch.equal(model(images()), both)
    with pytest.raises(KeyError), quantizers_disabled(model):
        raise KeyError
    assert torch.equal(model(images()), both)
    assert not torch.allclose(latent, activations_only)


def test_plain_weight_rounding_of_the_paper_preset():
    model = build_quantized('vit', dict(preset='paper'))
    before = model(images())
    round_weights(model, RoundToNearest())
    assert not torch.equal(model(images()), before)
