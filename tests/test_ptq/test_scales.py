"""Scale search: what holds for every weight, and how close it comes to exhaustive search."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from weight_cases import squared_error, weights

from gplq_mm.ptq import RoundToNearest, search_group_scales, search_row_scale
from gplq_mm.ptq.scales import CHUNK_ELEMENTS
from gplq_mm.quant import WeightSpec

relaxed = settings(max_examples=50, deadline=None)


specs = st.builds(
    WeightSpec,
    bits=st.integers(2, 8),
    layout=st.sampled_from(['folded', 'raw']),
    group_size=st.sampled_from([1, 4, 32]),
    observer=st.sampled_from(['minmax', 'percentile', 'mse']),
    percentile=st.sampled_from([0.9, 0.999]),
)


def naive_error(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Error of the textbook scale max|w| / qmax, in the units of :func:`squared_error`."""
    qmax = 2 ** (bits - 1) - 1
    unit = weight.double() / weight.double().abs().amax(1, keepdim=True).clamp(min=1e-30)
    return ((unit * qmax).round() / qmax - unit).square().sum(1)


@relaxed
@given(weights(), specs)
def test_result_is_always_valid(weight, spec):
    result = RoundToNearest()(weight, spec)
    qmin, qmax = spec.code_range
    assert result.codes.dtype == torch.int8
    assert result.codes.shape == weight.shape
    assert result.codes.min() >= qmin
    assert result.codes.max() <= qmax
    assert result.multiplier.dtype == torch.uint8
    assert result.multiplier.shape == (len(weight), -(-weight.shape[1] // result.group_size))
    assert result.multiplier.min() >= 1
    assert result.multiplier.max() <= spec.max_multiplier
    assert result.integers().abs().max() <= 127
    assert result.row_scale.dtype == torch.float32
    assert result.row_scale.isfinite().all()
    assert (result.row_scale > 0).all()
    zero = ~weight.any(1)
    assert (result.row_scale[zero] == 1).all()
    assert not result.codes[zero].any()


@relaxed
@given(weights(), specs)
def test_minmax_clips_nothing(weight, spec):
    spec = WeightSpec(**{**vars(spec), 'observer': 'minmax'})
    result = RoundToNearest()(weight, spec)
    step = result.row_scale[:, None] * result.expand_multiplier()
    distance = (result.dequantize() - weight).abs()
    # 1e-4: tolerance of the covering multiplier, and float32.
    assert (distance <= step * 0.5 + weight.abs() * 1e-4).all()


@relaxed
@given(weights(), specs)
def test_mse_beats_naive_minmax(weight, spec):
    spec = WeightSpec(**{**vars(spec), 'observer': 'mse'})
    error = squared_error(weight, RoundToNearest()(weight, spec))
    assert (error <= naive_error(weight, spec.bits) * (1 + 1e-4) + 1e-9).all()


@relaxed
@given(weights(), st.integers(2, 8), st.sampled_from([1, 4, 32]))
def test_two_levels_beat_one(weight, bits, group_size):
    raw = RoundToNearest()(weight, WeightSpec(bits=bits, layout='raw'))
    folded = RoundToNearest()(weight, WeightSpec(bits=bits, group_size=group_size))
    bound = squared_error(weight, raw) * (1 + 1e-4) + 1e-9
    assert (squared_error(weight, folded) <= bound).all()


@relaxed
@given(weights(), specs, st.integers(-10, 10))
def test_scale_follows_the_weight(weight, spec, exponent):
    # A power of two changes no rounding, so not even a tie is broken differently.
    row_scale, multiplier = search_group_scales(weight, spec)
    scaled, same = search_group_scales(weight * 2.0**exponent, spec)
    zero = ~weight.any(1)
    assert torch.equal(multiplier, same)
    torch.testing.assert_close(scaled[~zero], row_scale[~zero] * 2.0**exponent, rtol=1e-6, atol=0)


@relaxed
@given(weights(), specs)
def test_rows_are_independent(weight, spec):
    together = RoundToNearest()(weight, spec)
    alone = [RoundToNearest()(row[None], spec) for row in weight]
    # Not bit by bit: the order of a sum may depend on the number of rows, and turn a near tie.
    torch.testing.assert_close(
        torch.cat([squared_error(row[None], r) for row, r in zip(weight, alone, strict=True)]),
        squared_error(weight, together),
        rtol=1e-3,
        atol=1e-9,
    )


@pytest.mark.parametrize('observer', ['minmax', 'percentile', 'mse'])
def test_chunks_do_not_show(monkeypatch, observer):
    weight, spec = torch.randn(37, 100), WeightSpec(observer=observer)
    whole = search_group_scales(weight, spec)
    monkeypatch.setattr('gplq_mm.ptq.scales.CHUNK_ELEMENTS', {'cpu': 500})
    for a, b in zip(whole, search_group_scales(weight, spec), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def exhaustive_error(weight: torch.Tensor, spec: WeightSpec, bases: int) -> torch.Tensor:
    """Least error over many bases and all multipliers of every group, ``(out,)``."""
    groups = weight.split(spec.group_size, 1)
    most = weight.abs().amax(1, keepdim=True)
    best = torch.full((len(weight),), torch.inf)
    for i in range(bases):
        base = most * 0.002 * 600 ** (i / (bases - 1))
        total = torch.zeros(len(weight))
        for group in groups:
            errors = []
            for multiple in range(1, spec.max_multiplier + 1):
                step = base * multiple
                values = (group / step).round().clamp(*spec.code_range) * step
                errors.append((values - group).square().sum(1))
            total += torch.stack(errors).amin(0)
        best = torch.minimum(best, total)
    return best


@pytest.mark.parametrize(('bits', 'excess'), [(2, 1.15), (3, 1.15), (4, 1.15), (6, 1.3)])
def test_two_levels_come_close_to_exhaustive_search(bits, excess):
    weight = torch.randn(64, 24) * torch.linspace(-2, 1, 24).exp()
    spec = WeightSpec(bits=bits, group_size=8)
    found = (RoundToNearest()(weight, spec).dequantize() - weight).square().sum()
    assert found <= excess * exhaustive_error(weight, spec, 800).sum()


# At 8 bits the error of a short row jumps about with the scale; the least of thousands is luck.
@pytest.mark.parametrize(('bits', 'excess'), [(2, 1.01), (3, 1.01), (4, 1.01), (8, 1.1)])
def test_row_scale_comes_close_to_exhaustive_search(bits, excess):
    weight, spec = torch.randn(64, 48).pow(3), WeightSpec(bits=bits, layout='raw')
    found = (RoundToNearest()(weight, spec).dequantize() - weight).square().sum(1)
    most, best = weight.abs().amax(1, keepdim=True), torch.full((64,), torch.inf)
    for i in range(3000):
        step = most * 0.001 ** (i / 2999) * 1.2
        values = (weight / step).round().clamp(*spec.code_range) * step
        best = torch.minimum(best, (values - weight).square().sum(1))
    assert found.sum() <= excess * best.sum()


@pytest.mark.parametrize('layout', ['folded', 'raw'])
def test_importance_lowers_the_weighted_error(layout):
    weight, importance = torch.randn(32, 80), torch.rand(80).pow(8)
    spec = WeightSpec(bits=3, layout=layout)
    errors = []
    for given_importance in (importance, None):
        row_scale, multiplier = search_group_scales(weight, spec, given_importance)
        width = 80 if layout == 'raw' else spec.group_size
        step = row_scale[:, None] * multiplier.repeat_interleave(width, 1)[:, :80]
        values = (weight / step).round().clamp(*spec.code_range) * step
        errors.append(((values - weight).square() * importance).sum())
    assert errors[0] < 0.9 * errors[1]


def test_zero_importance_is_none():
    weight, spec = torch.randn(4, 40), WeightSpec()
    for a, b in zip(
        search_group_scales(weight, spec, torch.zeros(40)),
        search_group_scales(weight, spec),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_eight_bits_and_raw_have_one_scale_a_row():
    weight = torch.randn(5, 100)
    for spec in (WeightSpec(bits=8), WeightSpec(bits=7), WeightSpec(layout='raw')):
        row_scale, multiplier = search_group_scales(weight, spec)
        assert torch.equal(row_scale, search_row_scale(weight, spec))
        assert (multiplier == 1).all()
        assert multiplier.shape == (5, 4 if spec.layout == 'folded' else 1)


def test_half_precision_weight_gives_float32_scales():
    weight = torch.randn(5, 64)
    assert search_row_scale(weight.half(), WeightSpec()).dtype == torch.float32


@pytest.mark.parametrize(
    ('weight', 'importance', 'message'),
    [
        (torch.ones(3), None, 'matrix'),
        (torch.ones(0, 4), None, 'matrix'),
        (torch.tensor([[1.0, torch.nan]]), None, 'non-finite'),
        (torch.ones(2, 4), torch.ones(3), 'one value per column'),
        (torch.ones(2, 2), torch.tensor([1.0, -1.0]), 'not negative'),
        (torch.ones(2, 2), torch.tensor([1.0, torch.inf]), 'finite'),
    ],
)
def test_bad_input_is_refused(weight, importance, message):
    for search in (search_row_scale, search_group_scales):
        with pytest.raises(ValueError, match=message):
            search(weight, WeightSpec(), importance)


def test_real_weights_lose_little_to_integer_multipliers(shared_data):
    from safetensors import safe_open

    path = shared_data / 'weights' / 'vit_tiny_patch16_224_in1k.safetensors'
    with safe_open(path, 'pt') as file:
        weight = file.get_tensor('blocks.4.mlp.fc1.weight')[:96]
    # Sorted by size, as columns are after folding.
    weight = weight[:, weight.square().mean(0).argsort()]
    two_level = (RoundToNearest()(weight, WeightSpec()).dequantize() - weight).square().sum()
    groups = weight.reshape(-1, 32)
    raw = WeightSpec(layout='raw')
    floating = (RoundToNearest()(groups, raw).dequantize() - groups).square().sum()
    single = (RoundToNearest()(weight, raw).dequantize() - weight).square().sum()
    assert floating < two_level < 1.06 * floating < 0.9 * single


def test_temporaries_are_bounded():
    weight, sizes = torch.randn(512, 2048), set()

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if torch.is_tensor(out) and out.is_floating_point():
                sizes.add(out.numel())
            return out

    with Sizes():
        search_group_scales(weight, WeightSpec())
    # Nothing has the size of the weight except the weight, and so on for larger ones.
    assert max(sizes - {weight.numel()}) <= CHUNK_ELEMENTS['cpu'] < weight.numel()
