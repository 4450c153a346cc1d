"""From costs and widths to rules of a policy."""

import pytest
import torch
import torch.multiprocessing as mp
from builders import build_float, build_quantized, images
from noise_ranks import WIDTHS as WIDTHS_OF_RANKS
from noise_ranks import model as noise_model
from noise_ranks import noise_on_rank
from noise_ranks import rows as noise_rows
from packed_models import fill_compensations, quantized_classifier, run_config

from gplq_mm.analysis import BudgetError, activation_statistics, mean_bits
from gplq_mm.analysis.sites import quant_sites
from gplq_mm.analysis.sizes import code_sizes, other_bytes, weight_counts
from gplq_mm.analysis.suggestion import Budget, policy_rules
from gplq_mm.analysis.widths import activation_noise, weight_noise
from gplq_mm.deploy import save
from gplq_mm.layers import quant_layers, quantize_model
from gplq_mm.ptq import RoundToNearest
from gplq_mm.quant import QuantPolicy

WIDTHS = (2, 3, 4, 6, 8)


def test_costs_follow_the_power_of_the_rounding_error():
    """Key 0 stands for the present widths, which may be several."""
    sizes = {'a': {2: 20, 4: 40, 8: 80}}
    noise = {'a': {0: 2.0, 2: 8.0, 4: 2.0, 8: 0.5}}
    for limit, bits, cost in ((20, 2, 12.0), (40, 4, 3.0), (80, 8, 0.75)):
        found = Budget(sizes, limit, 40, str).spend({'a': 3.0}, noise, {'a': 4})
        assert (found['bits'], found['cost'], found['cost_now']) == ({'a': bits}, cost, 3.0)


@torch.no_grad()
def test_noise_falls_with_the_width():
    model = build_quantized('vit')
    weights = weight_noise(model, WIDTHS, RoundToNearest())
    assert set(weights) == set(quant_layers(model))
    activations = activation_noise(model, images(4, seed=3), model, WIDTHS)
    assert set(activations) == set(quant_sites(model))
    for name, noise in {**weights, **{f'a {n}': v for n, v in activations.items()}}.items():
        values = [noise[bits] for bits in WIDTHS]
        assert values == sorted(values, reverse=True), name
        assert 0 < values[-1] < values[0] < 3, name
        # A bit is worth 6 dB for uniform noise, and less where values are clipped.
        assert 3 < values[2] / values[3] < 40, name


@torch.no_grad()
def test_noise_of_the_present_width():
    rules = [dict(pattern=r'layers\.0\.attn\.v$', activation=dict(bits=8))]
    model = build_quantized('vit', policy=dict(rules=rules))
    noise = activation_noise(model, images(4, seed=3), model, (4, 8))
    assert noise['backbone.layers.1.attn'][0] == noise['backbone.layers.1.attn'][4]
    mixed = noise['backbone.layers.0.attn']
    assert mixed[8] < mixed[0] < mixed[4]
    head = 'head.layers.head'
    assert noise[head][0] == noise[head][8]


def test_a_rank_that_does_not_reach_a_layer(tmp_path):
    mp.spawn(noise_on_rank, (str(tmp_path),), nprocs=2)
    net = noise_model()
    with torch.no_grad():
        whole = activation_noise(net, noise_rows(), net, WIDTHS_OF_RANKS)
    first, second = (torch.load(tmp_path / f'{rank}.pth') for rank in range(2))
    assert first == second
    assert first['second'] == pytest.approx(whole['second'])
    assert first['first'] == pytest.approx(whole['first'], rel=0.02)


@torch.no_grad()
def test_noise_of_reparametrized_layers():
    model = build_quantized('vit', policy=dict(preset='repq'))
    noise = activation_noise(model, images(4, seed=3), model, (4, 8))
    assert all(0 < value[8] < value[4] for value in noise.values())


@torch.no_grad()
def test_noise_does_not_change_the_model():
    model = build_quantized('swin')
    before = model(images())
    weight_noise(model, (3, 4), RoundToNearest())
    activation_noise(model, images(seed=3), model, (3, 4))
    assert torch.equal(model(images()), before)


