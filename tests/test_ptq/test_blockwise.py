"""Stage 2 on whole models: every unit on the stream that the units before it produce."""

import subprocess
import sys
import weakref

import pytest
import torch
from builders import build_quantized, calibrated, images
from torch import nn

from gplq_mm.layers import (
    act_quantizers,
    calibrate,
    find_blocks,
    freeze_activations,
    quant_layers,
    quantize_model,
    quantizers_disabled,
    weights_disabled,
)
from gplq_mm.ops import native
from gplq_mm.ptq import (
    GPTQ,
    RoundToNearest,
    blockwise,
    find_units,
    quantize_weights,
    round_weights,
    stream,
)
from gplq_mm.quant import NotCalibratedError, QuantPolicy

KINDS = ('vit', 'swin', 'resnet')
NARROW = dict(weight=dict(bits=3))
BATCHES = [images(4, seed) for seed in range(10, 14)]


def run(model, method=None, **options):
    return quantize_weights(model, BATCHES, model, method or RoundToNearest(), **options)


def integers(model):
    return {
        name: torch.cat((layer.weight_quantizer.integers().flatten(), layer.weight_quantizer.bias))
        for name, layer in quant_layers(model).items()
    }


@pytest.mark.parametrize('kind', KINDS)
def test_quantizes_every_layer_and_leaves_the_latent_model_alone(kind):
    model = build_quantized(kind, compensation=dict(type='QwT'))
    before = {key: value.clone() for key, value in model.named_parameters()}
    with quantizers_disabled(model):
        latent = model(images())
    run(model)
    assert all(layer.weight_is_quantized for layer in quant_layers(model).values())
    for key, value in model.named_parameters():
        assert torch.equal(value, before[key]), key
    with quantizers_disabled(model):
        assert torch.equal(model(images()), latent)
    assert not torch.allclose(model(images()), latent)


@pytest.mark.parametrize('kind', KINDS)
def test_units_are_blocks_and_the_layers_between_them_in_order(kind):
    model = build_quantized(kind)
    calls = find_units(model, lambda: model(images()))
    assert set(calls.values()) == {1}
    units = list(calls)
    blocks = find_blocks(model)
    assert [name for name in units if name in blocks] == blocks
    covered = {
        name
        for name in quant_layers(model)
        if name in units or any(name.startswith(f'{block}.') for block in blocks)
    }
    assert covered == set(quant_layers(model))
    first, last = {
        'vit': ('backbone.patch_embed.projection', 'head.layers.head'),
        'swin': ('backbone.patch_embed.projection', 'head.fc'),
        'resnet': ('backbone.conv1', 'head.fc'),
    }[kind]
    assert units[0] == first
    assert units[-1] == last
    if kind == 'swin':
        assert len(units) == 4 + 3  # four blocks; patch embedding, merging, head


class Recorder:
    """A PTQ method that keeps the statistics it was given."""

    needs_second_moment = True

    def __init__(self):
        self.moments = []
        self.method = GPTQ(sweeps=0)

    def __call__(self, weight, spec, permutation, second_moment):
        self.moments.append(second_moment.clone())
        return self.method(weight, spec, permutation, second_moment)


def covariance(rows):
    rows = rows.double()
    centred = rows - rows.mean(0)
    return centred.T @ centred / len(rows)


@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_a_unit_sees_what_a_full_forward_of_the_half_quantized_model_gives(kind):
    model = build_quantized(kind, NARROW, dict(type='QwT'))
    recorder = Recorder()
    run(model, recorder)
    layers, units = quant_layers(model), find_units(model, lambda: model(BATCHES[0]))
    # The moments come unit by unit, within a unit in definition order.
    order = [
        name for unit in units for name in layers if name == unit or name.startswith(f'{unit}.')
    ]
    moments = dict(zip(order, recorder.moments, strict=True))
    # Units are switched on one after the other, and the model is run in full each time.
    switches = {
        unit: [
            module
            for module in model.get_submodule(unit).modules()
            if hasattr(module, 'buffers_of_map') or type(module).__name__ == 'WeightQuantizer'
        ]
        for unit in units
    }
    for unit in units:
        for module in switches[unit]:
            module.enabled = False
    for unit in units:
        for name in [n for n in order if n == unit or n.startswith(f'{unit}.')]:
            rows = []
            handle = layers[name].register_forward_pre_hook(
                lambda layer, args, rows=rows: rows.append(layer.operand_rows(args[0]))
            )
            for batch in BATCHES:
                model(batch)
            handle.remove()
            expected = covariance(torch.cat(rows))
            torch.testing.assert_close(moments[name], expected, rtol=1e-4, atol=1e-5)
        for module in switches[unit]:
            module.enabled = True


