"""Reparametrized LayerNorms: who reads them, same function, same codes, one scale a tensor."""

import pytest
import torch
from builders import build_float, images, randomize
from mmengine.registry import MODELS
from packed_models import MMDET_SWIN, detector_config
from torch import nn

from gplq_mm.checkpoint import adopt_biases
from gplq_mm.evaluation import weight_drift
from gplq_mm.layers import (
    act_quantizers,
    calibrate,
    freeze_activations,
    quant_layers,
    quantize_model,
    quantizers_disabled,
)
from gplq_mm.ptq import calibrate_with_norms
from gplq_mm.ptq.norm_readers import find_norm_readers
from gplq_mm.quant import PolicyError, QuantPolicy, QuantState
from gplq_mm.quant.functional import quantize

REPQ = dict(preset='repq')


def quantized(kind: str, policy: dict = REPQ) -> nn.Module:
    """A float64 model, not calibrated yet."""
    model = build_float(kind).double()
    quantize_model(model, QuantPolicy(**policy))
    return model


def batch_of(size: int, seed: int = 1) -> torch.Tensor:
    return nn.functional.interpolate(images(4, seed), size=size, mode='bilinear').double()


def calibrate_it(model: nn.Module, *batches: torch.Tensor, forward=None):
    def run_pass(_index, _passes):
        for batch in batches:
            model(batch)

    with torch.no_grad():
        return calibrate_with_norms(model, run_pass, batches, forward or model)


@torch.no_grad()
def float_outputs(model: nn.Module, *batches: torch.Tensor) -> list[torch.Tensor]:
    with quantizers_disabled(model):
        outputs = [model(batch) for batch in batches]
    return [out if torch.is_tensor(out) else out[-1] for out in outputs]


@torch.no_grad()
def inputs_of(model: nn.Module, names: tuple[str, ...], batch: torch.Tensor) -> dict:
    """What layers are given in the float model."""
    seen, handles = {}, []
    for name in names:

        def see(_module, args, name: str = name) -> None:
            seen[name] = args[0].clone()

        handles.append(model.get_submodule(name).register_forward_pre_hook(see))
    float_outputs(model, batch)
    for handle in handles:
        handle.remove()
    return seen


def expected_pairs(kind: str) -> dict[str, tuple[str, ...]]:
    if kind == 'vit':
        blocks, norms, attn = [f'backbone.layers.{i}' for i in (0, 1)], ('ln1', 'ln2'), 'attn.qkv'
        pairs = {}
    else:
        blocks = [f'backbone.stages.{s}.blocks.{b}' for s in (0, 1) for b in (0, 1)]
        norms, attn = ('norm1', 'norm2'), 'attn.w_msa.qkv'
        downsample = 'backbone.stages.0.downsample'
        pairs = {f'{downsample}.norm': (f'{downsample}.reduction',)}
    for block in blocks:
        pairs[f'{block}.{norms[0]}'] = (f'{block}.{attn}',)
        pairs[f'{block}.{norms[1]}'] = (f'{block}.ffn.layers.0.0',)
    return pairs


