"""The ops of training: every instruction set against plain torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_layers import ISAS

from gplq_mm.ops import native, training, training_attention, training_reference

ops = torch.ops.gplq_mm
NARROW, WIDE, SIGNED, BYTE = [0, 15, 4], [0, 15, 12], [-8, 7, 4], [0, 255, 8]
# Shape of an input and of a scale: a scale a column, one for all, a head, a channel, a token.
LAYOUTS = {
    'column': ((3, 7, 33), (33,)),
    'tensor': ((3, 7, 33), (1,)),
    'head': ((2, 3, 9, 20), (3, 1, 1)),
    'map': ((2, 5, 6, 7), (5, 1, 1)),
    'token': ((2, 3, 9, 20), (9, 1)),
    'row': ((40,), (1,)),
}


def random_grid(shape, generator, symmetric=False):
    scale = 0.2 + 0.3 * torch.rand(shape, generator=generator)
    return scale, None if symmetric else -2 + torch.randn(shape, generator=generator) * 0.5


def close(a, b, tolerance=2e-5):
    """Relative distance; sums of many numbers differ by rounding."""
    return float((a.double() - b.double()).norm()) <= tolerance * float(b.double().norm()) + 1e-6


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**16),
    st.sampled_from(list(LAYOUTS)),
    st.sampled_from([NARROW, WIDE, SIGNED, BYTE]),
    st.booleans(),
    st.sampled_from(ISAS or ['torch']),
)
def test_fake_quant_equals_the_reference(seed, layout, grid, symmetric, isa):
    if isa == 'torch':
        pytest.skip('installed without compiled kernels')
    generator = torch.Generator().manual_seed(seed)
    shape, scale_shape = LAYOUTS[layout]
    x = 3 * torch.randn(shape, generator=generator)
    scale, offset = random_grid(scale_shape, generator, symmetric)
    grad = torch.randn(shape, generator=generator)
    with native.use_isa(isa):
        values, state = ops.fake_quant(x, scale, offset, grid)
        expected, expected_state = training_reference.fake_quant(x, scale, offset, grid)
        assert torch.equal(values, expected)
        assert state.dtype == expected_state.dtype
        # A residual in the middle between two levels goes to either.
        assert (state != expected_state).float().mean() < 2e-2
        assert torch.equal(ops.fake_quant_values(expected_state, scale, offset, grid), expected)
        args = (grad, expected_state, scale, offset, grid)
        found = ops.fake_quant_backward(*args)
    wanted = training_reference.fake_quant_backward(*args)
    assert torch.equal(found[0], wanted[0])
    assert close(found[1], wanted[1])
    assert close(found[2], wanted[2])


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**16), st.sampled_from(['column', 'tensor']), st.sampled_from(ISAS or ['']))
def test_gelu_fake_quant_equals_the_reference(seed, layout, isa):
    if not isa:
        pytest.skip('installed without compiled kernels')
    generator = torch.Generator().manual_seed(seed)
    shape, scale_shape = LAYOUTS[layout]
    x = 2 * torch.randn(shape, generator=generator)
    x[0, 0, :3] = torch.tensor([-30.0, 30.0, 0.0])
    scale, offset = 0.05 + 0.1 * torch.rand(scale_shape, generator=generator), None
    offset = torch.full(scale_shape, -0.17)
    grad = torch.randn(shape, generator=generator)
    with native.use_isa(isa):
        found = ops.gelu_fake_quant(x, scale, offset, WIDE)
        grads = ops.gelu_fake_quant_backward(grad, x, scale, offset, WIDE)
    expected = training_reference.gelu_fake_quant(x, scale, offset, WIDE)
    # Two GELUs decide a tie differently now and then.
    same = (found - expected).abs() < scale / 2
    assert same.float().mean() > 0.999
    wanted = training_reference.gelu_fake_quant_backward(grad, x, scale, offset, WIDE)
    assert torch.equal(grads[1], found)
    assert close(grads[0][same], wanted[0][same])
    if bool(same.all()):
        assert close(grads[2], wanted[2], 1e-4)
        assert close(grads[3], wanted[3], 1e-4)


ATTENTIONS = {
    # batch, heads, queries, keys, width, windows, bias, row_relative, granularity
    'plain': (4, 3, 50, 50, 32, 0, False, True, 'head'),
    'windows': (8, 2, 49, 49, 16, 4, True, True, 'head'),
    'rectangle': (2, 3, 17, 23, 8, 0, True, False, 'tensor'),
    'token': (3, 2, 9, 9, 7, 0, False, True, 'token'),
}


def attention_case(name):
    """Arguments of forward, but for q, k and v, and these."""
    batch, heads, queries, keys, width, windows, biased, row_relative, granularity = ATTENTIONS[
        name
    ]
    torch.manual_seed(0)
    inputs = [torch.randn(batch, n, heads, width).transpose(1, 2) for n in (queries, keys, keys)]

    def shape(tokens):
        return {'head': (heads, 1, 1), 'tensor': (1,), 'token': (tokens, 1)}[granularity]

    value_shape = (1,) if granularity == 'tensor' else (heads, 1, 1)
    shapes = (shape(queries), shape(keys), value_shape, shape(queries))
    scales = [torch.rand(s) * 0.2 + 0.2 for s in shapes[:3]] + [torch.rand(shapes[3]) * 0.02 + 0.06]
    offsets = [-1.8 + 0.1 * torch.randn(s) for s in shapes[:2]] + [None, None]
    grids = [*WIDE, *NARROW, *[-8, 7, 12], *NARROW]
    bias = torch.randn(heads, queries, keys) if biased else None
    mask = torch.randn(windows, queries, keys) if windows else None
    return inputs, (0.2, bias, mask, scales, offsets, grids, row_relative)


@pytest.mark.parametrize('name', ATTENTIONS)
def test_attention_equals_its_composition(name, isa):
    inputs, settings_ = attention_case(name)
    found = ops.attention_fake_quant(*inputs, *settings_)
    expected = training_attention.attention_fake_quant(*inputs, *settings_)
    for a, b in zip(found[1:4], expected[1:4], strict=True):
        assert torch.equal(a, b)
    assert found[0].stride() == expected[0].stride()
    assert close(found[0], expected[0])
    assert close(found[4], expected[4])
    grad = torch.randn_like(expected[0])
    args = (grad, list(expected[1:4]), expected[4], *settings_)
    grads = ops.attention_fake_quant_backward(*args)
    for a, b in zip(grads, training_attention.attention_fake_quant_backward(*args), strict=True):
        assert a.shape == b.shape
        assert close(a, b)


def test_the_result_does_not_depend_on_the_number_of_threads(threads):
    inputs, settings_ = attention_case('windows')
    grad = torch.randn_like(inputs[0])
    x, column = torch.randn(500, 96), torch.rand(96) + 0.1
    results = []
    for count in (1, 3):
        threads(count)
        out = ops.attention_fake_quant(*inputs, *settings_)
        back = ops.attention_fake_quant_backward(grad, list(out[1:4]), out[4], *settings_)
        _, state = ops.fake_quant(x, column, None, WIDE)
        results.append([*out, *back, *ops.fake_quant_backward(x, state, column, None, WIDE)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def calls():
    """One call of every op that is not in place."""
    x, scale, offset = torch.randn(4, 6, 12), torch.rand(12) + 0.2, torch.randn(12)
    state = ops.fake_quant(x, scale, offset, WIDE)[1]
    inputs, settings_ = attention_case('windows')
    out = ops.attention_fake_quant(*inputs, *settings_)
    weights = [torch.randn(20, 12), torch.randn(5, 20)]
    mlp = ([scale, torch.ones(1)], [offset, None], [*WIDE, *SIGNED])
    return {
        'fake_quant': (x, scale, offset, WIDE),
        'fake_quant_values': (state, scale, offset, WIDE),
        'fake_quant_backward': (x, state, scale, offset, WIDE),
        'gelu_fake_quant': (x, scale, offset, WIDE),
        'gelu_fake_quant_backward': (x, x, scale, offset, WIDE),
        'attention_fake_quant': (*inputs, *settings_),
        'attention_fake_quant_backward': (out[0], list(out[1:4]), out[4], *settings_),
        'mlp_fake_quant': (x[0], weights, [torch.randn(20), None], *mlp),
        'mlp_fake_quant_backward': (
            torch.randn(6, 5),
            ops.fake_quant(x[0], scale, offset, WIDE)[1],
            torch.randn(6, 20),
            weights,
            *mlp,
        ),
    }


def in_place_calls():
    scores, bias = torch.randn(2, 3, 5, 7), torch.randn(3, 5, 7)
    scale = torch.full((3, 1, 1), 1 / 15)
    rest = (0.3, bias, None, scale, None, NARROW, True)
    return {
        'softmax_fake_quant_': (scores, *rest),
        'softmax_fake_quant_backward_': (torch.randn_like(scores), scores, *rest),
    }


@pytest.mark.parametrize('op', [*calls(), *in_place_calls()])
def test_opcheck(op):
    args = {**calls(), **in_place_calls()}[op]
    tests = ('test_schema', 'test_faketensor')
    torch.library.opcheck(getattr(ops, op).default, args, test_utils=tests)


def test_every_op_is_covered():
    assert set(training.SCHEMAS) == {*calls(), *in_place_calls()}


@pytest.mark.parametrize('row_relative', [True, False])
def test_softmax_gradients_are_those_of_autograd(row_relative, isa):
    """In float64, rounding left out of the way by autograd's straight-through estimate."""
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 5, 21)
    scale = torch.full((3, 1, 1), 1 / 15)
    value = torch.randn(2, 3, 21, 4)
    above = torch.randn(2, 3, 5, 4)

    s, step = scores.double().requires_grad_(), scale.double().requires_grad_()
    shifted = s * 0.7 - (s * 0.7).detach().amax(-1, keepdim=True)
    numerators = shifted.exp()
    total = numerators.sum(-1, keepdim=True)
    probs = numerators if row_relative else numerators / total
    steps = (probs / step).clamp(0, 15)
    quantized = (steps + (steps.round() - steps).detach()) * step
    out = quantized @ value.double()
    out = out / total if row_relative else out
    out.backward(above.double())

    done = scores.clone()
    denominators = ops.softmax_fake_quant_(done, 0.7, None, None, scale, None, NARROW, row_relative)
    assert close(done, quantized.detach())
    assert close(denominators, total.detach())
    grad = (above / denominators if row_relative else above) @ value.mT
    again = scores.clone()
    grads = ops.softmax_fake_quant_backward_(
        grad, again, 0.7, None, None, scale, None, NARROW, row_relative
    )
    assert torch.equal(again, done)
    assert close(grad * 0.7, s.grad)
    assert close(grads[0], step.grad)


