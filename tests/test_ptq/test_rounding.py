"""Round to nearest, stored order, and building methods from configs."""

import pytest
import torch
from mmengine.registry import DefaultScope

from gplq_mm.errors import SettingError
from gplq_mm.ptq import GPTQ, RoundToNearest, build_weight_ptq
from gplq_mm.quant import WeightSpec


@pytest.mark.parametrize('layout', ['folded', 'raw'])
def test_codes_are_the_nearest(layout):
    weight, spec = torch.randn(7, 50), WeightSpec(layout=layout)
    result = RoundToNearest()(weight, spec)
    step = result.row_scale[:, None] * result.expand_multiplier()
    grid = torch.arange(spec.code_range[0], spec.code_range[1] + 1)
    distance = (weight[..., None] - grid * step[..., None]).abs()
    chosen = (weight - result.codes * step).abs()
    torch.testing.assert_close(chosen, distance.amin(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize('method', [RoundToNearest(), RoundToNearest(True), GPTQ()])
def test_permutation_groups_other_columns_and_is_undone(method):
    weight, x = torch.randn(6, 70), torch.randn(500, 70)
    x[:, 3] *= 5
    moment = x.T @ x / 500
    permutation = torch.randperm(70)
    result = method(weight, WeightSpec(), permutation, moment)
    sorted_moment = moment[permutation][:, permutation]
    sorted_result = method(weight[:, permutation], WeightSpec(), None, sorted_moment)
    assert torch.equal(result.permutation, permutation)
    assert torch.equal(sorted_result.permutation, torch.arange(70))
    assert torch.equal(result.codes, sorted_result.codes)
    assert torch.equal(result.dequantize()[:, permutation], sorted_result.dequantize())
    assert (result.dequantize() - weight).square().mean() < 0.05


def test_importance_is_used_only_when_asked_for():
    weight, moment = torch.randn(6, 70), torch.diag(torch.rand(70).pow(4))
    plain = RoundToNearest()(weight, WeightSpec(bits=2), None, moment)
    weighted = RoundToNearest(use_importance=True)(weight, WeightSpec(bits=2), None, moment)
    assert torch.equal(plain.row_scale, RoundToNearest()(weight, WeightSpec(bits=2)).row_scale)
    errors = [
        ((r.dequantize() - weight).square() * moment.diagonal()).sum() for r in (weighted, plain)
    ]
    assert errors[0] < errors[1]


def test_importance_asks_for_statistics():
    method = RoundToNearest(use_importance=True)
    assert method.needs_second_moment
    assert not RoundToNearest().needs_second_moment
    with pytest.raises(ValueError, match='needs the second moment'):
        method(torch.randn(2, 4), WeightSpec())


@pytest.mark.parametrize(
    ('permutation', 'moment', 'message'),
    [
        (torch.arange(3), None, 'permutation'),
        (torch.tensor([0, 1, 1, 3]), None, 'permutation'),
        (None, torch.eye(3), 'second moment'),
    ],
)
def test_bad_shapes_are_refused(permutation, moment, message):
    with pytest.raises(ValueError, match=message):
        RoundToNearest()(torch.randn(2, 4), WeightSpec(), permutation, moment)


def test_methods_are_built_from_configs(recwarn):
    cfg = dict(type='GPTQ', sweeps=0)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        method = build_weight_ptq(cfg)
        other = build_weight_ptq(dict(type='gplq_mm.RoundToNearest'))
    assert isinstance(method, GPTQ)
    assert method.sweeps == 0
    assert method.needs_second_moment
    assert isinstance(other, RoundToNearest)
    assert not other.needs_second_moment
    assert cfg == dict(type='GPTQ', sweeps=0)
    assert not recwarn.list


def test_unknown_methods_and_options_are_refused():
    with pytest.raises(SettingError, match='NoSuchMethod'):
        build_weight_ptq(dict(type='NoSuchMethod'))
    with pytest.raises(SettingError, match='percentage'):
        build_weight_ptq(dict(type='GPTQ', percentage=3))
    for option in (dict(damp=0), dict(block_size=0), dict(sweeps=-1), dict(order='best')):
        with pytest.raises(ValueError, match=next(iter(option))):
            GPTQ(**option)
