"""Formats, those of gplq_mm and registered ones, and registered observers."""

import pytest
import torch
from own_formats import EvenScale, SquareRoot, register_for

from gplq_mm.quant import (
    ActQuantizer,
    ActSpec,
    MinMaxObserver,
    PolicyError,
    QuantPolicy,
    WeightSpec,
)
from gplq_mm.registry import OBSERVERS


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    register_for(monkeypatch)


def calibrated(x, **spec):
    quantizer = ActQuantizer(ActSpec(**spec), (x.shape[-1],), 'site')
    quantizer.observe()
    for _ in range(quantizer.observer.num_passes):
        quantizer(x)
        quantizer.observer.end_pass()
    quantizer.finish_observing()
    return quantizer


@pytest.mark.parametrize('observer', ['minmax', 'percentile', 'mse'])
@pytest.mark.parametrize('zero_point', ['none', 'float', 'integer'])
def test_calibration_searches_the_grids_of_the_format(observer, zero_point):
    x = torch.randn(512, 6) * torch.tensor([0.1, 0.3, 0.5, 1.0, 2.0, 4.0]) + 0.2
    quantizer = calibrated(x, format='even_scale', observer=observer, zero_point=zero_point)
    assert type(quantizer.format) is EvenScale
    steps = quantizer.scale.detach() * 64
    assert torch.equal(steps, steps.round())
    assert (steps >= 1).all()
    # What it gives lies on the grid, and near its input.
    out = quantizer(x)
    codes = quantizer.codes(x)
    scale, offset = quantizer.grid()
    torch.testing.assert_close(out, codes * scale + (0 if offset is None else offset))
    assert (out - x).abs().mean() < 0.12 * x.std()


def test_the_scale_in_force_while_learning_and_frozen():
    quantizer = calibrated(torch.randn(64, 6), format='even_scale')
    with torch.no_grad():
        quantizer.scale.fill_(0.1)
    quantizer(torch.randn(8, 6)).sum().backward()
    assert quantizer.scale.grad.abs().sum() > 0
    assert torch.equal(quantizer.grid()[0], torch.full((6,), 6 / 64))
    quantizer.freeze()
    assert torch.equal(quantizer.grid()[0], torch.full((6,), 6 / 64))


def test_codes_that_are_not_equidistant():
    x = torch.rand(512, 6)
    quantizer = calibrated(x, format='square_root', zero_point='none', signed=False, observer='mse')
    assert type(quantizer.format) is SquareRoot
    assert quantizer.spec.code_range == (0, 15)
    expected = quantizer.codes(x).square() * quantizer.scale
    torch.testing.assert_close(quantizer(x), expected)
    assert not quantizer.format.is_integer_product


def test_it_stands_where_it_may_stand():
    policy = QuantPolicy(rules=[dict(pattern='.', activation=dict(format='square_root'))])
    assert policy.resolve('fc', 'linear').activation.format == 'square_root'
    with pytest.raises(PolicyError, match=r'attn\.q: the square_root .*linear, probs only'):
        policy.resolve('attn.q', 'q')


def test_a_registered_observer(monkeypatch):
    class HalfRange(MinMaxObserver):
        def _limits(self):
            return self.low / 2, self.high / 2

    monkeypatch.setitem(OBSERVERS.module_dict, 'half_range', HalfRange)
    x = torch.randn(64, 6)
    half = calibrated(x, observer='half_range').scale
    torch.testing.assert_close(half * 2, calibrated(x, observer='minmax').scale)


@pytest.mark.parametrize('name', ['cubic', 'os.system', ['integer'], None])
def test_names_are_looked_up_and_not_imported(name):
    with pytest.raises(PolicyError, match=r'integer, log_sqrt2.*custom_imports'):
        ActSpec(format=name)
    with pytest.raises(PolicyError, match=r'minmax, percentile, mse.*custom_imports'):
        ActSpec(observer=name)


def test_settings_that_a_format_leaves_no_choice_in():
    rule = dict(pattern='probs', activation=dict(format='log_sqrt2'))
    policy = QuantPolicy(probs=dict(zero_point='float', signed=True), rules=[rule])
    spec = policy.resolve('attn.probs', 'probs').activation
    assert (spec.zero_point, spec.signed, spec.code_range) == ('none', False, (0, 15))
    with pytest.raises(PolicyError, match=r'zero_point=.float. does not go .*log_sqrt2'):
        ActQuantizer(ActSpec(format='log_sqrt2'), (1,), 'p')
    with pytest.raises(PolicyError, match=r'weight\.format=.log_sqrt2. is not meant'):
        QuantPolicy(weight=dict(format='log_sqrt2'))


def test_bytes_of_weights_in_a_file():
    assert WeightSpec(bits=3).code_format.bytes(6, 5) == 18
    assert WeightSpec(bits=5).code_format.bytes(6, 5) == 30