@pytest.mark.parametrize('shape', [(0, 33), (3, 0, 33)])
def test_nothing_in_nothing_out(shape):
    scale = torch.ones(33)
    values, state = ops.fake_quant(torch.zeros(shape), scale, None, WIDE)
    assert values.shape == state.shape == shape
    grads = ops.fake_quant_backward(torch.zeros(shape), state, scale, None, WIDE)
    assert grads[0].shape == shape
    assert not grads[1].any()


def test_nan_reaches_the_output():
    values, _ = ops.fake_quant(torch.tensor([[float('nan'), 1.0]]), torch.ones(2), None, NARROW)
    assert values.isnan().tolist() == [[True, False]]


BAD = {
    'at most one axis': lambda: (torch.zeros(2, 3), torch.ones(2, 3), None, NARROW),
    'two bytes': lambda: (torch.zeros(2, 3), torch.ones(3), None, [0, 255, 9]),
    'grid must be': lambda: (torch.zeros(2, 3), torch.ones(3), None, [0, 15]),
    'scale must be float32': lambda: (torch.zeros(2, 3), torch.ones(3).double(), None, NARROW),
    'the input must be one of': lambda: (torch.zeros(2, 3).double(), torch.ones(3), None, NARROW),
    'offset must have shape': lambda: (torch.zeros(2, 3), torch.ones(3), torch.ones(1), NARROW),
}


@pytest.mark.parametrize('message', BAD)
@pytest.mark.parametrize('function', [ops.fake_quant, training_reference.fake_quant])
def test_bad_input_is_refused_in_the_same_words(function, message):
    with pytest.raises(ValueError, match=message):
        function(*BAD[message]())