@pytest.mark.parametrize('kind', KINDS)
def test_result_does_not_depend_on_where_the_stream_is_kept(kind):
    outputs = []
    for budget in (0, 20_000, 2**30):
        torch.manual_seed(0)
        model = build_quantized(kind, NARROW, dict(type='QwT'))
        scores = run(model, memory_bytes=budget)
        outputs.append((integers(model), scores, model(images())))
    for other in outputs[1:]:
        assert other[0].keys() == outputs[0][0].keys()
        assert all(torch.equal(other[0][key], value) for key, value in outputs[0][0].items())
        assert other[1] == pytest.approx(outputs[0][1])
        assert torch.equal(other[2], outputs[0][2])


def block_outputs(model, batch):
    """Output of every block."""
    outputs, handles = {}, []
    for name in find_blocks(model):
        handles.append(
            model.get_submodule(name).register_forward_hook(
                lambda _m, _a, output, name=name: outputs.__setitem__(name, output.detach())
            )
        )
    model(batch)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_compensation_brings_blocks_nearer_to_full_precision_weights(kind):
    errors = {}
    for compensation in (None, dict(type='QwTv2'), dict(type='QwT')):
        torch.manual_seed(0)
        model = build_quantized(kind, NARROW, compensation)
        scores = run(model)
        batch = torch.cat(BATCHES)
        quantized = block_outputs(model, batch)
        with weights_disabled(model):
            target = block_outputs(model, batch)
        last = next(reversed(target))
        errors[compensation and compensation['type']] = (
            (quantized[last] - target[last]).square().mean().item()
        )
        if compensation:
            assert compensation['type'] == 'QwTv2' or max(scores.values()) > 0
            assert all(score <= 1 for score in scores.values())
            # The score says truly whether there is a map.
            for name, score in scores.items():
                assert model.get_submodule(name).compensation.is_fitted == (score > 0)
        else:
            assert scores == {}
    assert errors['QwT'] < errors[None]


def test_blocks_that_change_the_shape_are_not_compensated():
    model = build_quantized('resnet', NARROW, dict(type='QwT'))
    scores = run(model)
    assert 'backbone.layer2.0' in find_blocks(model)
    assert set(scores) == set(find_blocks(model)) - {'backbone.layer2.0'}
    assert not model.backbone.layer2[0].compensation.is_fitted


@pytest.mark.parametrize('method', [RoundToNearest(), GPTQ()])
def test_second_run_gives_the_same_as_the_first(method):
    model = build_quantized('vit', compensation=dict(type='QwT'))
    scores, first = run(model, method), integers(model)
    assert run(model, method) == pytest.approx(scores)
    assert all(torch.equal(value, first[key]) for key, value in integers(model).items())


class BasicBlock(nn.Module):
    """A residual block; known as one by its name."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 12)

    def forward(self, x):
        return x + self.fc(x).relu()


class SideBranch(nn.Module):
    """The third block reads the first one's output, past the second; and in place."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = BasicBlock(), BasicBlock(), BasicBlock()
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        first = self.one(x)
        second = self.two(first)
        return self.head(self.three(first - second))


class InPlace(nn.Module):
    """Changes what a unit returned in place, as ``relu_`` and ``+=`` do."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = BasicBlock(), BasicBlock(), nn.Linear(12, 3)

    def forward(self, x):
        x = self.one(x)
        x += 1.0
        return self.head(self.two(x).mul_(0.5))


class InPlaceBranch(nn.Module):
    """Changes an output in place that several later units read."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = BasicBlock(), BasicBlock(), BasicBlock()
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = self.one(x)
        x += 1.0
        return self.head(x + self.three(x - self.two(x)))


@pytest.mark.parametrize('model_type', [SideBranch, InPlace, InPlaceBranch])
@pytest.mark.parametrize('budget', [0, 2**30])
@torch.no_grad()
def test_branches_and_in_place_operations_between_units(model_type, budget):
    batches = [torch.randn(32, 12) for _ in range(3)]
    model = model_type()
    quantize_model(model, QuantPolicy(weight=dict(bits=3)))
    calibrated(model, torch.cat(batches))
    recorder = Recorder()
    kept = [batch.clone() for batch in batches]
    quantize_weights(model, batches, model, recorder, memory_bytes=budget)
    assert all(torch.equal(a, b) for a, b in zip(kept, batches, strict=True))
    layers = quant_layers(model)
    for layer in layers.values():
        layer.weight_quantizer.enabled = False
    for (name, layer), moment in zip(layers.items(), recorder.moments, strict=True):
        rows = []
        handle = layer.register_forward_pre_hook(
            lambda layer, args, rows=rows: rows.append(layer.operand_rows(args[0]).clone())
        )
        for batch in batches:
            model(batch)
        handle.remove()
        torch.testing.assert_close(moment, covariance(torch.cat(rows)), msg=name)
        layer.weight_quantizer.enabled = True


