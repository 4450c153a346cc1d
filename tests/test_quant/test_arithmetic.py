"""The float operations against float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gplq_mm.quant import arithmetic

INF, NAN = float('inf'), float('nan')


def test_fma_rounds_once():
    a = torch.tensor([1 + 2.0**-12])
    assert arithmetic.fma(a, a, torch.tensor([-1.0])).item() == 2.0**-11 + 2.0**-24


@pytest.mark.parametrize('fuses', [True, False])
def test_fma_is_the_same_where_torch_rounds_twice(monkeypatch, fuses):
    torch.manual_seed(0)
    a, b, c = torch.randn(3, 5000)
    exact = (a.double() * b.double() + c.double()).float()
    if not fuses:
        monkeypatch.setitem(arithmetic._fuses, 'cpu', False)
    elif not arithmetic._addcmul_fuses(a.device):
        pytest.skip('torch.addcmul rounds twice on this machine')
    assert torch.equal(arithmetic.fma(a, b, c), exact)


def test_exp2_is_accurate_and_exact_at_integers():
    x = -torch.rand(100_000) * 140
    exact = torch.exp2(x.double().clamp(min=-126))
    assert ((arithmetic.exp2(x) - exact) / exact).abs().max() < 1.5e-7
    whole = -torch.arange(127.0)
    assert torch.equal(arithmetic.exp2(whole), torch.exp2(whole.double()).float())
    found = arithmetic.exp2(torch.tensor([-INF, NAN]))
    assert found[0] == 2.0**-126
    assert found[1].isnan()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.sampled_from([0.0, 3.0, 100.0]), st.integers(0, 2**31))
def test_layer_norm_is_accurate(columns, mean, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, columns, generator=generator) + mean
    weight, bias = torch.randn(2, columns, generator=generator)
    out = arithmetic.layer_norm(x, weight, bias, 1e-6)
    exact = F.layer_norm(x.double(), (columns,), weight.double(), bias.double(), 1e-6)
    spread = x.double().var(-1, keepdim=True, correction=0).add(1e-6).sqrt()
    allowed = weight.abs() * (2e-6 + 4e-7 * (mean + 5) / spread) + 1e-6
    assert ((out - exact).abs() <= allowed).all()


def test_sums_have_the_order_that_the_kernels_have():
    # A one is lost where it meets 2**24 alone; two that met each other first are kept.
    # Columns 0 and 16 are added first; of 16, those two apart, then one, eight, four.
    for near, far in ((16, 2), (2, 1), (1, 8), (8, 4)):
        for partner, expected in ((near, 2.0**24), (far + near, 2.0**24 + 2)):
            row = torch.zeros(32)
            row[0], row[far], row[partner] = 2.0**24, 1.0, 1.0
            assert arithmetic._softmax_sum(row).item() == expected


def test_gelu_is_accurate():
    x = torch.linspace(-9, 9, 200_003)
    exact = F.gelu(x.double())
    allowed = 1.5e-7 * x.abs().clamp_min(1)
    assert ((arithmetic.gelu(x) - exact).abs() < allowed.clamp_min(5.3e-7 * (x < -5))).all()
    strided = x[:200_000].reshape(200, 1000).T
    assert torch.equal(arithmetic.gelu(strided), arithmetic.gelu(strided.contiguous()))


def test_gelu_at_the_ends():
    out = arithmetic.gelu(torch.tensor([INF, 1e30, 0.0, -1e30, -INF, NAN]))
    assert out[:3].tolist() == [INF, pytest.approx(1e30), 0.0]
    assert out[3] == out[4] < 0
    assert out[4] > -1e-6
    assert out[5].isnan()


@pytest.mark.parametrize('windows', [None, 1, 3])
def test_attention_of_many_items_is_that_of_each(monkeypatch, windows):
    torch.manual_seed(0)
    batch, heads, tokens, channels = 6, 2, 7, 5
    q, k, v = torch.randn(3, batch, heads, tokens, channels)
    grids = torch.rand(4, 2, heads) * 0.3 + 0.05
    limits = [0, 15, -8, 7, -8, 7, 0, 15]
    mask = None if windows is None else torch.randn(windows, tokens, tokens)
    whole = arithmetic.attention(q, k, v, 0.4, grids, limits, True, mask=mask)
    monkeypatch.setattr(arithmetic, 'CHUNK', 1)
    parts = arithmetic.attention(q, k, v, 0.4, grids, limits, True, mask=mask)
    assert torch.equal(whole, parts)
    for i in range(batch):
        own = None if mask is None else mask[i % windows][None]
        item = slice(i, i + 1)
        one = arithmetic.attention(q[item], k[item], v[item], 0.4, grids, limits, True, mask=own)
        assert torch.equal(whole[item], one)


LIMITS = [0, 63] * 4


def _grids(heads: int) -> torch.Tensor:
    grids = torch.rand(4, 2, heads) * 0.1 + 0.02
    grids[:3, 1] -= 2.5
    grids[3] *= 0.2
    return grids


@pytest.mark.parametrize('row_relative', [False, True])
def test_attention_with_a_table_of_every_position_is_that_without(row_relative):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 7, 5)
    grids = _grids(3)
    identity = torch.arange(64, dtype=torch.uint8)
    plain = arithmetic.attention(q, k, v, 0.4, grids, LIMITS, row_relative)
    for tables in ([identity] * 4, [identity.expand(3, 64), None, None, identity.expand(3, 64)]):
        out = arithmetic.attention(q, k, v, 0.4, grids, LIMITS, row_relative, tables=tables)
        assert torch.equal(out, plain)


def test_attention_multiplies_the_levels_of_each_head():
    torch.manual_seed(1)
    heads = 3
    q, k, v = torch.randn(3, 2, heads, 7, 5)
    grids = _grids(heads)
    levels = torch.stack([torch.randperm(64)[:16].sort().values for _ in range(heads)])
    nearest = (torch.arange(64)[None, :, None] - levels[:, None]).abs().argmin(-1)
    table = levels.gather(1, nearest).to(torch.uint8)

    def rounded(i: int, x: torch.Tensor) -> torch.Tensor:
        scale, offset = grids[i].double()[:, :, None, None]
        position = ((x.double() - offset) / scale).round().clamp(0, 63).long()
        integers = torch.stack([table[h][position[:, h]] for h in range(heads)], 1)
        return integers * scale + offset

    scores = rounded(0, q) @ rounded(1, k).mT * 0.4
    expected = rounded(3, scores.softmax(-1)) @ rounded(2, v)
    out = arithmetic.attention(q, k, v, 0.4, grids, LIMITS, False, tables=[table] * 4)
    assert torch.allclose(out.double(), expected, atol=1e-5)


def test_a_nan_stays_beside_a_table():
    torch.manual_seed(2)
    q, k, v = torch.randn(3, 1, 2, 4, 5)
    q[0, 1, 2, 3] = NAN
    table = torch.arange(64, dtype=torch.uint8)
    out = arithmetic.attention(q, k, v, 0.4, _grids(2), LIMITS, False, tables=[table] * 4)
    assert out[0, 1, 2].isnan().all()
    assert out.isnan().sum() == 5
