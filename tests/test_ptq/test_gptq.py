"""GPTQ and its refinement: the output error falls, and odd statistics are survived."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_cases import correlated_moment, output_error

from gplq_mm.ptq import (
    GPTQ,
    RoundToNearest,
    coordinate_descent,
    damped_hessian,
    gptq_round,
    refit_row_scale,
)
from gplq_mm.quant import WeightSpec
from gplq_mm.quant.functional import quantize

PLAIN = dict(sweeps=0, refine_scale=False, use_importance=False)


def fixed_problem(out=16, columns=48, bits=4, seed=0):
    """Weight, damped Hessian and one step a row."""
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))
    code_format = WeightSpec(bits=bits).code_format
    step = (weight.abs().amax(1, keepdim=True) / code_format.qmax * 0.8).expand(out, columns)
    return weight, damped_hessian(correlated_moment(columns, seed)), step, code_format


@pytest.mark.parametrize('layout', ['folded', 'raw'])
@pytest.mark.parametrize('bits', [2, 3, 4, 8])
@pytest.mark.parametrize('seed', range(3))
def test_output_error_falls_with_every_stage(layout, bits, seed):
    weight, moment = torch.randn(32, 72), correlated_moment(72, seed)
    spec = WeightSpec(bits=bits, layout=layout)
    permutation = torch.randperm(72)
    errors = [
        output_error(weight, method(weight, spec, permutation, moment).dequantize(), moment)
        for method in (RoundToNearest(), GPTQ(**PLAIN), GPTQ())
    ]
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < errors[1]


@pytest.mark.parametrize('order', ['activation', 'stored'])
def test_identity_hessian_is_rounding_to_nearest(order):
    weight = torch.randn(9, 70)
    result = GPTQ(**PLAIN, order=order)(weight, WeightSpec(), None, 3 * torch.eye(70))
    nearest = RoundToNearest()(weight, WeightSpec())
    assert torch.equal(result.codes, nearest.codes)
    assert torch.equal(result.row_scale, nearest.row_scale)
    swept = GPTQ(**{**PLAIN, 'sweeps': 3})(weight, WeightSpec(), None, torch.eye(70))
    assert torch.equal(swept.codes, nearest.codes)


@pytest.mark.parametrize('order', ['activation', 'stored'])
def test_blocks_do_not_show(order):
    weight, hessian, step, code_format = fixed_problem()
    one = gptq_round(weight, hessian, step, code_format, 1, order)
    whole = gptq_round(weight, hessian, step, code_format, 1000, order)
    # A float32 sum in another order may turn a near tie.
    assert (one != gptq_round(weight, hessian, step, code_format, 7, order)).float().mean() < 0.01
    assert (one != whole).float().mean() < 0.01
    start = code_format.codes(weight, step, None).to(torch.int8)
    one = coordinate_descent(weight, start, hessian, step, code_format, 2, 1)
    seven = coordinate_descent(weight, start, hessian, step, code_format, 2, 7)
    assert (one != seven).float().mean() < 0.01


def test_error_feedback_is_the_textbook_one():
    # The formula of the paper (eq. 2, 3), with the inverse of the remaining Hessian each time.
    weight, hessian, step, code_format = fixed_problem(out=5, columns=12)
    rest, expected = weight.double().clone(), torch.empty(5, 12)
    for k in range(12):
        inverse = torch.linalg.inv(hessian[k:, k:])
        expected[:, k] = code_format.codes(rest[:, k], step[:, k].double(), None)
        error = (rest[:, k] - expected[:, k] * step[:, k]) / inverse[0, 0]
        rest[:, k:] -= error[:, None] * inverse[0]
    codes = gptq_round(weight, hessian, step, code_format, 5, 'stored')
    assert torch.equal(codes, expected.to(torch.int8))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 40), st.integers(2, 8), st.integers(0, 10**6),
    st.integers(-6, 6),
)  # fmt: skip
def test_refinement_never_raises_the_error(out, columns, bits, seed, exponent):
    weight, hessian, step, code_format = fixed_problem(out, columns, bits, seed)
    weight, step = weight * 10.0**exponent, step * 10.0**exponent
    codes = code_format.codes(weight, step, None).to(torch.int8)
    error = output_error(weight, codes * step, hessian)
    bound = 1e-5 * output_error(weight, torch.zeros(()), hessian)
    for _ in range(3):
        codes = coordinate_descent(weight, codes, hessian, step, code_format)
        assert codes.min() >= code_format.qmin
        assert codes.max() <= code_format.qmax
        after = output_error(weight, codes * step, hessian)
        assert after <= error + bound
        scale = refit_row_scale(weight, codes, hessian, step[:, 0])
        step = scale[:, None].expand_as(weight)
        error = output_error(weight, codes * step, hessian)
        assert (scale > 0).all()
        assert error <= after + bound


def test_known_products_with_the_hessian_change_nothing():
    weight, hessian, step, code_format = fixed_problem()
    codes = code_format.codes(weight, step, None).to(torch.int8)
    product = codes.double() @ hessian
    scale = refit_row_scale(weight, codes, hessian, step[:, 0])
    assert torch.equal(refit_row_scale(weight, codes, None, step[:, 0], product), scale)
    pull = ((weight - codes * step).double() @ hessian).float()
    known = coordinate_descent(weight, codes, hessian, step, code_format, pull=pull)
    assert not torch.equal(known, codes)
    # A float32 sum in another order may turn a near tie.
    fresh = coordinate_descent(weight, codes, hessian, step, code_format)
    assert (known != fresh).float().mean() < 0.01


def test_coordinate_descent_ends_in_a_coordinatewise_minimum():
    weight, hessian, step, code_format = fixed_problem(out=4, columns=10, bits=3)
    codes = gptq_round(weight, hessian, step, code_format)
    codes = coordinate_descent(weight, codes, hessian, step, code_format, sweeps=50)
    least = output_error(weight, codes * step, hessian)
    for row in range(4):
        for column in range(10):
            for code in range(code_format.qmin, code_format.qmax + 1):
                other = codes.clone()
                other[row, column] = code
                assert output_error(weight, other * step, hessian) >= least - 1e-5


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 70), st.integers(2, 8), st.integers(0, 10**6),
    st.integers(-6, 6), st.integers(-6, 6), st.booleans(), st.sampled_from(['folded', 'raw']),
)  # fmt: skip
def test_result_is_always_valid(out, columns, bits, seed, size, unit, zero_row, layout):
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))
    if zero_row:
        weight[seed % out] = 0
    spec = WeightSpec(bits=bits, layout=layout)
    moment = correlated_moment(columns, seed, rank=1 + seed % columns) * 10.0**unit
    result = GPTQ()(weight * 10.0**size, spec, None, moment)
    assert result.codes.min() >= spec.code_range[0]
    assert result.codes.max() <= spec.code_range[1]
    assert result.integers().abs().max() <= 127
    assert result.row_scale.isfinite().all()
    assert (result.row_scale > 0).all()
    if zero_row:
        assert result.row_scale[seed % out] == 1
        assert not result.codes[seed % out].any()


def test_dead_columns_are_rounded_to_nearest():
    weight, moment = torch.randn(8, 40), correlated_moment(40, 0)
    dead = torch.tensor([0, 7, 39])
    moment[dead] = 0
    moment[:, dead] = 0
    result = GPTQ(refine_scale=False)(weight, WeightSpec(), None, moment)
    step = result.row_scale[:, None] * result.expand_multiplier()
    nearest = quantize(weight, step, None, -8, 7)
    assert torch.equal(result.codes[:, dead].float(), nearest[:, dead])


def test_no_input_at_all_is_rounding_to_nearest():
    weight = torch.randn(8, 40)
    result = GPTQ()(weight, WeightSpec(), None, torch.zeros(40, 40))
    assert (result.dequantize() - weight).square().mean() < 0.01


def test_unit_of_the_statistics_does_not_matter():
    weight, moment = torch.randn(8, 40), correlated_moment(40, 0)
    first = GPTQ()(weight, WeightSpec(), None, moment)
    second = GPTQ()(weight, WeightSpec(), None, moment * 2.0**40)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.row_scale, second.row_scale)


def test_few_samples_work_without_a_warning(recwarn):
    x = torch.randn(5, 64)
    weight = torch.randn(8, 64)
    result = GPTQ()(weight, WeightSpec(), None, x.T @ x)
    nearest = RoundToNearest()(weight, WeightSpec())
    errors = [((r.dequantize() - weight) @ x.T).square().sum() for r in (result, nearest)]
    assert errors[0] < 0.1 * errors[1]
    assert not recwarn.list


def test_indefinite_moment_raises_the_damping_with_a_warning():
    moment = correlated_moment(20, 0)
    moment /= moment.diagonal().mean()
    moment -= 0.5 * torch.eye(20)
    moment.diagonal().clamp_(min=0)
    with pytest.warns(UserWarning, match='damping raised'):
        hessian = damped_hessian(moment, 0.01)
    assert torch.linalg.eigvalsh(hessian).min() > 0


def test_hopeless_moment_is_refused():
    moment = torch.full((4, 4), 1e9)
    moment.fill_diagonal_(0)
    moment[0, 0] = 1e-6
    with pytest.raises(ValueError, match='not positive definite'):
        damped_hessian(moment)


@pytest.mark.parametrize(
    ('moment', 'message'),
    [
        (torch.ones(3), 'square'),
        (torch.ones(3, 4), 'square'),
        (torch.full((2, 2), torch.nan), 'non-finite'),
        (-torch.eye(3), 'negative diagonal'),
    ],
)
def test_bad_moment_is_refused(moment, message):
    with pytest.raises(ValueError, match=message):
        damped_hessian(moment)


def test_missing_moment_is_refused():
    with pytest.raises(ValueError, match='needs the second moment'):
        GPTQ()(torch.randn(2, 4), WeightSpec())


def test_bad_hessian_or_order_is_refused():
    weight, hessian, step, code_format = fixed_problem()
    with pytest.raises(ValueError, match='not positive definite'):
        gptq_round(weight, -hessian, step, code_format)
    with pytest.raises(ValueError, match='order'):
        gptq_round(weight, hessian, step, code_format, order='random')