@pytest.mark.parametrize('kind', ['vit', 'swin'])
class TestModels:
    def test_pairs(self, kind):
        model = quantized(kind)
        report = calibrate_it(model, batch_of(32))
        assert report.done == expected_pairs(kind)
        assert not report.left
        assert not report.padded
        assert str(report) == f'{len(report.done)} LayerNorms reparametrized'

    def test_float_function_is_unchanged(self, kind):
        model, batches = quantized(kind), (batch_of(32), batch_of(32, seed=7))
        before = float_outputs(model, *batches)
        parameters = {key: value.clone() for key, value in model.named_parameters()}
        report = calibrate_it(model, batches[0])
        for old, new in zip(before, float_outputs(model, *batches), strict=True):
            torch.testing.assert_close(new, old, rtol=1e-9, atol=1e-12)
        changed = {
            key
            for key, value in model.named_parameters()
            if key not in parameters or not torch.equal(parameters[key], value)
        }
        for norm, readers in report.done.items():
            assert {f'{norm}.weight', f'{norm}.bias', f'{readers[0]}.weight'} <= changed

    def test_codes_are_those_of_a_grid_for_every_channel(self, kind):
        model, batch = quantized(kind), batch_of(32)
        names = tuple(name for readers in expected_pairs(kind).values() for name in readers)
        before = inputs_of(model, names, batch)
        calibrate_it(model, batch)
        after = inputs_of(model, names, batch)
        for name in names:
            quantizer = model.get_submodule(name).act_quantizer
            assert quantizer.scale.shape == quantizer.offset.shape == (1,)
            grid = quantizer.channel_scale.double(), quantizer.channel_offset.double()
            assert grid[0].unique().numel() > 1
            expected = quantize(before[name], *grid, 0, 15)
            found = quantize(after[name], quantizer.scale, quantizer.offset, 0, 15)
            assert torch.equal(found, expected), name
            assert expected.unique().numel() == 16

    def test_every_other_site_has_one_scale_from_its_tensor(self, kind):
        model, plain, batch = quantized(kind), quantized(kind), batch_of(32)
        plain.load_state_dict(model.state_dict())
        calibrate_it(model, batch)
        with torch.no_grad():
            calibrate(plain, lambda _index, _passes: plain(batch))
        readers = {name for names in expected_pairs(kind).values() for name in names}
        others = act_quantizers(plain)
        for name, quantizer in act_quantizers(model).items():
            assert quantizer.state == QuantState.LEARNING
            if name.removesuffix('.act_quantizer') not in readers:
                assert quantizer.channel_scale is None
                torch.testing.assert_close(quantizer.scale, others[name].scale)

    def test_it_is_no_drift_of_the_weights(self, kind):
        model = quantized(kind)
        reference = {key: value.clone() for key, value in model.state_dict().items()}
        calibrate_it(model, batch_of(32))
        assert weight_drift(model, reference)['mae'] < 1e-15
        name = next(iter(expected_pairs(kind).values()))[0]
        assert not torch.allclose(
            model.get_submodule(name).weight, reference[f'{name}.weight'], rtol=0.01
        )

    def test_state_goes_into_a_new_model(self, kind):
        model, batch = quantized(kind), batch_of(32)
        calibrate_it(model, batch)
        freeze_activations(model)
        state = model.state_dict()
        other = quantized(kind)
        adopt_biases(other, state)
        other.load_state_dict(state)
        with torch.no_grad():
            assert torch.equal(other(batch), model(batch))
        for name, quantizer in act_quantizers(model).items():
            mine = act_quantizers(other)[name].channel_scale
            assert (mine is None) == (quantizer.channel_scale is None)


def test_patch_merging_gets_a_bias_that_no_optimizer_waits_for():
    model = quantized('swin')
    reduction = model.backbone.stages[0].downsample.reduction
    assert reduction.bias is None
    calibrate_it(model, batch_of(32))
    assert bool(reduction.bias.any())
    assert not reduction.bias.requires_grad


def test_float_model_takes_the_bias_over():
    """Weights of a reparametrized Swin are those of a float Swin with one bias more."""
    model, batch = quantized('swin'), batch_of(32)
    before = float_outputs(model, batch)
    calibrate_it(model, batch)
    plain, state = build_float('swin').double(), model.state_dict()
    adopt_biases(plain, state)
    state = {key: value for key, value in state.items() if key in plain.state_dict()}
    plain.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(plain(batch), before[0], rtol=1e-9, atol=1e-12)


