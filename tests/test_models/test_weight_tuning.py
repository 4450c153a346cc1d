"""Training between the blocks of Stage 2."""

import copy
import itertools

import pytest
import torch
from builders import build_quantized, images
from torch.nn import functional as F

from gplq_mm.errors import SettingError
from gplq_mm.layers import find_blocks, quant_layers, quantizers_disabled, weights_disabled
from gplq_mm.models import NonFiniteLossError, WeightTuning, run_weight_ptq, tuning_settings
from gplq_mm.models.training_losses import require_finite
from gplq_mm.ptq import build_weight_ptq, quantize_weights

BATCHES = [images(8, seed) for seed in range(20, 24)]
WRAPPER = dict(
    type='OptimWrapper',
    constructor='gplq_mm.GPLQOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.0),
    quantizer=dict(lr=1.0, relative=True),
)


def quantized(kind: str = 'vit', policy: dict | None = None):
    """Quantized to two bits, so that there is something to make up for; and its outputs with float
    weights."""
    torch.manual_seed(0)
    model = build_quantized(kind, policy or dict(weight=dict(bits=2)))
    with torch.no_grad(), weights_disabled(model):
        targets = [model(batch) for batch in BATCHES]
    return model, targets


def tune(model, targets, loss=None, **settings) -> WeightTuning:
    settings = tuning_settings({'iters_per_block': 20, 'lr': 3e-4, **settings})
    mean_error = loss or (lambda pair: F.mse_loss(model(pair[0]), pair[1]))
    pairs = itertools.cycle(zip(BATCHES, targets, strict=True))
    return WeightTuning(model, settings, WRAPPER, mean_error, pairs)


def round_all(model, tuning=None) -> dict[str, torch.Tensor]:
    run_weight_ptq(model, BATCHES, model, build_weight_ptq(dict(type='RoundToNearest')), tuning)
    return {
        name: torch.cat((layer.weight_quantizer.integers().flatten(), layer.weight_quantizer.bias))
        for name, layer in quant_layers(model).items()
    }


def error_of(model, targets) -> float:
    with torch.no_grad():
        pairs = zip(BATCHES, targets, strict=True)
        return sum(float(F.mse_loss(model(batch), target)) for batch, target in pairs)


@pytest.mark.parametrize('kind', ['vit', 'swin', 'resnet'])
def test_what_is_float_makes_up_for_what_is_rounded(kind):
    model, targets = quantized(kind)
    plain = copy.deepcopy(model)
    round_all(plain)
    tuning = tune(model, targets)
    round_all(model, tuning)
    assert error_of(model, targets) < 0.8 * error_of(plain, targets)
    assert list(tuning.losses) == find_blocks(model)
    assert tuning.iterations == 20 * len(tuning.losses)


def test_only_what_is_not_rounded_yet_trains():
    model, targets = quantized()
    plain = round_all(copy.deepcopy(model))
    tuned = round_all(model, tune(model, targets))
    first = find_blocks(model)[0]
    for name, integers in plain.items():
        before = name.startswith(first) or 'patch_embed' in name
        assert torch.equal(tuned[name], integers) == before, name


@pytest.mark.parametrize('layout', ['folded', 'raw'])
def test_the_model_computes_what_stage_2_has_fitted(layout):
    model, targets = quantized(policy=dict(weight=dict(bits=2, layout=layout)))
    with tune(model, targets) as tuning:
        method = build_weight_ptq(dict(type='RoundToNearest'))
        quantize_weights(model, BATCHES, model, method, tuning=tuning)
        with torch.no_grad():
            expected = model(BATCHES[0])
    with torch.no_grad():
        assert torch.equal(model(BATCHES[0]), expected)


def test_an_optimizer_that_cannot_be_built_changes_nothing():
    model, targets = quantized()
    flags = [value.requires_grad for value in model.parameters()]
    tuning = tune(model, targets)
    tuning.optim_wrapper = dict(WRAPPER, constructor='NoSuchConstructor')
    with pytest.raises(KeyError, match='NoSuchConstructor'):
        round_all(model, tuning)
    assert [value.requires_grad for value in model.parameters()] == flags


def test_float_weights_and_all_else_are_what_they_were():
    model, targets = quantized()
    model.head.layers.head.bias.requires_grad_(False)
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad(), quantizers_disabled(model):
        latent = model(BATCHES[0])
    round_all(model, tune(model, targets))
    after = model.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert flags == {name: value.requires_grad for name, value in model.named_parameters()}
    assert all(value.grad is None for value in model.parameters())
    with torch.no_grad(), quantizers_disabled(model):
        assert torch.equal(model(BATCHES[0]), latent)


def test_running_statistics_stay():
    model, targets = quantized('resnet')
    before = {name: value.clone() for name, value in model.named_buffers() if 'running' in name}
    assert before
    round_all(model, tune(model, targets))
    after = dict(model.named_buffers())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_same_seed_same_integers():
    results = []
    for _ in range(2):
        model, targets = quantized()

        def noisy(pair, model=model):
            return F.mse_loss(model(pair[0] + 0.1 * torch.randn_like(pair[0])), pair[1])

        results.append(round_all(model, tune(model, targets, noisy)))
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


def test_a_failure_leaves_the_float_weights_as_they_were():
    model, targets = quantized()
    before = {name: value.clone() for name, value in model.named_parameters()}
    flags = [value.requires_grad for value in model.parameters()]
    count = itertools.count()

    def failing(pair):
        loss = F.mse_loss(model(pair[0]), pair[1])
        if next(count) == 3:
            loss = loss * torch.nan
        require_finite(loss, {})
        return loss

    with pytest.raises(NonFiniteLossError):
        round_all(model, tune(model, targets, failing))
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert [value.requires_grad for value in model.parameters()] == flags


def test_progress_counts_its_iterations():
    model, targets = quantized()
    told = []
    with tune(model, targets) as tuning:
        method = build_weight_ptq(dict(type='RoundToNearest'))
        quantize_weights(model, BATCHES, model, method, told.append, tuning=tuning)
    assert told[-1].remaining == pytest.approx(0, abs=1e-6)
    assert len([p for p in told if p.unit == find_blocks(model)[0]]) > 20


BAD = {
    'unknown key': (dict(iters=3), r"unknown key\(s\) \['iters'\]"),
    'no iteration': (dict(iters_per_block=0), r'iters_per_block=0 must be a whole number from 1'),
    'half an iteration': (dict(iters_per_block=1.5), r'weight_tuning=None rounds without'),
    'no rate': (dict(lr=0), r'weight_tuning\.lr=0 must be a positive number'),
}


@pytest.mark.parametrize('kind', BAD)
def test_settings_that_cannot_be_used(kind):
    settings, message = BAD[kind]
    with pytest.raises(SettingError, match=message):
        tuning_settings(settings)
    assert tuning_settings(None) is None
