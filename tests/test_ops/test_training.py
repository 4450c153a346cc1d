"""The ops of training: every instruction set against plain torch."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_layers import ISAS

from gplq_mm.ops import native, training, training_attention, training_reference
from gplq_mm.quant.functional import look_up

ops = torch.ops.gplq_mm
NARROW, WIDE, SIGNED, BYTE = [0, 15, 4], [0, 15, 12], [-8, 7, 4], [0, 255, 8]
# Of 64 positions, in one byte and in two.
FINE, FINEST = [0, 63, 2], [0, 63, 10]
NO_TABLE = torch.empty(0, dtype=torch.uint8)
# Shape of an input and of a scale: a scale a column, one for all, a head, a channel, a token.
LAYOUTS = {
    'column': ((3, 7, 33), (33,)),
    'tensor': ((3, 7, 33), (1,)),
    'head': ((2, 3, 9, 20), (3, 1, 1)),
    'map': ((2, 5, 6, 7), (5, 1, 1)),
    'token': ((2, 3, 9, 20), (9, 1)),
    'item': ((4, 3, 5, 6), (4, 1, 1, 1)),
    'row': ((40,), (1,)),
}


def random_grid(shape, generator, symmetric=False):
    scale = 0.2 + 0.3 * torch.rand(shape, generator=generator)
    return scale, None if symmetric else -2 + torch.randn(shape, generator=generator) * 0.5


def random_table(generator, *heads):
    """A table of 16 ascending integers, or one for every head."""
    shape = (*heads, 64)
    levels = torch.rand(shape, generator=generator).argsort(-1)[..., :16].sort(-1).values
    position = torch.arange(64).expand(shape)
    nearest = (position[..., None] - levels[..., None, :]).abs().argmin(-1)
    return levels.gather(-1, nearest).to(torch.uint8)


# Grids, and whether one table, a table a head or none goes with them.
GRIDS = [*((grid, '') for grid in (NARROW, WIDE, SIGNED, BYTE)), (FINE, 'one'), (FINEST, 'heads')]


def table_of(kind, shape, generator):
    heads = shape[-3:-2] if kind == 'heads' else ()
    return random_table(generator, *heads) if kind else NO_TABLE


def close(a, b, tolerance=2e-5):
    """Relative distance; sums of many numbers differ by rounding."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm()) <= tolerance * float(b.norm()) + 1e-6


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**16),
    st.sampled_from(list(LAYOUTS)),
    st.sampled_from(GRIDS),
    st.booleans(),
    st.sampled_from(ISAS or ['torch']),
)
def test_fake_quant_equals_the_reference(seed, layout, grid, symmetric, isa):
    grid, kind = grid
    if isa == 'torch':
        pytest.skip('installed without compiled kernels')
    generator = torch.Generator().manual_seed(seed)
    shape, scale_shape = LAYOUTS[layout]
    x = 3 * torch.randn(shape, generator=generator)
    scale, offset = random_grid(scale_shape, generator, symmetric)
    scale = scale / (4 if kind else 1)
    quantizer = scale, offset, table_of(kind, shape, generator), grid
    grad = torch.randn(shape, generator=generator)
    with native.use_isa(isa):
        values, state = ops.fake_quant(x, *quantizer)
        expected, expected_state = training_reference.fake_quant(x, *quantizer)
        assert torch.equal(values, expected)
        assert state.dtype == expected_state.dtype
        # A residual in the middle between two levels goes to either.
        assert (state != expected_state).float().mean() < 2e-2
        assert torch.equal(ops.fake_quant_values(expected_state, *quantizer), expected)
        args = (grad, expected_state, *quantizer)
        found = ops.fake_quant_backward(*args)
    wanted = training_reference.fake_quant_backward(*args)
    assert torch.equal(found[0], wanted[0])
    assert close(found[1], wanted[1])
    assert close(found[2], wanted[2])


