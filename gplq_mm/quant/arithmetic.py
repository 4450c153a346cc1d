"""The float operations between the integer products, defined to the last bit.

A rounding error of 1e-7 in a LayerNorm moves an activation across the border of two codes now and
then, and later layers amplify that: two programs that sum in another order give different labels
to images that are hard to tell apart. So a quantized model has one arithmetic, whatever computes
it. Products are those of integers, and exact. Everything else is a float32 operation of its own,
or a fused multiply-add, in the order in which they stand here; sums run in a fixed number of
columns, which are then added as a tree. The CPU kernels compute the same operations on every
instruction set.
"""

import math

import torch
from torch import Tensor

from .functional import look_up, quantize

# An integer above this is not exact in float32.
EXACT_FLOAT32 = 2**24
# Below it 2**x is not a normal number.
SMALLEST_EXPONENT = -126.0
# 2**f = 1 + f * (c1 + f * (c2 + ...)) for f in [0, 1], relative error below 1.5e-7 with all
# rounding; a minimax fit that is exact at 0, so that the largest score of a row has numerator 1.
EXP2_COEFFICIENTS = (0.69315131, 0.24016445, 0.055799925, 0.0090170139, 0.0018671374)

# Phi(x) - 1/2 is x times a polynomial in x**2 (mapped from 0..5.2**2 to -1..1), Phi the normal
# distribution function; fitted by weighted least squares so that the error of x * Phi(x) is level.
GELU_END = 5.2
GELU_FACTOR = 0.07396451  # 2 / GELU_END**2
GELU_COEFFICIENTS = (
    1.359499842e-01,
    -6.774380058e-02,
    5.002609640e-02,
    -3.992566466e-02,
    3.196270391e-02,
    -2.476078086e-02,
    1.813056692e-02,
    -1.236457378e-02,
    8.023252711e-03,
    -5.044835620e-03,
    2.637060126e-03,
    -9.999474278e-04,
    6.242647069e-04,
    -5.545432796e-04,
    1.940482471e-04,
)

# Columns that a sum of probabilities, or of a LayerNorm, runs in.
SOFTMAX_SUMS = 16
NORM_SUMS = 64
# Values that are worked on at a time: intermediate results stay in the cache.
CHUNK = 1 << 16

_fuses: dict[str, bool] = {}


def _addcmul_fuses(device: torch.device) -> bool:
    """Whether ``torch.addcmul`` rounds once, on this kind of device."""
    if device.type not in _fuses:
        # (1 + 2^-12)^2 - 1 is 2^-11 + 2^-24; a product that is rounded by itself loses the 2^-24.
        factor = torch.full((64,), 1 + 2**-12, device=device)
        total = torch.addcmul(torch.full((64,), -1.0, device=device), factor, factor)
        _fuses[device.type] = bool((total != 2**-11).all())
    return _fuses[device.type]


def fma(a: Tensor, b: Tensor, c: Tensor, out: Tensor | None = None) -> Tensor:
    """``a * b + c`` rounded once, float32, broadcast; ``out`` may be one of the three.

    Where ``torch.addcmul`` rounds twice it is computed in float64: the product is exact there,
    and the second rounding of the sum decides one result in 2**29.
    """
    if _addcmul_fuses(a.device):
        return torch.addcmul(c, a, b, out=out)
    total = torch.addcmul(c.double(), a.double(), b.double()).float()
    return total if out is None else out.copy_(total)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """``coefficients[0] + x * (coefficients[1] + ...)`` by fused multiply-adds."""
    constants = x.new_tensor(coefficients).unbind()
    value = fma(constants[-1], x, constants[-2])
    for constant in reversed(constants[:-2]):
        fma(value, x, constant, out=value)
    return value