class TestPadding:
    """Windows of 4 x 4 tokens on maps of 9 x 9 and, behind the merging, of 5 x 5."""

    def test_function_is_unchanged_for_any_size(self):
        batches = batch_of(32), batch_of(36), batch_of(40, seed=3)
        model = quantized('swin')
        before = float_outputs(model, *batches)
        report = calibrate_it(model, *batches[:2])
        for old, new in zip(before, float_outputs(model, *batches), strict=True):
            torch.testing.assert_close(new, old, rtol=1e-9, atol=1e-12)
        assert report.done == expected_pairs('swin')
        assert set(report.padded) == {norm for norm in report.done if norm.endswith('norm1')}
        assert 'without a shift' in str(report)

    def test_codes_are_those_of_symmetric_channels(self):
        model, batch = quantized('swin'), batch_of(36)
        report = calibrate_it(quantized('swin'), batch)
        names = tuple(report.done[norm][0] for norm in report.padded)
        before = inputs_of(model, names, batch)
        calibrate_it(model, batch)
        after = inputs_of(model, names, batch)
        for name in names:
            quantizer = model.get_submodule(name).act_quantizer
            scale = quantizer.channel_scale.double()
            expected = quantize(before[name], scale, None, -8, 7) + 8
            found = quantize(after[name], quantizer.scale, quantizer.offset, 0, 15)
            assert torch.equal(found, expected), name
            # What was padded is exactly representable.
            assert bool((before[name] == 0).all(-1).any())
            zero = (8 * quantizer.scale + quantizer.offset).item()
            assert zero == pytest.approx(0, abs=1e-12)

    def test_zeros_break_the_function_of_a_shifted_norm(self):
        """Why padding is looked for: unseen, it makes another model."""
        model, batch = quantized('swin'), batch_of(36)
        before = float_outputs(model, batch)
        report = calibrate_it(model, batch_of(32))
        assert not report.padded
        (after,) = float_outputs(model, batch)
        assert not torch.allclose(after, before[0], rtol=1e-3)


def test_mmdet_swin():
    model = MODELS.build(MMDET_SWIN)
    wrapper = nn.ModuleDict({'backbone': randomize(model)}).eval()
    wrapper.forward = lambda x: wrapper['backbone'](x)
    quantize_model(wrapper.double(), QuantPolicy(**REPQ))
    batch = batch_of(36)
    with torch.no_grad(), quantizers_disabled(wrapper):
        before = wrapper(batch)
    report = calibrate_it(wrapper, batch)
    blocks = [f'backbone.stages.{s}.blocks.{b}' for s in (0, 1) for b in (0, 1)]
    downsample = 'backbone.stages.0.downsample'
    expected = {f'{downsample}.norm': (f'{downsample}.reduction',)}
    for block in blocks:
        expected[f'{block}.norm1'] = (f'{block}.attn.w_msa.qkv',)
        expected[f'{block}.norm2'] = (f'{block}.ffn.layers.0.0',)
    assert report.done == expected
    with torch.no_grad(), quantizers_disabled(wrapper):
        for old, new in zip(before, wrapper(batch), strict=True):
            torch.testing.assert_close(new, old, rtol=1e-9, atol=1e-12)


class Toy(nn.Module):
    """LayerNorms that are read in several ways."""

    def __init__(self):
        super().__init__()
        self.single, self.common, self.leaky = (nn.LayerNorm(8) for _ in range(3))
        self.averaged, self.unread = nn.LayerNorm(8), nn.LayerNorm(8)
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.e, self.f = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        randomize(self, 0.5)

    def forward(self, x):
        x = x + self.a(self.single(x).flip(1)[:, 1:-1].repeat_interleave(2, 1)[:, : x.shape[1]])
        shared = self.common(x)
        x = x + self.b(shared) * self.c(shared[:, :1])
        normed = self.leaky(x)
        x = normed + self.d(normed)
        x = x + self.e(self.averaged(x).mean(1, keepdim=True))
        return self.f(x) + 0 * self.unread(x)


def toy(**policy) -> tuple[Toy, torch.Tensor]:
    model = Toy().double().eval()
    quantize_model(model, QuantPolicy(preset='repq', **policy))
    return model, torch.randn(3, 6, 8, dtype=torch.float64) * torch.arange(1, 9)