@settings(deadline=None, max_examples=15)
@given(
    st.integers(0, 2**16),
    st.sampled_from(['column', 'tensor']),
    st.booleans(),
    st.sampled_from(ISAS or ['']),
)
def test_gelu_fake_quant_equals_the_reference(seed, layout, tabled, isa):
    if not isa:
        pytest.skip('installed without compiled kernels')
    generator = torch.Generator().manual_seed(seed)
    shape, scale_shape = LAYOUTS[layout]
    x = 2 * torch.randn(shape, generator=generator)
    x[0, 0, :3] = torch.tensor([-30.0, 30.0, 0.0])
    scale = 0.05 + 0.1 * torch.rand(scale_shape, generator=generator)
    scale = scale / (4 if tabled else 1)
    table = random_table(generator) if tabled else NO_TABLE
    quantizer = scale, torch.full(scale_shape, -0.17), table, FINEST if tabled else WIDE
    grad = torch.randn(shape, generator=generator)
    with native.use_isa(isa):
        found = ops.gelu_fake_quant(x, *quantizer)
        grads = ops.gelu_fake_quant_backward(grad, x, *quantizer)
    expected = training_reference.gelu_fake_quant(x, *quantizer)
    # Two GELUs decide a tie differently now and then.
    same = (found - expected).abs() < scale / 2
    assert same.float().mean() > 0.999
    wanted = training_reference.gelu_fake_quant_backward(grad, x, *quantizer)
    assert torch.equal(grads[1], found)
    assert close(grads[0][same], wanted[0][same])
    if bool(same.all()):
        assert close(grads[2], wanted[2], 1e-4)
        assert close(grads[3], wanted[3], 1e-4)


ATTENTIONS = {
    # batch, heads, queries, keys, width, windows, bias, row_relative, granularity, tables
    'plain': (4, 3, 50, 50, 32, 0, False, True, 'head', ''),
    'windows': (8, 2, 49, 49, 16, 4, True, True, 'head', ''),
    'rectangle': (2, 3, 17, 23, 8, 0, True, False, 'tensor', ''),
    'token': (3, 2, 9, 9, 7, 0, False, True, 'token', ''),
    'levels': (4, 3, 50, 50, 32, 0, False, True, 'head', 'heads'),
    'levels of a token': (3, 2, 9, 11, 7, 0, True, False, 'token', 'heads'),
    'levels of a tensor': (8, 2, 49, 49, 16, 4, True, True, 'tensor', 'one'),
}