def _tree(sums: Tensor) -> Tensor:
    """``(..., 16 * 2**n)`` to ``(..., 1)``: halves are added, of 16 in the order 2, 1, 8, 4."""
    while sums.shape[-1] > SOFTMAX_SUMS:
        low, high = sums.chunk(2, -1)
        sums = low + high
    sums = sums.unflatten(-1, (4, 2, 2))
    sums = sums[..., 0, :] + sums[..., 1, :]
    sums = sums[..., 0] + sums[..., 1]
    sums = sums[..., :2] + sums[..., 2:]
    return sums[..., :1] + sums[..., 1:]


def _softmax_sum(x: Tensor) -> Tensor:
    """Sum over the last axis, in 16 columns; ``(..., N)`` to ``(..., 1)``."""
    sums = x.new_zeros((*x.shape[:-1], SOFTMAX_SUMS))
    for part in x.split(SOFTMAX_SUMS, -1):
        sums[..., : part.shape[-1]] += part
    return _tree(sums)


def _mean(x: Tensor, square: bool = False) -> Tensor:
    """Mean over the last axis of ``x`` or ``x**2``, in 64 columns; ``(..., C)`` to ``(..., 1)``."""
    sums = x.new_zeros((*x.shape[:-1], NORM_SUMS))
    for part in x.split(NORM_SUMS, -1):
        columns = sums[..., : part.shape[-1]]
        if square:
            fma(part, part, columns, out=columns)
        else:
            columns += part
    return _tree(sums).mul_(1 / x.shape[-1])


def exp2(x: Tensor) -> Tensor:
    """``2**x`` for ``x <= 0``, float32, any shape, relative error below 1.5e-7.

    What is below -126 becomes ``2**-126``; NaN stays.
    """
    x = x.clamp_min(SMALLEST_EXPONENT)
    whole = x.floor()
    fraction = x.sub_(whole)
    value = _polynomial(fraction, (1.0, *EXP2_COEFFICIENTS))
    # The bits of 2**whole; a NaN in `whole` has no integer but is in `value` too.
    power = whole.nan_to_num_(nan=0.0).to(torch.int32).add_(127).bitwise_left_shift_(23)
    return value.mul_(power.view(torch.float32))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis.

    Args:
        x: float32 ``(..., C)``.
        weight, bias: float32 ``(C,)``.
        eps: Added to the variance.

    Returns:
        float32, shape of ``x``.
    """
    centered = x - _mean(x)
    factor = _mean(centered, square=True).add_(eps).sqrt_().reciprocal_()
    return torch.addcmul(bias, centered.mul_(factor), weight)


def gelu(x: Tensor) -> Tensor:
    """``x * Phi(x)``, float32, any shape.

    The error is below ``1.5e-7 * max(1, abs(x))``; below -5.2 the value is that of -5.2, -5e-7.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    chunks = zip(x.reshape(-1).split(CHUNK), out.view(-1).split(CHUNK), strict=True)
    half, factor, minus_one = x.new_tensor((0.5, GELU_FACTOR, -1.0)).unbind()
    for source, target in chunks:
        from_end = source.clamp_min(-GELU_END)
        z = from_end.clamp_max(GELU_END)
        value = _polynomial(fma(z * z, factor, minus_one), GELU_COEFFICIENTS)
        torch.mul(from_end, fma(z, value, half, out=value), out=target)
    return out


def _base(low: int, high: int, is_signed: bool) -> int:
    """What is subtracted from codes so that 0 is the lowest, or in their middle."""
    return (low + high + 1) // 2 if is_signed else low