class TestRules:
    def test_only_norms_that_nothing_else_reads(self):
        model, x = toy()
        before = float_outputs(model, x)
        report = calibrate_it(model, x)
        assert report.done == {'single': ('a',), 'common': ('b', 'c'), 'averaged': ('e',)}
        assert report.left == ('leaky',)
        assert '1 left alone' in str(report)
        torch.testing.assert_close(float_outputs(model, x), before, rtol=1e-9, atol=1e-12)
        for name, layer in quant_layers(model).items():
            assert (layer.act_quantizer.channel_scale is None) == (name in ('d', 'f'))

    def test_readers_of_one_norm_share_a_grid_that_covers_both(self):
        model, x = toy(activation=dict(observer='minmax'))
        (given,) = inputs_of(model, ('b',), x).values()
        calibrate_it(model, x)
        grids = [model.get_submodule(name).act_quantizer for name in 'bc']
        assert torch.equal(grids[0].channel_scale, grids[1].channel_scale)
        low = given.flatten(0, 1).amin(0)
        torch.testing.assert_close(grids[0].channel_offset.double(), low, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        'change', [dict(exclude=True), dict(activation=dict(reparametrize=False))]
    )
    def test_a_reader_that_cannot_follow_keeps_the_norm_as_it_is(self, change):
        model, x = toy(rules=[dict(pattern='^c$', **change)])
        before = float_outputs(model, x)
        report = calibrate_it(model, x)
        assert 'common' in report.left
        assert model.b.act_quantizer.channel_scale is None
        torch.testing.assert_close(float_outputs(model, x), before, rtol=1e-9, atol=1e-12)

    def test_what_must_not_change_is_what_forward_returns(self):
        model, x = toy()
        seen = []
        model.single.register_forward_hook(lambda _module, _args, output: seen.append(output))

        def forward(batch):
            seen.clear()
            return model(batch), seen[0]

        assert 'single' in calibrate_it(model, x, forward=forward).left

    def test_readers_with_different_specs(self):
        model, x = toy(rules=[dict(pattern='^c$', activation=dict(bits=8))])
        with pytest.raises(
            PolicyError, match=r'b, c read the output of common.*give them the same'
        ):
            calibrate_it(model, x)

    def test_twice_is_refused(self):
        model, x = toy()
        calibrate_it(model, x)
        with pytest.raises(RuntimeError, match=r'a: .* reparametrized already'):
            calibrate_it(model, x)

    def test_no_image(self):
        model, _ = toy()
        with pytest.raises(ValueError, match='without an image'):
            calibrate_it(model)

    def test_other_images_may_show_more(self):
        """A LayerNorm counts only where every image says the same."""
        model, x = toy()

        def forward(batch):
            output = model(batch)
            return output + (model.single(batch) if len(batch) == 2 else 0)

        with quantizers_disabled(model):
            first = find_norm_readers(model, ['a'], [x], forward)
            both = find_norm_readers(model, ['a'], [x, x[:2]], forward)
        assert (first.readers, first.left) == ({'single': ('a',)}, [])
        assert (both.readers, both.left) == ({}, ['single'])

    def test_symmetric_activations(self):
        model, x = toy(activation=dict(zero_point='none'))
        before = float_outputs(model, x)
        calibrate_it(model, x)
        torch.testing.assert_close(float_outputs(model, x), before, rtol=1e-9, atol=1e-12)
        assert model.a.act_quantizer.offset is None
        assert bool((model.a.act_quantizer.channel_offset == 0).all())


@pytest.mark.parametrize('preset', ['gplq', 'paper'])
def test_other_presets_are_calibrated_as_ever(preset):
    models = [quantized('vit', dict(preset=preset)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    batch = batch_of(32)

    def never():
        raise AssertionError('no image is asked for')
        yield

    with torch.no_grad():
        report = calibrate_with_norms(models[0], lambda *_: models[0](batch), never(), models[0])
        calibrate(models[1], lambda *_: models[1](batch))
    assert not report.done
    for key, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[key]), key


def test_detector():
    """The backbone's output norms feed convolutions and stay as they are."""
    cfg = detector_config()
    cfg.model.backbone.policy = REPQ
    model = MODELS.build({**cfg.model.backbone})
    randomize(model).eval()
    batch = images(2)
    report = calibrate_it(model, batch)
    assert len(report.done) == 9
    assert not any('backbone.norm' in norm for norm in (*report.done, *report.left))