def attention_case(name):
    """Arguments of forward, but for q, k and v, and these."""
    batch, heads, queries, keys, width, windows, biased, row_relative, *rest = ATTENTIONS[name]
    granularity, kind = rest
    torch.manual_seed(0)
    inputs = [torch.randn(batch, n, heads, width).transpose(1, 2) for n in (queries, keys, keys)]

    def shape(tokens):
        return {'head': (heads, 1, 1), 'tensor': (1,), 'token': (tokens, 1)}[granularity]

    value_shape = (1,) if granularity == 'tensor' else (heads, 1, 1)
    shapes = (shape(queries), shape(keys), value_shape, shape(queries))
    generator = torch.Generator().manual_seed(0)
    tables = [table_of(kind, (heads, 1, 1), generator) for _ in shapes]
    scales = [torch.rand(s) * 0.2 + 0.2 for s in shapes[:3]] + [torch.rand(shapes[3]) * 0.02 + 0.06]
    offsets = [-1.8 + 0.1 * torch.randn(s) for s in shapes[:2]] + [None, None]
    grids = [*WIDE, *NARROW, *[-8, 7, 12], *NARROW]
    if kind:
        grids = [*FINEST, *FINE, *FINEST, *FINEST]
        scales = [scale / 4 for scale in scales]
        offsets[2] = torch.full(value_shape, -1.8)
    bias = torch.randn(heads, queries, keys) if biased else None
    mask = torch.randn(windows, queries, keys) if windows else None
    return inputs, (0.2, bias, mask, scales, offsets, tables, grids, row_relative)


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
        quantizer = column, None, NO_TABLE, WIDE
        _, state = ops.fake_quant(x, *quantizer)
        results.append([*out, *back, *ops.fake_quant_backward(x, state, *quantizer)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def calls():
    """One call of every op that is not in place."""
    x, scale, offset = torch.randn(4, 6, 12), torch.rand(12) + 0.2, torch.randn(12)
    quantizer = scale, offset, NO_TABLE, WIDE
    state = ops.fake_quant(x, *quantizer)[1]
    inputs, settings_ = attention_case('windows')
    out = ops.attention_fake_quant(*inputs, *settings_)
    weights = [torch.randn(20, 12), torch.randn(5, 20)]
    table = torch.arange(64, dtype=torch.uint8)
    mlp = ([scale, torch.ones(1)], [offset, None], [NO_TABLE, table], [*WIDE, *FINE])
    return {
        'fake_quant': (x, *quantizer),
        'fake_quant_values': (state, *quantizer),
        'fake_quant_backward': (x, state, *quantizer),
        'gelu_fake_quant': (x, *quantizer),
        'gelu_fake_quant_backward': (x, x, *quantizer),
        'attention_fake_quant': (*inputs, *settings_),
        'attention_fake_quant_backward': (out[0], list(out[1:4]), out[4], *settings_),
        'mlp_fake_quant': (x[0], weights, [torch.randn(20), None], *mlp),
        'mlp_fake_quant_backward': (
            torch.randn(6, 5),
            ops.fake_quant(x[0], *quantizer)[1],
            torch.randn(6, 20),
            weights,
            *mlp,
        ),
    }


def in_place_calls():
    scores, bias = torch.randn(2, 3, 5, 7), torch.randn(3, 5, 7)
    scale = torch.full((3, 1, 1), 1 / 15)
    rest = (0.3, bias, None, scale, None, NO_TABLE, NARROW, True)
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


def straight_through(x, scale, offset, table, limits):
    """The format as plain autograd sees it, in float64."""
    steps = (x - offset) / scale
    inside = (steps >= limits[0]) & (steps <= limits[1])
    integers = steps.detach().round().clamp(*limits)
    integers = look_up(integers, table if table.numel() else None)
    return torch.where(inside, steps + (integers - steps).detach(), integers) * scale + offset


@pytest.mark.parametrize('layout', ['column', 'head', 'token'])
@pytest.mark.parametrize(('grid', 'kind'), [(FINEST, 'one'), (FINEST, 'heads'), (WIDE, '')])
def test_gradients_are_those_of_autograd(layout, grid, kind, isa):
    generator = torch.Generator().manual_seed(0)
    shape, scale_shape = LAYOUTS[layout]
    scale, offset = random_grid(scale_shape, generator)
    scale = scale / (4 if kind else 1)
    table = table_of(kind, shape, generator)
    x, above = (2 * torch.randn(shape, generator=generator) for _ in range(2))

    inputs = [tensor.double().requires_grad_() for tensor in (x, scale, offset)]
    expected = straight_through(*inputs, table, grid[:2])
    wanted = torch.autograd.grad(expected, inputs, above.double())

    values, state = ops.fake_quant(x, scale, offset, table, grid)
    assert close(values, expected)
    found = ops.fake_quant_backward(above, state, scale, offset, table, grid)
    assert close(found[0], wanted[0])
    # Of the residual a state keeps so many bits.
    assert close(found[1], wanted[1], 1e-3)
    assert close(found[2], wanted[2])


@pytest.mark.parametrize('kind', ['', 'heads'])
@pytest.mark.parametrize('row_relative', [True, False])
def test_softmax_gradients_are_those_of_autograd(row_relative, kind, isa):
    """In float64, rounding left out of the way by autograd's straight-through estimate."""
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 5, 21)
    grid = FINEST if kind else NARROW
    scale = torch.full((3, 1, 1), 1 / grid[1])
    table = table_of(kind, scores.shape, torch.Generator().manual_seed(0))
    value = torch.randn(2, 3, 21, 4)
    above = torch.randn(2, 3, 5, 4)

    s, step = scores.double().requires_grad_(), scale.double().requires_grad_()
    shifted = s * 0.7 - (s * 0.7).detach().amax(-1, keepdim=True)
    numerators = shifted.exp()
    total = numerators.sum(-1, keepdim=True)
    probs = numerators if row_relative else numerators / total
    quantized = straight_through(probs, step, 0.0, table, grid[:2])
    out = quantized @ value.double()
    out = out / total if row_relative else out
    out.backward(above.double())

    done = scores.clone()
    rest = (0.7, None, None, scale, None, table, grid, row_relative)
    denominators = ops.softmax_fake_quant_(done, *rest)
    assert close(done, quantized.detach())
    assert close(denominators, total.detach())
    grad = (above / denominators if row_relative else above) @ value.mT
    again = scores.clone()
    grads = ops.softmax_fake_quant_backward_(grad, again, *rest)
    assert torch.equal(again, done)
    assert close(grad * 0.7, s.grad)
    assert close(grads[0], step.grad)


@pytest.mark.parametrize('shape', [(0, 33), (3, 0, 33)])
def test_nothing_in_nothing_out(shape):
    quantizer = torch.ones(33), None, NO_TABLE, WIDE
    values, state = ops.fake_quant(torch.zeros(shape), *quantizer)
    assert values.shape == state.shape == shape
    grads = ops.fake_quant_backward(torch.zeros(shape), state, *quantizer)
    assert grads[0].shape == shape
    assert not grads[1].any()


@pytest.mark.parametrize(('grid', 'kind'), [(NARROW, ''), (FINE, 'one')])
def test_nan_reaches_the_output(grid, kind, isa):
    x = torch.tensor([[float('nan'), 1.0]])
    table = table_of(kind, x.shape, torch.Generator().manual_seed(0))
    values, _ = ops.fake_quant(x, torch.ones(2), None, table, grid)
    assert values.isnan().tolist() == [[True, False]]


ZEROS, ONES = torch.zeros(2, 3), torch.ones(3)
TABLE = torch.arange(64, dtype=torch.uint8)
BAD = {
    'at most one axis': (ZEROS, torch.ones(2, 3), None, NO_TABLE, NARROW),
    'two bytes': (ZEROS, ONES, None, NO_TABLE, [0, 255, 9]),
    'grid must be': (ZEROS, ONES, None, NO_TABLE, [0, 15]),
    'scale must be float32': (ZEROS, ONES.double(), None, NO_TABLE, NARROW),
    'the input must be one of': (ZEROS.double(), ONES, None, NO_TABLE, NARROW),
    'offset must have shape': (ZEROS, ONES, torch.ones(1), NO_TABLE, NARROW),
    'table must be uint8': (ZEROS, ONES, None, TABLE.int(), FINE),
    'table must have shape [64], got [16]': (ZEROS, ONES, None, TABLE[:16], NARROW),
    'table must have shape [64], got [3, 64]': (ZEROS, ONES, None, TABLE.expand(3, 64), FINE),
    'shape [2, 64], got [3, 64]': (torch.zeros(2, 4, 3), ONES, None, TABLE.expand(3, 64), FINE),
    'positions 0..63 where table has levels': (ZEROS, ONES, None, TABLE, NARROW),
    'table must lie in 0..63': (ZEROS, ONES, None, TABLE + 1, FINE),
    'levels that ascend': (ZEROS, ONES, None, TABLE.flip(0), FINE),
}


@pytest.mark.parametrize('message', BAD)
def test_bad_input_is_refused_in_the_same_words(message):
    said = []
    for function in (ops.fake_quant, training_reference.fake_quant):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            function(*BAD[message])
        said.append(str(caught.value))
    assert len(set(said)) == 1


def test_the_output_of_a_gelu_has_one_table():
    for function in (ops.gelu_fake_quant, training_reference.gelu_fake_quant):
        with pytest.raises(ValueError, match='has one table'):
            function(torch.zeros(2, 2, 3), ONES, None, TABLE.expand(2, 64), FINE)