def test_suggestion_meets_its_budget():
    noise = {'a': {0: 1.0, 2: 9.0, 4: 2.0, 8: 1.0}, 'b': {0: 1.0, 2: 1.0, 4: 0.5, 8: 0.4}}
    sizes = {name: {bits: 10 * bits for bits in (2, 4, 8)} for name in noise}
    found = Budget(sizes, 60, 160, str).spend({'a': 1.0, 'b': 1.0}, noise, {'a': 8, 'b': 8})
    assert (found['bits'], found['size'], found['cost']) == ({'a': 4, 'b': 2}, '60', 3.0)
    assert (found['budget'], found['size_now']) == ('60', '160')


def test_the_message_names_the_range():
    sizes = {'a': {2: 20, 8: 80}, 'b': {2: 20, 8: 80}}
    Budget(sizes, 40, 40, str)
    with pytest.raises(BudgetError, match=r'budget of 1\.0 bits.*2\.0 bits to 8\.0 bits'):
        Budget(sizes, 20, 40, lambda size: f'{size / 20} bits')


def test_rules_give_exactly_these_widths():
    names = ['a.layers.1', 'a.layers.11', 'a.attn']
    kinds = dict(zip(names, ('linear', 'linear', 'attention'), strict=True))
    rules = policy_rules(
        kinds,
        {'a.layers.1': 3},
        {'a.layers.1': 6, 'a.attn': 8},
    )
    assert len(rules) == 2
    policy = QuantPolicy(rules=rules)
    first = policy.resolve('a.layers.1', 'linear')
    assert (first.weight.bits, first.activation.bits) == (3, 6)
    for other in ('a.layers.11', 'b.a.layers.1', 'a.layers.1.x'):
        spec = policy.resolve(other, 'linear')
        assert (spec.weight.bits, spec.activation.bits) == (4, 4)
    for operand in ('q', 'k', 'v', 'probs'):
        assert policy.resolve(f'a.attn.{operand}', operand).activation.bits == 8
    assert policy.resolve('a.attn.qkv', 'linear').activation.bits == 4


@torch.no_grad()
@pytest.mark.parametrize('kind', ['vit', 'swin', 'resnet'])
def test_rules_round_trip_through_a_model(kind):
    model = build_quantized(kind)
    sites = quant_sites(model)
    weights = {name: WIDTHS[i % 5] for i, name in enumerate(weight_counts(model))}
    activations = {name: WIDTHS[(i + 2) % 5] for i, name in enumerate(sites)}
    rules = policy_rules({n: site.kind for n, site in sites.items()}, weights, activations)
    other = build_float(kind)
    quantize_model(other, QuantPolicy(rules=rules))
    for name, site in quant_sites(other).items():
        assert site.weight is None or site.weight.spec.bits == weights[name]
        assert {q.spec.bits for q in site.activations.values()} == {activations[name]}
    statistics = activation_statistics(model, [images()], model)
    values = {name: value['values'] for name, value in statistics.items()}
    bits = mean_bits(other, values)
    counts = weight_counts(other)
    mean = sum(weights[n] * counts[n] for n in counts) / sum(counts.values())
    assert bits['weights'] == pytest.approx(mean)
    mean = sum(activations[n.rpartition('.')[0]] * v for n, v in values.items()) / sum(
        values.values()
    )
    assert bits['activations'] == pytest.approx(mean)


@pytest.mark.parametrize('kind', ['vit', 'swin', 'resnet'])
def test_bytes_are_those_of_a_packed_file(kind, tmp_path):
    rules = [
        dict(pattern=r'layers\.0\.|blocks\.0\.|layer1\.', weight=dict(bits=3), optional=True),
        dict(pattern=r'layers\.1\.ffn|blocks\.1\.|layer2\.', weight=dict(bits=6), optional=True),
    ]
    model = quantized_classifier(kind, dict(rules=rules), dict(type='QwT'))
    fill_compensations(model)
    sizes = save(model, run_config(kind), tmp_path / 'packed.safetensors')
    codes = code_sizes(model, WIDTHS)
    layers = quant_layers(model)
    total = sum(codes[name][layer.weight_quantizer.spec.bits] for name, layer in layers.items())
    assert total == sizes.parts['weight codes']
    expected = sum(sizes.parts.values()) - sizes.parts['compensation']
    assert total + other_bytes(model) == expected
