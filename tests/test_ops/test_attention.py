"""``int4_attention``: every instruction set against float64 and against the reference."""

import pytest
import torch
from attention_cases import AttentionCase, Bounds, attention_cases, random_case, with_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_layers import ISAS, error_of, every_isa

from gplq_mm.ops import native, reference

attention = torch.ops.gplq_mm.int4_attention
needs_kernels = pytest.mark.skipif(not ISAS, reason='installed without compiled kernels')
NAN = float('nan')
INF = float('inf')


def run(case: AttentionCase) -> torch.Tensor:
    return attention(*case.args)


def expected(case: AttentionCase) -> torch.Tensor:
    return reference.int4_attention(*case.args)


@given(attention_cases())
@settings(max_examples=150, deadline=None)
def test_output_is_exact_but_for_codes_at_a_rounding_boundary(case):
    bounds = Bounds(case)
    bounds.check(expected(case))
    every_isa(lambda: bounds.check(run(case)))


@given(attention_cases())
@settings(max_examples=60, deadline=None)
def test_output_is_the_reference_to_the_last_bit(case):
    wanted = expected(case)

    def check():
        # Equal where both are NaN, too.
        torch.testing.assert_close(run(case), wanted, rtol=0, atol=0, equal_nan=True)

    every_isa(check)


@pytest.mark.parametrize('levels', [0, 16])
@pytest.mark.parametrize('row_relative', [True, False])
@pytest.mark.parametrize(
    ('windows', 'tokens', 'heads', 'channels', 'added'),
    [(1, 197, 6, 64, False), (8, 49, 3, 32, True)],
    ids=['vit', 'swin'],
)
def test_model_shapes(isa, windows, tokens, heads, channels, added, row_relative, levels):
    case = random_case(
        windows, tokens, heads, channels, row_relative=row_relative, levels=(levels,) * 4
    )
    if added:
        case.bias = torch.randn(heads, tokens, tokens)
        case.mask = torch.zeros(4, tokens, tokens).masked_fill_(
            torch.rand(4, tokens, tokens) < 0.3, -100.0
        )
    bounds, out = Bounds(case), run(case)
    bounds.check(out)
    # The bounds decide something.
    assert bounds.uncertain < 2e-4 * bounds.codes
    assert torch.equal(out, expected(case))


@pytest.mark.parametrize('levels', [0, 16])
@pytest.mark.parametrize('channels', [1, 3, 16, 33, 65])
def test_edges_of_vectors(isa, channels, levels):
    for tokens in (1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 97):
        levels_of = (levels,) * 4
        case = random_case(2, tokens, 2, channels, (8,) * 4, symmetric=True, levels=levels_of)
        Bounds(case).check(run(case))


