"""Attention adapters: the float model when off, the explicit formula when on."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmdet.models.backbones.swin import WindowMSA as MMDetWindowMSA
from mmpretrain.models.utils.attention import MultiheadAttention, ShiftWindowMSA, WindowMSA
from torch import nn

from gplq_mm.layers import (
    QuantAttention,
    calibrate,
    freeze_activations,
    quantize_model,
    quantizers_disabled,
)
from gplq_mm.quant import ActSpec, PolicyError, QuantPolicy

DIM, HEADS, SIDE = 16, 2, 4


def window_mask():
    """Mask of the shifted windows of an 8x8 map, ``(4, 16, 16)``."""
    return ShiftWindowMSA.get_attn_mask((8, 8), SIDE, SIDE // 2)


class Wrapper(nn.Module):
    """Gives the attention a name, and its other arguments."""

    def __init__(self, attn, *args):
        super().__init__()
        self.attn, self.args = attn, args

    def forward(self, x):
        return self.attn(x, *self.args)


CASES = {
    'vit': lambda: Wrapper(MultiheadAttention(DIM, HEADS)),
    'vit qk_scale': lambda: Wrapper(MultiheadAttention(DIM, HEADS, qk_scale=0.1)),
    'window': lambda: Wrapper(WindowMSA(DIM, (SIDE, SIDE), HEADS)),
    'window qk_scale': lambda: Wrapper(WindowMSA(DIM, (SIDE, SIDE), HEADS, qk_scale=0.7)),
    'window mask': lambda: Wrapper(WindowMSA(DIM, (SIDE, SIDE), HEADS), window_mask()),
    'mmdet': lambda: Wrapper(MMDetWindowMSA(DIM, HEADS, (SIDE, SIDE))),
    'mmdet mask': lambda: Wrapper(MMDetWindowMSA(DIM, HEADS, (SIDE, SIDE)), window_mask()),
    'shifted': lambda: Wrapper(ShiftWindowMSA(DIM, HEADS, SIDE, shift_size=2), (8, 8)),
    'padded': lambda: Wrapper(ShiftWindowMSA(DIM, HEADS, SIDE, 2, pad_small_map=True), (7, 6)),
}


def build(case):
    model = CASES[case]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    tokens = {'shifted': 64, 'padded': 42}.get(case, 16)
    return model, torch.randn(8, tokens, DIM)


def quantized(model, x, **policy):
    quantize_model(model, QuantPolicy(**policy))
    with torch.no_grad():
        calibrate(model, lambda _index, _passes: model(x))
    return model


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('granularity', ['head', 'tensor'])
def test_disabled_quantizers_give_the_float_model(case, granularity):
    model, x = build(case)
    keys, expected = dict(model.named_parameters()), model(x)
    operands = {key: dict(granularity=granularity) for key in ('q', 'k', 'v', 'probs')}
    quantized(model, x, **operands)
    with quantizers_disabled(model):
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert (model(x) - expected).abs().max() > 1e-3
    after = dict(model.named_parameters())
    assert all(after[key] is parameter for key, parameter in keys.items())


def quantize_heads(x, quantizer):
    """Per head, in float64, by hand."""
    qmin, qmax = quantizer.spec.code_range
    out = torch.empty(x.shape, dtype=torch.float64)
    for head in range(HEADS):
        scale = quantizer.scale[head].double()
        offset = 0.0 if quantizer.offset is None else quantizer.offset[head].double()
        codes = ((x[:, head].double() - offset) / scale).round().clamp(qmin, qmax)
        out[:, head] = codes * scale + offset
    return out


@pytest.mark.parametrize('case', ['vit', 'window', 'window mask', 'mmdet', 'mmdet mask'])
@pytest.mark.parametrize('row_relative', [False, True])
@torch.no_grad()
def test_quantized_attention_is_the_explicit_formula(case, row_relative):
    model, x = build(case)
    quantized(model, x, probs=dict(row_relative=row_relative))
    attn = model.attn
    operands = attn.scaled_dot_product_attention if case == 'vit' else attn.quant_attention
    batch, tokens, _ = x.shape
    qkv = attn.qkv(x).reshape(batch, tokens, 3, HEADS, DIM // HEADS)
    q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
    q = quantize_heads(q, operands.q)
    k, v = quantize_heads(k, operands.k), quantize_heads(v, operands.v)
    scores = torch.einsum('bhnd,bhmd->bhnm', q, k) / (DIM // HEADS) ** 0.5
    if case != 'vit':
        for i in range(tokens):
            for j in range(tokens):
                dy, dx = i // SIDE - j // SIDE + SIDE - 1, i % SIDE - j % SIDE + SIDE - 1
                row = dy * (2 * SIDE - 1) + dx
                scores[:, :, i, j] += attn.relative_position_bias_table[row]
    if 'mask' in case:
        for window in range(batch):
            scores[window] += model.args[0][window % 4]
    probs, row_max = scores.softmax(-1), scores.softmax(-1).amax(-1, keepdim=True)
    if row_relative:
        probs = quantize_heads(probs / row_max, operands.probs) * row_max
    else:
        probs = quantize_heads(probs, operands.probs)
    out = torch.einsum('bhnm,bhmd->bnhd', probs, v).reshape(batch, tokens, DIM)
    expected = attn.proj(out.float())
    found = model(x)
    # A probability within an ulp of a rounding boundary may fall to either side.
    close = torch.isclose(found, expected, rtol=1e-4, atol=1e-4)
    assert close.float().mean() > 0.99


@pytest.mark.parametrize('case', ['vit', 'window mask', 'shifted'])
@pytest.mark.parametrize('row_relative', [False, True])
def test_gradients_reach_scales_and_weights(case, row_relative):
    model, x = build(case)
    quantized(model, x, probs=dict(row_relative=row_relative))
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert model.get_parameter(next(n for n, _ in model.named_parameters())).grad.any()


TOKEN_SPECS = {
    key: dict(granularity='token', zero_point='none', tokens=16) for key in ('q', 'k', 'probs')
}


@pytest.mark.parametrize('case', ['vit', 'window'])
def test_per_token_scales(case):
    model, x = build(case)
    quantized(model, x, **TOKEN_SPECS)
    attn = model.attn
    operands = attn.scaled_dot_product_attention if case == 'vit' else attn.quant_attention
    assert operands.q.scale.shape == (16, 1)
    assert operands.v.scale.shape == (HEADS, 1, 1)
    # The scale of a token follows the largest value of that token alone.
    model, x = build(case)
    with torch.no_grad():
        x[:, 3] *= 50
    quantized(model, x, q=dict(TOKEN_SPECS['q'], observer='minmax'))
    attn = model.attn
    operands = attn.scaled_dot_product_attention if case == 'vit' else attn.quant_attention
    assert operands.q.scale.flatten().argmax() == 3


def test_a_window_knows_its_number_of_tokens():
    model, x = build('window')
    quantized(model, x, q=dict(granularity='token'))
    assert model.attn.quant_attention.q.scale.shape == (SIDE * SIDE, 1)


def test_vit_must_be_told_its_number_of_tokens():
    model, _ = build('vit')
    with pytest.raises(PolicyError, match=r'attn\.q.*tokens=N'):
        quantize_model(model, QuantPolicy(q=dict(granularity='token')))


def test_another_number_of_tokens_is_refused():
    model, x = build('vit')
    quantized(model, x, **TOKEN_SPECS)
    with pytest.raises(ValueError, match=r'attn\.q.*16 scales'):
        model(x[:, :9])


def test_log_sqrt2_probabilities():
    model, x = build('vit')
    quantized(model, x, probs=dict(format='log_sqrt2', row_relative=False))
    probs = model.attn.scaled_dot_product_attention.probs
    out = probs(torch.rand(2, HEADS, 16, 16).pow(4))
    assert (out == 0).any()
    ratio = (out / probs.scale)[out > 0].log2() * 2
    torch.testing.assert_close(ratio, ratio.round(), rtol=0, atol=1e-4)


@pytest.mark.parametrize('case', CASES)
def test_deep_copy_is_independent_and_equal(case):
    model, x = build(case)
    quantized(model, x)
    expected = model(x)
    clone = copy.deepcopy(model)
    assert torch.equal(clone(x), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(clone(x), expected)


@pytest.mark.parametrize('case', ['vit', 'window mask'])
def test_state_dict_round_trip(case):
    model, x = build(case)
    quantized(model, x)
    other, _ = build(case)
    quantize_model(other, QuantPolicy())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_flat_rows_keep_their_resolution_when_row_relative():
    # A row of 64 equal probabilities beside rows with a single large one.
    scores = torch.zeros(1, HEADS, 64, 64)
    scores[:, :, 1:] = 20 * torch.eye(64)[1:]
    value = torch.randn(1, HEADS, 64, 4)
    errors = []
    for row_relative in (True, False):
        spec = ActSpec(
            granularity='tensor',
            zero_point='none',
            signed=False,
            observer='minmax',
            row_relative=row_relative,
        )
        specs = dict(q=None, k=None, v=None, probs=spec)
        attention = QuantAttention(specs, HEADS, None, 'attn')
        with torch.no_grad():
            calibrate(attention, lambda _index, _passes, attn=attention: attn.mix(scores, value))
        found = attention.mix(scores, value)[:, :, 0]
        errors.append((found - value.mean(2)).abs().max().item())
    assert errors[0] < 1e-5
    assert errors[1] > 0.05


def test_excluded_operands_are_left_alone():
    model, x = build('vit')
    rules = [dict(pattern=r'\.(q|k|v)$', exclude=True)]
    quantized(model, x, rules=rules)
    operands = model.attn.scaled_dot_product_attention
    assert isinstance(operands.q, nn.Identity)
    assert operands.probs.spec.bits == 4


def test_excluding_all_operands_keeps_the_float_product():
    model, _ = build('window')
    report = quantize_model(
        model, QuantPolicy(rules=[dict(pattern=r'attn\.(q|k|v|probs)$', exclude=True)])
    )
    assert not report.attention
    assert type(model.attn) is WindowMSA


class StrangeAttention(nn.Module):
    """An attention that nobody has taught us."""

    def __init__(self):
        super().__init__()
        self.qkv, self.num_heads = nn.Linear(DIM, 3 * DIM), HEADS

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_unknown_attention_is_named():
    with pytest.raises(PolicyError, match=r"family for the att[^$]*r'\^attn\$'.*StrangeAttention"):
        quantize_model(Wrapper(StrangeAttention()), QuantPolicy())


def test_a_subclass_of_a_known_attention_is_unknown():
    class OtherMSA(WindowMSA):
        pass

    with pytest.raises(PolicyError, match='OtherMSA'):
        quantize_model(Wrapper(OtherMSA(DIM, (SIDE, SIDE), HEADS)), QuantPolicy())


def test_unknown_attention_can_be_excluded():
    model = Wrapper(StrangeAttention())
    report = quantize_model(model, QuantPolicy(rules=[dict(pattern='attn$', exclude=True)]))
    assert report.linear == ['attn.qkv']


@pytest.mark.parametrize(('queries', 'keys', 'width'), [(1, 9, 4), (6, 9, 4), (9, 9, 6)])
def test_queries_may_look_at_other_tokens(queries, keys, width):
    specs = dict.fromkeys(('q', 'k', 'v'), ActSpec(granularity='head'))
    specs['probs'] = ActSpec(granularity='head', zero_point='none', signed=False, row_relative=True)
    attention = QuantAttention(specs, HEADS, None, 'attn')
    shapes = ((queries, 4), (keys, 4), (keys, width))
    query, key, value = (torch.randn(2, HEADS, *shape) for shape in shapes)
    with torch.no_grad():
        calibrate(attention, lambda _index, _passes: attention(query, key, value))
    learning = attention(query.requires_grad_(), key, value)
    assert learning.shape == (2, HEADS, queries, width)
    learning.sum().backward()
    assert all(parameter.grad is not None for parameter in attention.parameters())
    with quantizers_disabled(attention):
        exact = nn.functional.scaled_dot_product_attention(query, key, value)
        torch.testing.assert_close(attention(query, key, value), exact, rtol=1e-5, atol=1e-5)
    freeze_activations(attention)
    with torch.no_grad():
        frozen = attention(query, key, value)
    torch.testing.assert_close(frozen, learning.detach(), rtol=1e-5, atol=1e-5)
    assert 0 < (frozen - exact).norm() < 0.3 * exact.norm()


def test_dropout_acts_on_the_probabilities():
    specs = dict.fromkeys(
        ('q', 'k', 'v', 'probs'), ActSpec(granularity='tensor', observer='minmax')
    )
    attention = QuantAttention(specs, HEADS, None, 'attn')
    q = torch.randn(2, HEADS, 8, 4)
    calibrate(attention, lambda _index, _passes: attention(q, q, q))
    ones = torch.ones_like(q)
    assert torch.equal(attention(q, q, ones), attention(q, q, ones))
    dropped = attention(q, q, ones, dropout_p=0.5)
    assert dropped.std() > 5 * attention(q, q, ones).std()
    assert not torch.equal(dropped, attention(q, q, ones, dropout_p=0.5))


def operands(row_relative=False):
    specs = dict.fromkeys(('q', 'k', 'v'), ActSpec(granularity='head'))
    specs['probs'] = ActSpec(
        granularity='head', zero_point='none', signed=False, row_relative=row_relative
    )
    return QuantAttention(specs, HEADS, None, 'attn')


@st.composite
def sdpa_arguments(draw):
    """Arguments of scaled_dot_product_attention."""
    queries, keys, width = (draw(st.integers(1, 6)) for _ in range(3))
    grouped = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shapes = ((HEADS, queries, 4), *((1 if grouped else HEADS, keys, n) for n in (4, width)))
    args = [torch.randn(2, *shape, generator=generator) for shape in shapes]
    kwargs = dict(
        # Torch's own kernels give NaN for scales near the least number.
        scale=draw(st.none() | st.floats(1e-3, 2)),
        enable_gqa=grouped,
        is_causal=draw(st.booleans()),
    )
    kind = draw(st.sampled_from(['none', 'boolean', 'added']))
    if kind != 'none' and not kwargs['is_causal']:
        shape = draw(st.sampled_from([(queries, keys), (2, 1, queries, keys), (1, HEADS, 1, keys)]))
        mask = torch.randn(shape, generator=generator)
        kwargs['attn_mask'] = mask > 0 if kind == 'boolean' else mask.masked_fill(mask > 1, -1e9)
    return args, kwargs


@given(call=sdpa_arguments(), row_relative=st.booleans())
def test_without_quantizers_it_is_torchs_attention(call, row_relative):
    args, kwargs = call
    attention = operands(row_relative)
    with quantizers_disabled(attention):
        found = attention(*args, **kwargs)
    expected = nn.functional.scaled_dot_product_attention(*args, **kwargs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', ['boolean', 'is_causal'])
@pytest.mark.parametrize('row_relative', [False, True])
def test_quantized_queries_do_not_see_what_is_masked(kind, row_relative):
    attention = operands(row_relative)
    query, key, value = (torch.randn(2, HEADS, 6, 4) for _ in range(3))
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    if kind == 'boolean':
        mask[2] = False
    kwargs = dict(is_causal=True) if kind == 'is_causal' else dict(attn_mask=mask)
    with torch.no_grad():
        calibrate(attention, lambda _index, _passes: attention(query, key, value, **kwargs))
    query.requires_grad_()
    before = attention(query, key, value, **kwargs)
    before.sum().backward()
    assert query.grad.isfinite().all()
    value[:, :, 4:] += 1
    after = attention(query, key, value, **kwargs)
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert not torch.equal(before[:, :, 4:], after[:, :, 4:])
    assert (before[:, :, 2] == 0).all() == (kind == 'boolean')


def test_a_mask_beside_is_causal_is_refused():
    x = torch.randn(1, HEADS, 3, 4)
    with pytest.raises(ValueError, match='give it or attn_mask'):
        operands()(x, x, x, attn_mask=torch.ones(3, 3), is_causal=True)