def _exact_product(a: Tensor, b: Tensor, largest: int) -> Tensor:
    """``a @ b`` of integers below ``largest`` in every sum; float32, rounded once."""
    if largest < EXACT_FLOAT32:
        return a @ b
    return (a.double() @ b.double()).float()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    grids: Tensor,
    limits: list[int],
    row_relative: bool,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    tables: list[Tensor | None] | None = None,
) -> Tensor:
    """Softmax attention on codes.

    Both products are those of integer codes; what the grids' offsets contribute are sums of
    codes along a row or a column, which are integers too. An operand with a table is quantized
    to a position 0..63, and its integer is what the table holds there. With ``row_relative`` what
    is quantized is the softmax's numerator
    (see :class:`gplq_mm.layers.attention.QuantAttention`).

    Args:
        query, key, value: float32 ``(B, heads, N, d)``.
        scale: Factor on ``query @ key.T``.
        grids: float32 ``(4, 2, heads)``: scale and offset of q, k, v and probabilities.
        limits: Smallest and largest code of q, k, v and probabilities.
        row_relative: Whether the numerators are quantized instead of the probabilities.
        bias: float32 ``(heads, N, N)`` added to the scores, or None.
        mask: float32 ``(M, N, N)`` added to the scores of item ``i % M`` of the batch, or None.
        tables: Of q, k, v and probabilities: uint8 ``(heads, 64)`` or ``(64,)``, whose operand
            has limits 0 and 63, or None where codes are the integers themselves.

    Returns:
        float32 ``(B, heads, N, d)``.
    """
    tables = tables or [None] * 4
    batch, heads, tokens, _ = query.shape
    windows = 1 if mask is None else len(mask)
    count = max(CHUNK // (heads * tokens * tokens * windows), 1) * windows
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    for i in range(0, batch, count):
        items = slice(i, i + count)
        operands = (query[items], key[items], value[items])
        out[items] = _attention(*operands, scale, grids, limits, row_relative, bias, mask, tables)
    return out


def _attention(query, key, value, scale, grids, limits, row_relative, bias, mask, tables) -> Tensor:
    """:func:`attention` of a few items, a multiple of the windows of ``mask``."""
    _, heads, tokens, channels = query.shape
    added = bias is not None or mask is not None
    low, high = limits[::2], limits[1::2]
    bases = [_base(low[i], high[i], i in (1, 2)) for i in range(4)]
    largest = [max(abs(low[i] - bases[i]), abs(high[i] - bases[i])) for i in range(4)]
    shape = (heads, 1, 1)
    steps, offsets = (part.reshape(4, *shape) for part in grids.unbind(1))

    def codes(i: int, x: Tensor) -> Tensor:
        integers = quantize(x, steps[i], offsets[i], low[i], high[i])
        if tables[i] is not None:
            integers = look_up(integers, tables[i])
        return integers.sub_(bases[i])

    q, k, v = (codes(i, x) for i, x in enumerate((query, key, value)))
    step = [part.double() for part in steps]
    offset = [offsets[i].double() + step[i] * bases[i] for i in range(4)]
    # exp(x) is 2**(x * log2 e); where nothing is added to the scores the factors take it over.
    unit = scale if added else scale * math.log2(math.e)
    scores = fma(
        _exact_product(q, k.mT, largest[0] * largest[1] * channels),
        (unit * step[0] * step[1]).float(),
        (k.sum(-1) * (unit * offset[0] * step[1]).float().squeeze(-1))[..., None, :],
    )
    if added:
        # The same along a row: softmax does not see them, but the rounding of the sums does.
        constant = (unit * channels * offset[0] * offset[1]).float()
        scores += q.sum(-1, keepdim=True) * (unit * step[0] * offset[1]).float() + constant
        if bias is not None:
            scores += bias
        if mask is not None:
            scores.view(-1, len(mask), heads, tokens, tokens).add_(mask[:, None])
    scores -= scores.amax(-1, keepdim=True)
    if added:
        scores *= math.log2(math.e)
    numerator = exp2(scores)
    factor = _softmax_sum(numerator).reciprocal_()
    p = codes(3, numerator if row_relative else numerator * factor)
    constant = (tokens * offset[3] * offset[2]).float()
    rest = fma(v.sum(-2, keepdim=True), (offset[3] * step[2]).float(), constant)
    rest = rest + p.sum(-1, keepdim=True) * (step[3] * offset[2]).float()
    product = _exact_product(p, v, largest[3] * largest[2] * tokens)
    out = fma(product, (step[3] * step[2]).float(), rest)
    return out.mul_(factor) if row_relative else out