def ties(codes: int, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Values half way between two codes, the next float on either side, and far beyond both
    ends, int ``(..., n)`` of grids ``(..., 1)``."""
    halves = torch.arange(-3, codes + 3) + 0.5
    middle = halves * scale + offset
    far = torch.tensor([-INF, -3e38, -1e10, 0.0, 1e10, 3e38, INF]).expand(*scale.shape[:-1], 7)
    return torch.cat(
        (
            middle,
            middle.nextafter(torch.tensor(INF)),
            middle.nextafter(torch.tensor(-INF)),
            far,
        ),
        -1,
    )


@pytest.mark.parametrize('operand', range(3), ids=['q', 'k', 'v'])
@pytest.mark.parametrize('limits', [(0, 15), (-8, 7), (0, 255), (-128, 127), (3, 20), (-7, 12)])
def test_codes_of_q_k_v_are_those_of_the_reference(isa, operand, limits):
    """One channel and two tokens: the output shows every code."""
    low, high = limits
    scales = torch.tensor([[0.25], [0.3], [0.0173], [1 / 7]])
    offsets = torch.tensor([[0.0], [-1.1], [0.37], [0.5]])
    values = ties(high - low + 1, scales, offsets + low * scales)
    heads, count = values.shape
    # (windows, tokens, 3, heads); the first token is what the second is weighed against.
    qkv = torch.zeros(count, 2, 3, heads)
    qkv[:, :, 2], qkv[:, 1, :2] = 1.0, 1.0
    qkv[:, :, operand] = values.T[:, None]
    if operand == 1:
        qkv[:, 0, 1] = 0.0
    grids = torch.zeros(4, 2, heads)
    grids[:, 0] = 1.0
    grids[operand] = torch.stack((scales[:, 0], offsets[:, 0]))
    codes = [0, 1] * 4
    codes[2 * operand : 2 * operand + 2] = limits
    # The second token stays below the first, by so little that both get code 1: out = 2 / sum.
    reach = max(abs(low), abs(high)) * scales.max().item() + 2
    bias = torch.tensor([0.0, -0.3]).expand(heads, 2, 2)
    case = AttentionCase(qkv.flatten(2), heads, 0.25 / reach, grids, codes, bias=bias)
    out, wanted = run(case), expected(case)
    # Values as large as `reach` cancel in an output of v.
    torch.testing.assert_close(out, wanted, rtol=2e-6, atol=2e-7 * reach if operand == 2 else 0)
    # Neighbouring codes are far enough apart to see.
    seen = wanted[:, 1, 0].unique()
    assert len(seen) == high - low + 1
    assert seen.diff().min() > 5e-5


@pytest.mark.parametrize('levels', [0, 16])
def test_nothing_but_nan_comes_of_nan(isa, levels):
    case = random_case(2, 20, 2, 5, levels=(levels,) * 4)
    spots = {'q': (0, 3, 0, 1, 4), 'k': (0, 19, 1, 0, 0), 'v': (1, 7, 2, 1, 2)}
    for spot in spots.values():
        qkv = case.qkv.clone()
        qkv.view(2, 20, 3, 2, 5)[spot] = NAN
        out, wanted = run(case.but(qkv=qkv)), expected(case.but(qkv=qkv))
        assert wanted.isnan().any()
        assert torch.equal(out.isnan(), wanted.isnan())
        torch.testing.assert_close(out, wanted, equal_nan=True, atol=0.1, rtol=0.1)


@pytest.mark.parametrize('hidden', [-100.0, -1e9, -3e38, -INF])
@pytest.mark.parametrize('row_relative', [True, False])
def test_rows_that_a_mask_hides_altogether(isa, hidden, row_relative):
    case = random_case(2, 19, 2, 8, row_relative=row_relative)
    case.mask = torch.zeros(2, 19, 19)
    case.mask[0, 5] = hidden
    case.mask[1, :, :7] = hidden
    out, wanted = run(case), expected(case)
    assert wanted.isnan().any() == (hidden == -INF)
    assert torch.equal(out.isnan(), wanted.isnan())
    if hidden != -100.0:
        # Then either the scores vanish beside the mask or the whole row is NaN.
        torch.testing.assert_close(out, wanted, equal_nan=True, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('spot', ['bias', 'mask'])
def test_nan_and_infinity_of_what_is_added(isa, spot):
    case = random_case(1, 18, 1, 4)
    added = torch.zeros(1, 18, 18)
    added[0, 2, 17], added[0, 3, 0], added[0, 4, 4] = NAN, INF, -INF
    case = case.but(**{spot: added})
    out, wanted = run(case), expected(case)
    assert torch.equal(out.isnan(), wanted.isnan())
    assert wanted[0, 2:4].isnan().all()
    assert not wanted[0, 4:].isnan().any()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(isa, dtype):
    case = random_case(2, 33, 2, 20)
    case.qkv = case.qkv.to(dtype)
    out = run(case)
    assert out.dtype == dtype
    assert torch.equal(out, run(case.but(qkv=case.qkv.float())).to(dtype))


def test_layouts_other_than_contiguous(isa):
    case = random_case(4, 21, 2, 12, levels=(16, 0, 16, 0))
    case.bias, case.mask = torch.randn(2, 21, 21), torch.randn(2, 21, 21)
    other = with_rows(case, padding=2, missing=1)
    for plain in (case, other):
        strided = plain.but(
            qkv=plain.qkv.mT.contiguous().mT,
            grids=plain.grids.mT.contiguous().mT,
            bias=plain.bias.mT.contiguous().mT,
            mask=plain.mask.mT.contiguous().mT,
            tables=[table.repeat_interleave(2, -1)[..., ::2] for table in plain.tables],
            rows=None if plain.rows is None else plain.rows.mT.contiguous().mT,
        )
        assert not strided.qkv.is_contiguous()
        assert torch.equal(run(strided), run(plain))


def test_windows_are_gathered_by_row(isa):
    case = random_case(3, 10, 2, 7)
    case.bias = torch.randn(2, 10, 10)
    case = with_rows(case, padding=4, missing=2)
    dense = case.but(qkv=case.qkv[case.rows.long()], rows=None)
    out, windows = run(case), run(dense).flatten(0, 1)
    rows = case.rows.flatten().long()
    kept = rows < case.out_rows
    assert torch.equal(out[rows[kept]], windows[kept])
    empty = torch.ones(case.out_rows, dtype=torch.bool)
    empty[rows[kept]] = False
    assert empty.sum() == 2
    assert (out[empty] == 0).all()


@pytest.mark.parametrize(
    ('shape', 'rows', 'out_shape'),
    [
        ((0, 5, 24), None, (0, 5, 8)),
        ((3, 0, 24), None, (3, 0, 8)),
        ((4, 24), torch.zeros(0, 5, dtype=torch.int32), (3, 8)),
        ((4, 24), torch.zeros(2, 0, dtype=torch.int32), (3, 8)),
        ((0, 24), torch.zeros(0, 5, dtype=torch.int32), (0, 8)),
    ],
)
def test_empty(isa, shape, rows, out_shape):
    case = random_case(1, 1, 2, 4)
    case = case.but(
        qkv=torch.randn(shape), rows=rows, out_rows=out_shape[0] if rows is not None else 0
    )
    out, wanted = run(case), expected(case)
    assert out.shape == wanted.shape == out_shape
    assert (out == 0).all()
    assert torch.equal(out, wanted)


@given(
    attention_cases(tokens=st.sampled_from([1, 5, 49, 61, 130])),
    st.integers(2, 3),
)
@settings(max_examples=15, deadline=None)
def test_threads_do_not_change_the_output(case, count):
    before = torch.get_num_threads()

    def check():
        torch.set_num_threads(1)
        single = run(case)
        torch.set_num_threads(count)
        assert torch.equal(run(case), single)
        assert torch.equal(run(case), single)

    try:
        every_isa(check)
    finally:
        torch.set_num_threads(before)


CASE = random_case(2, 6, 2, 4)
ROWS = with_rows(CASE, padding=2, missing=0)


def test_opcheck():
    added = CASE.but(bias=torch.zeros(2, 6, 6), mask=torch.zeros(1, 6, 6))
    tests = ('test_schema', 'test_faketensor', 'test_aot_dispatch_dynamic')
    levels = random_case(2, 6, 2, 4, levels=(0, 16, 16, 16))
    for case in (CASE, added, ROWS, levels):
        torch.library.opcheck(attention.default, case.args, test_utils=tests)


def test_compiles_into_one_graph_for_any_batch():
    def mixed(qkv, rows, out_rows):
        args = CASE.but(qkv=qkv, rows=rows, out_rows=out_rows).args
        return attention(*args) + 1

    compiled = torch.compile(mixed, fullgraph=True, dynamic=True, backend='aot_eager')
    for batch in (1, 2, 5):
        qkv = torch.randn(batch, 6, 24)
        assert torch.equal(compiled(qkv, None, 0), mixed(qkv, None, 0))
        flat, rows = qkv.flatten(0, 1), torch.arange(6 * batch, dtype=torch.int32).reshape(-1, 6)
        assert torch.equal(compiled(flat, rows, 6 * batch), mixed(flat, rows, 6 * batch))


@needs_kernels
def test_the_cpu_has_a_kernel(monkeypatch):
    def unexpected(device):
        raise AssertionError('plain torch ran')

    monkeypatch.setattr(native, 'announce_reference', unexpected)
    run(CASE)


def index(*values: int) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.int32)


GRIDS = CASE.grids
BAD = {
    'dtype': (CASE.but(qkv=CASE.qkv.double()), 'one of float32, float16, bfloat16, got float64'),
    'no heads': (CASE.but(heads=0), 'heads must be at least 1, got 0'),
    'axes': (CASE.but(qkv=CASE.qkv[0]), r'qkv must be \(batch, tokens, 3 \* channels\), got'),
    'columns': (CASE.but(qkv=CASE.qkv[..., :23]), 'qkv has 23 columns, they cannot be q, k and v'),
    'heads': (
        CASE.but(heads=3, grids=torch.ones(4, 2, 3)), '24 columns, .* q, k and v of 3 heads'
    ),
    'no columns': (CASE.but(qkv=CASE.qkv[..., :0]), 'qkv has 0 columns'),
    'grids shape': (CASE.but(grids=GRIDS[:3]), r'grids must have shape \[4, 2, 2\], got'),
    'grids dtype': (CASE.but(grids=GRIDS.double()), 'grids must be float32, got float64'),
    'zero scale': (CASE.but(grids=GRIDS * 0), 'grids must hold positive finite scales, got 0'),
    'negative scale': (CASE.but(grids=-GRIDS), 'grids must hold positive finite scales, got -0'),
    'infinite scale': (CASE.but(grids=GRIDS / 0), 'positive finite scales, got inf'),
    'nan scale': (CASE.but(grids=GRIDS * NAN), 'positive finite scales, got nan'),
    'limits': (CASE.but(limits=[0, 15] * 3), 'limits must be .* got 6 integers'),
    'no limits': (CASE.but(limits=[]), 'limits must be .* got 0 integers'),
    'range': (CASE.but(limits=[0, 15] * 3 + [0, 256]), 'codes must fit a byte: .* got 0..256'),
    'order': (CASE.but(limits=[0, 15, 7, -8] * 2), 'codes must fit a byte: .* got 7..-8'),
    'far range': (CASE.but(limits=[2**40, 2**40 + 1] * 4), 'codes must fit a byte'),
    'bias shape': (
        CASE.but(bias=torch.zeros(2, 6, 5)), r'bias must have shape \[2, 6, 6\], got \[2, 6, 5\]'
    ),
    'bias dtype': (CASE.but(bias=torch.zeros(2, 6, 6).half()), 'bias must be float32, got float16'),
    'mask dtype': (CASE.but(mask=torch.zeros(1, 6, 6).bool()), 'mask must be float32, got bool'),
    'mask shape': (CASE.but(mask=torch.zeros(1, 6, 7)), r'mask must have shape \[1, 6, 6\]'),
    'mask axes': (CASE.but(mask=torch.zeros(6, 6)), r'mask must be \(M, tokens, tokens\) with M'),
    'mask windows': (CASE.but(mask=torch.zeros(3, 6, 6)), 'M a divisor of the 2 windows, got'),
    'no mask': (CASE.but(mask=torch.zeros(0, 6, 6)), 'M a divisor of the 2 windows, got'),
    'rows and batch': (ROWS.but(qkv=CASE.qkv), r'with rows, qkv must be \(R, 3 \* channels\)'),
    'rows axes': (ROWS.but(rows=ROWS.rows[0]), r'rows must be \(windows, tokens\), got shape'),
    'rows dtype': (ROWS.but(rows=ROWS.rows.long()), 'rows must be int32, got int64'),
    'row beyond': (ROWS.but(rows=index(0, 1, 11)), r'rows must lie in 0\.\.10, got 11'),
    'row below': (ROWS.but(rows=index(0, -1, 2)), r'rows must lie in 0\.\.10, got -1'),
    'row again': (ROWS.but(rows=index(0, 1, 3, 1)), 'name an output row once, 1 occurs again'),
    'out rows': (ROWS.but(out_rows=12), r'out_rows must lie in 0\.\.11, got 12'),
    'out rows below': (ROWS.but(out_rows=-1), r'out_rows must lie in 0\.\.11, got -1'),
}  # fmt: skip


@pytest.mark.parametrize('name', BAD)
def test_bad_arguments_are_named_in_the_same_words_everywhere(name):
    case, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        run(case)
    assert error_of(run, case) == error_of(expected, case)


def test_sums_that_could_exceed_int32_are_refused():
    case = random_case(1, 1, 1, 2**16 + 1)
    message = 'sums over 65537 codes can exceed int32; at most 65536 tokens or channels'
    for function in (run, expected):
        with pytest.raises(ValueError, match=message):
            function(case)


def test_the_largest_sums_are_exact(isa):
    """The longest head, all codes at the end that makes the sums largest."""
    channels = 2**16
    limits = [0, 255, -128, 127, -128, 127, 0, 255]
    grids = torch.zeros(4, 2, 1)
    grids[:, 0] = 1.0
    qkv = torch.full((1, 2, 3, 1, channels), -1000.0)
    qkv[:, :, 0] = 1000.0
    case = AttentionCase(qkv.flatten(2), 1, 2.0**-24, grids, limits)
    # Both scores are equal, so both probabilities are 1.
    assert torch.equal(run(case), torch.full((1, 2, channels), -128.0))