def test_refuses_activations_that_are_not_frozen():
    model = build_quantized('vit', freeze=False)
    with pytest.raises(NotCalibratedError, match='LEARNING'):
        run(model)
    assert not any(layer.weight_is_quantized for layer in quant_layers(model).values())


def test_refuses_no_batches():
    model = build_quantized('vit')
    with pytest.raises(ValueError, match='no calibration images'):
        quantize_weights(model, [], model, RoundToNearest())


class Twice(nn.Module):
    def __init__(self, times):
        super().__init__()
        self.fc, self.times = nn.Linear(4, 4), times

    def forward(self, x):
        for _ in range(self.times):
            x = self.fc(x)
        return x


def twice(times):
    model = Twice(1)
    quantize_model(model, QuantPolicy())
    calibrated(model, torch.randn(8, 4))
    model.times = times
    return model


def test_a_unit_must_run():
    with pytest.raises(ValueError, match='fc is not reached'):
        quantize_weights(twice(0), [torch.randn(8, 4)], twice(0), RoundToNearest())


def test_a_unit_must_run_equally_often_on_all_batches():
    model = twice(2)

    def forward(batch):
        model.times = len(batch)
        return model(batch)

    with pytest.raises(ValueError, match='fc runs 1 times in the forward of calibration batch 1'):
        quantize_weights(model, [torch.randn(2, 4), torch.randn(1, 4)], forward, RoundToNearest())


class Pyramid(nn.Module):
    """What detectors do: levels of several resolutions, and a head that all of them share."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.deeper = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.lateral = nn.Conv2d(8, 8, 1)
        self.shared, self.predictor = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 1, 1)
        self.last = nn.Linear(8, 2)

    def forward(self, x):
        fine = self.stem(x).relu()
        coarse = self.deeper(fine).relu()
        up = nn.functional.interpolate(coarse, size=fine.shape[-2:])
        levels = [self.lateral(fine) + up, coarse]
        scores = [self.predictor(self.shared(level).relu()).flatten() for level in levels]
        # The best places of both levels are looked at again, as proposals are.
        rows = torch.cat([level.flatten(2).squeeze(0).T for level in levels])
        return self.last(rows[torch.cat(scores).topk(5).indices])


@pytest.mark.parametrize('budget', [0, 2**30])
@torch.no_grad()
def test_shared_heads_of_pyramids_and_batches_of_several_sizes(budget):
    batches = [torch.randn(1, 3, height, width) for height, width in ((16, 24), (12, 12), (30, 8))]
    model = Pyramid()
    quantize_model(model, QuantPolicy(weight=dict(bits=3)))
    calibrate(model, lambda _index, _passes: [model(batch) for batch in batches])
    freeze_activations(model)
    calls = find_units(model, lambda: model(batches[0]))
    assert calls == dict(stem=1, deeper=1, lateral=1, shared=2, predictor=2, last=1)
    recorder = Recorder()
    quantize_weights(model, batches, model, recorder, memory_bytes=budget)
    for layer in quant_layers(model).values():
        layer.weight_quantizer.enabled = False
    for name, moment in zip(calls, recorder.moments, strict=True):
        layer, rows = model.get_submodule(name), []
        handle = layer.register_forward_pre_hook(
            lambda layer, args, rows=rows: rows.append(layer.operand_rows(args[0]))
        )
        for batch in batches:
            model(batch)
        handle.remove()
        torch.testing.assert_close(moment, covariance(torch.cat(rows)), msg=name)
        layer.weight_quantizer.enabled = True


def test_only_what_is_read_later_is_kept(monkeypatch):
    """The stream of a pyramid ends with what its last unit needs."""
    model, batch = Pyramid(), torch.randn(1, 3, 16, 24)
    quantize_model(model, QuantPolicy())
    calibrated(model, batch)
    kept, finish = [], stream.Stream.finish

    def record(stream, position, outputs):
        finish(stream, position, outputs)
        kept.append(set(stream.outputs))

    monkeypatch.setattr(stream.Stream, 'finish', record)
    quantize_weights(model, [batch], model, RoundToNearest())
    assert kept == [
        {'stem'},
        {'stem', 'deeper'},
        {'deeper', 'lateral'},
        {'deeper', 'lateral', 'shared'},
        {'deeper', 'lateral', 'predictor'},
        set(),
    ]


def test_plain_rounding_without_data():
    model = build_quantized('vit', compensation=dict(type='QwT'))
    round_weights(model, RoundToNearest())
    first = integers(model)
    assert set(first) == set(quant_layers(model))
    assert torch.isfinite(model(images())).all()
    with pytest.raises(ValueError, match='GPTQ needs calibration images'):
        round_weights(model, GPTQ())


def test_progress_is_told_step_by_step():
    model, seen = build_quantized('swin', compensation=dict(type='QwT')), []
    run(model, report=seen.append)
    units = list(find_units(model, lambda: model(images())))
    assert {progress.units for progress in seen} == {len(units)}
    # Each unit runs twice on every batch, and is rounded.
    steps = 2 * len(BATCHES) + 1
    assert [p.unit for p in seen] == ['', *(name for name in units for _ in range(steps))]
    assert [p.position for p in seen[1::steps]] == list(range(1, len(units) + 1))
    elapsed = [progress.elapsed for progress in seen]
    assert elapsed == sorted(elapsed)
    assert seen[0].remaining > 0
    assert seen[-1].remaining == pytest.approx(0, abs=1e-9)


@pytest.mark.skipif(not native.is_loaded(), reason='gplq_mm was installed without kernels')
@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_result_does_not_depend_on_the_kernels(kind, monkeypatch):
    results = []
    for loaded in (True, False):
        monkeypatch.setattr(native, '_loaded', loaded)
        torch.manual_seed(0)
        model = build_quantized(kind, NARROW, dict(type='QwT'))
        scores = run(model, GPTQ())
        results.append((integers(model), scores, model(images())))
    assert all(torch.equal(results[1][0][key], value) for key, value in results[0][0].items())
    assert results[0][1] == results[1][1]
    assert torch.equal(results[0][2], results[1][2])


def test_memory_holds_the_statistics_of_one_unit(monkeypatch):
    alive, most = weakref.WeakSet(), []

    class Counted(blockwise.SecondMoment):
        def __init__(self, *args):
            super().__init__(*args)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(blockwise, 'SecondMoment', Counted)
    model = build_quantized('swin', compensation=dict(type='QwT'))
    run(model, GPTQ())
    assert len(most) == len(quant_layers(model))
    # The four layers of a block.
    assert max(most) == 4
    # And no sums of a compensation that was fitted.
    for name in find_blocks(model):
        assert model.get_submodule(name).compensation._folds == []


PEAK_PROGRAM = """
import re
import sys
from pathlib import Path

