"""What activation quantizers do to their inputs."""

import math

import pytest
import torch
from builders import build_quantized, images

from gplq_mm.analysis import activation_statistics, scale_histogram
from gplq_mm.layers import act_quantizers, quant_layers, quantizers_disabled

BATCHES = [images(4, seed=4), images(1, seed=5)]


@torch.no_grad()
def test_by_hand():
    model = build_quantized('vit')
    result = activation_statistics(model, BATCHES, model)
    assert len(result) == len(act_quantizers(model))
    name = 'backbone.layers.1.ffn.layers.0.0'
    layer, inputs = quant_layers(model)[name], []
    handle = layer.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    with quantizers_disabled(model):
        for batch in BATCHES:
            model(batch)
    handle.remove()
    x = torch.cat(inputs)
    found = result[f'{name}.input']
    quantizer = layer.act_quantizer
    x_hat = quantizer(x)
    steps = quantizer.steps(x)
    clipped = (steps < quantizer.qmin - 0.5) | (steps > quantizer.qmax + 0.5)
    assert found['clip_rate'] == pytest.approx(clipped.double().mean().item(), abs=1e-5)
    assert found['values'] == x.numel()
    assert found['bits'] == 4
    ratio = x.double().square().sum() / (x_hat - x).double().square().sum()
    assert found['sqnr_db'] == pytest.approx(10 * math.log10(ratio), abs=1e-4)
    scale = quantizer.scale.detach().double()
    assert found['scale'] == pytest.approx(
        {
            'number': scale.numel(),
            'smallest': scale.min().item(),
            'first_quartile': scale.quantile(0.25).item(),
            'median': scale.quantile(0.5).item(),
            'third_quartile': scale.quantile(0.75).item(),
            'largest': scale.max().item(),
        }
    )


@torch.no_grad()
def test_narrow_grids_clip():
    model = build_quantized('swin', freeze=False)
    before = activation_statistics(model, BATCHES, model)
    for quantizer in act_quantizers(model).values():
        quantizer.scale.mul_(0.5)
    after = activation_statistics(model, BATCHES, model)
    for name, value in after.items():
        assert value['clip_rate'] >= before[name]['clip_rate']
    inputs = [name for name in after if name.endswith('.input')]
    assert sum(after[n]['clip_rate'] for n in inputs) > 5 * sum(
        before[n]['clip_rate'] for n in inputs
    )


@torch.no_grad()
def test_it_leaves_no_trace():
    model = build_quantized('vit')
    before = model(BATCHES[0])
    activation_statistics(model, BATCHES, model)
    assert torch.equal(model(BATCHES[0]), before)
    assert not any(quantizer._forward_hooks for quantizer in act_quantizers(model).values())


def test_histogram_counts_every_scale_once():
    model = build_quantized('vit')
    histogram = scale_histogram(model)
    edges = histogram['edges']
    assert edges == sorted(edges)
    assert set(histogram['counts']) == {'input', 'q', 'k', 'v', 'probs'}
    quantizers = act_quantizers(model).values()
    total = sum(sum(counts) for counts in histogram['counts'].values())
    assert total == sum(quantizer.scale.numel() for quantizer in quantizers)
    assert edges[0] == pytest.approx(min(float(q.scale.min()) for q in quantizers))
    assert edges[-1] == pytest.approx(max(float(q.scale.max()) for q in quantizers))
