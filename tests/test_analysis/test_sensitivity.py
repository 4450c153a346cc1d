"""Effect of one layer alone on the output of the network."""

import pytest
import torch
from builders import build_quantized, images
from packed_models import fill_compensations

from gplq_mm.analysis import network_sensitivity
from gplq_mm.analysis.replay import Replay
from gplq_mm.analysis.sensitivity import number_of_steps
from gplq_mm.analysis.sites import quant_sites, switched_on
from gplq_mm.layers import learn_weights, quantizers_disabled
from gplq_mm.ptq import RoundToNearest, round_weights

BATCHES = [images(3, seed=4), images(1, seed=5)]


def quantized(kind, policy=None):
    model = build_quantized(kind, policy=policy)
    round_weights(model, RoundToNearest())
    return model


def observing(model):
    return lambda batch: {'logits': [model(batch)]}


@torch.no_grad()
@pytest.mark.parametrize('kind', ['vit', 'swin', 'resnet'])
def test_against_whole_forwards(kind):
    model = quantized(kind)
    result = network_sensitivity(model, BATCHES, observing(model))
    assert result['metric'] == 'kl'
    x = torch.cat(BATCHES)
    with quantizers_disabled(model):
        exact = model(x).double()
        for name, site in quant_sites(model).items():
            for part in ('weights', 'activations'):
                if part == 'weights' and site.kind == 'attention':
                    assert part not in result['sites'][name]
                    continue
                with switched_on(site.quantizers(part == 'weights', part == 'activations')):
                    value = model(x).double()
                difference = (value - exact).square().sum() / exact.square().sum()
                p = exact.softmax(1)
                kl = (p * (exact.log_softmax(1) - value.log_softmax(1))).sum(1).mean()
                found = result['sites'][name][part]
                assert found['logits'] == pytest.approx(difference.item(), rel=1e-3, abs=1e-10)
                assert found['kl'] == pytest.approx(kl.item(), rel=1e-3, abs=1e-10)
                assert result['cost'][name][part] == found['kl']
    value = model(x).double()
    difference = (value - exact).square().sum() / exact.square().sum()
    assert result['all']['logits'] == pytest.approx(difference.item(), rel=1e-3)
    assert result['all_cost'] == result['all']['kl']


@torch.no_grad()
@pytest.mark.parametrize('part', ['weights', 'activations'])
def test_a_layer_of_two_bits_ranks_first(part):
    name = 'backbone.layers.1.ffn.layers.1'
    key = {'weights': 'weight', 'activations': 'activation'}[part]
    rules = [dict(pattern=rf'{name}$', **{key: dict(bits=2)})]
    model = quantized('vit', dict(rules=rules))
    cost = network_sensitivity(model, BATCHES, observing(model))['cost']
    ranking = sorted((n for n in cost if part in cost[n]), key=lambda n: -cost[n][part])
    assert ranking[0] == name


@torch.no_grad()
def test_steps_are_as_many_as_announced():
    model, steps = quantized('vit'), []
    network_sensitivity(model, BATCHES, observing(model), lambda: steps.append(1))
    assert len(steps) == len(BATCHES) * number_of_steps(model)


@torch.no_grad()
def test_what_lies_before_is_not_computed_again():
    model = quantized('vit')
    first = model.backbone.layers[0]
    calls = []
    handle = first.ffn.register_forward_hook(lambda *_: calls.append(1))
    network_sensitivity(model, BATCHES[:1], observing(model))
    handle.remove()
    inside = [name for name in quant_sites(model) if name.startswith('backbone.layers.0.')]
    before = ['backbone.patch_embed.projection']
    parts = sum(2 if site.weight is not None else 1 for site in quant_sites(model).values())
    # The float model, everything quantized, and the parts of the block and of what comes first.
    assert len(calls) == 2 + 2 * (len(inside) - 1) + 1 + 2 * len(before)
    assert len(calls) < parts


@torch.no_grad()
def test_it_leaves_no_trace():
    model = quantized('swin')
    before = model(BATCHES[0])
    network_sensitivity(model, BATCHES, observing(model))
    assert torch.equal(model(BATCHES[0]), before)
    assert not any('forward' in module.__dict__ for module in model.modules())


@torch.no_grad()
def test_everything_is_the_model_as_it_computes():
    """With its compensation, which belongs to the result of Stage 2."""
    model = build_quantized('vit', compensation=dict(type='QwT'))
    round_weights(model, RoundToNearest())
    fill_compensations(model)
    result = network_sensitivity(model, BATCHES, observing(model))
    x = torch.cat(BATCHES)
    value = model(x).double().log_softmax(-1)
    with quantizers_disabled(model):
        exact = model(x).double().log_softmax(-1)
    divergence = (exact.exp() * (exact - value)).sum(1).mean()
    assert result['all']['kl'] == pytest.approx(float(divergence), rel=1e-4)


@torch.no_grad()
def test_learned_weights_without_a_scale_are_left_alone():
    """Direct QAT before it has begun."""
    model = build_quantized('vit')
    learn_weights(model, 'row')
    result = network_sensitivity(model, BATCHES[:1], observing(model))
    assert all(set(parts) == {'activations'} for parts in result['sites'].values())
    assert result['all']['kl'] > 0


@torch.no_grad()
def test_without_logits_groups_of_tensors_are_added():
    model = quantized('swin')

    def observe(batch):
        feature = model.extract_feat(batch)[0]
        return {'maps': [feature, 2 * feature], 'others': [feature]}

    result = network_sensitivity(model, BATCHES, observe)
    assert result['metric'] == 'relative_squared_error'
    name = 'backbone.stages.0.blocks.0.ffn.layers.1'
    errors = result['sites'][name]['activations']
    assert errors['maps'] == pytest.approx(errors['others'], rel=1e-5)
    assert result['cost'][name]['activations'] == pytest.approx(2 * errors['maps'], rel=1e-5)


@torch.no_grad()
def test_units_that_run_twice_are_computed():
    class Twice(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            # The second run depends on everything in the first.
            return self.model(x + self.model(x).mean())

    model = Twice(quantized('vit'))
    result = network_sensitivity(model, BATCHES[:1], observing(model))
    name = 'model.backbone.layers.1.ffn.layers.1'
    with quantizers_disabled(model):
        exact = model(BATCHES[0]).double()
        with switched_on(quant_sites(model)[name].quantizers(True, False)):
            value = model(BATCHES[0]).double()
    difference = (value - exact).square().sum() / exact.square().sum()
    assert result['sites'][name]['weights']['logits'] == pytest.approx(difference.item(), rel=1e-3)


def test_units():
    model = build_quantized('swin')
    replay = Replay(model)
    assert replay.unit_of('backbone.stages.0.blocks.1.attn.w_msa.qkv') == (
        'backbone.stages.0.blocks.1'
    )
    reduction = 'backbone.stages.0.downsample.reduction'
    assert replay.unit_of(reduction) == reduction
    assert replay.unit_of('backbone.norm1') is None