import torch
from torch import nn

from gplq_mm.layers import calibrate, freeze_activations, quantize_model
from gplq_mm.ptq import GPTQ, quantize_weights
from gplq_mm.quant import QuantPolicy


class BasicBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x):
        return x + self.fc(x).relu()


def batches(count):
    return (torch.randn(2048, 64) for _ in range(count))  # 512 KB


def peak_mb(count):
    quantize_weights(model, batches(count), model, GPTQ(), memory_bytes=int(sys.argv[1]))
    status = Path('/proc/self/status').read_text()
    return int(re.search(r'VmHWM:\\s*(\\d+)', status)[1]) / 1024


model = nn.Sequential(*(BasicBlock() for _ in range(4))).eval()
with torch.no_grad():
    quantize_model(model, QuantPolicy(), dict(type='QwT'))
    calibrate(model, lambda *_: model(next(batches(1))))
    freeze_activations(model)
    print(-peak_mb(8) + peak_mb(128))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads the peak as Linux counts')
def test_memory_does_not_grow_with_the_images():
    """120 more batches: 60 MB of images, and twice as much of activations."""
    growth = []
    for memory_bytes in (2**23, 2**40):
        program = [sys.executable, '-c', PEAK_PROGRAM, str(memory_bytes)]
        answer = subprocess.run(program, capture_output=True, text=True, check=True, timeout=300)
        growth.append(float(answer.stdout))
    assert growth[0] < 30
    assert growth[1] > 100


def test_gptq_has_less_output_error_than_rounding_to_nearest():
    errors = []
    for method in (RoundToNearest(), GPTQ()):
        torch.manual_seed(0)
        model = build_quantized('vit', NARROW)
        run(model, method)
        with torch.no_grad():
            quantized = model(torch.cat(BATCHES))
            with weights_disabled(model):
                target = model(torch.cat(BATCHES))
        errors.append((quantized - target).square().mean().item())
    assert errors[1] < errors[0]


def test_activation_quantizers_stay_frozen_and_unchanged():
    model = build_quantized('swin')
    before = {key: value.clone() for key, value in model.state_dict().items() if 'act_quant' in key}
    run(model)
    after = model.state_dict()
    assert before
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not any(p.requires_grad for q in act_quantizers(model).values() for p in q.parameters())
