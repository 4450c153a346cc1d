"""Arguments of the attention op, and what its output may be, computed in float64.

A probability within float32's error of a rounding boundary may get either code. ``Bounds`` finds
those codes and gives the interval that the output then lies in; everything else is exact.
"""

from dataclasses import dataclass, field, replace

import torch
from hypothesis import strategies as st
from packed_layers import NO_TABLE, SEEDS, level_table
from torch import Tensor

from gplq_mm.quant.functional import look_up, quantize

EPSILON = 2.0**-24
# Rounded operations that a score goes through, with some to spare.
OPERATIONS = 4
NAMES = ('q', 'k', 'v', 'probs')


@dataclass
class AttentionCase:
    """Arguments of ``int4_attention``, in their order."""

    qkv: Tensor
    heads: int
    scale: float
    grids: Tensor
    limits: list[int]
    tables: list[Tensor] = field(default_factory=lambda: [NO_TABLE] * 4)
    row_relative: bool = True
    bias: Tensor | None = None
    mask: Tensor | None = None
    rows: Tensor | None = None
    out_rows: int = 0

    @property
    def args(self) -> tuple:
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def but(self, **changes) -> 'AttentionCase':
        return replace(self, **changes)


def random_case(
    windows: int,
    tokens: int,
    heads: int,
    channels: int,
    bits: tuple[int, int, int, int] = (4, 4, 4, 4),
    row_relative: bool = True,
    symmetric: bool = False,
    probs_offset: bool = False,
    seed: int = 0,
    levels: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> AttentionCase:
    """Normal q, k, v of ``channels`` a head, on grids that clip little; operands with ``levels``
    have a table of so many for each head."""
    generator = torch.Generator().manual_seed(seed)

    def near_one(*shape):
        return 0.8 + 0.4 * torch.rand(*shape, generator=generator)

    grids, limits, tables = torch.zeros(4, 2, heads), [], [NO_TABLE] * 4
    for i, width in enumerate(bits):
        codes = 64 if levels[i] else 2**width
        if levels[i]:
            tables[i] = torch.stack([level_table(levels[i], generator) for _ in range(heads)])
        if i == 3:
            grids[i, 0] = near_one(heads) * (1.0 if row_relative else 0.3) / (codes - 1)
            if probs_offset:
                grids[i, 1] = grids[i, 0] * (near_one(heads) - 0.7)
            limits += [0, codes - 1]
        elif symmetric and not levels[i]:
            grids[i, 0] = near_one(heads) * 5 / codes
            limits += [-(codes // 2), codes // 2 - 1]
        else:
            grids[i, 0] = near_one(heads) * 5 / (codes - 1)
            grids[i, 1] = -2.5 * near_one(heads)
            limits += [0, codes - 1]
    qkv = torch.randn(windows, tokens, 3 * heads * channels, generator=generator)
    return AttentionCase(qkv, heads, channels**-0.5, grids, limits, tables, row_relative)


def with_rows(case: AttentionCase, padding: int, missing: int, seed: int = 0) -> AttentionCase:
    """The case with its tokens in another order, ``padding`` of them rows beyond the output.

    ``missing`` output rows belong to no token.
    """
    generator = torch.Generator().manual_seed(seed)
    windows, tokens, columns = case.qkv.shape
    real = windows * tokens - padding
    out_rows = real + missing
    order = torch.randperm(out_rows, generator=generator)[:real]
    rows = torch.cat((order, torch.full((padding,), out_rows)))
    rows = rows[torch.randperm(len(rows), generator=generator)]
    qkv = torch.randn(out_rows + 1, columns, generator=generator)
    return case.but(
        qkv=qkv, rows=rows.int().reshape(windows, tokens).contiguous(), out_rows=out_rows
    )


TOKENS = st.integers(1, 70)


@st.composite
def attention_cases(draw, tokens: st.SearchStrategy[int] = TOKENS) -> AttentionCase:
    """Cases of every kind that the op takes."""
    seed = draw(SEEDS)
    windows, heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    case = random_case(
        windows,
        draw(tokens),
        heads,
        draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 96, 100]))),
        draw(st.tuples(*[st.integers(2, 8)] * 4)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        seed,
        draw(st.one_of(st.just((0,) * 4), st.tuples(*[st.sampled_from([0, 1, 8, 16, 64])] * 4))),
    )
    generator = torch.Generator().manual_seed(seed + 1)
    count = case.qkv.shape[1]
    if draw(st.booleans()):
        case.bias = torch.randn(heads, count, count, generator=generator)
    if draw(st.booleans()):
        groups = draw(st.sampled_from([n for n in range(1, 5) if windows % n == 0]))
        hidden = torch.rand(groups, count, count, generator=generator) < 0.3
        case.mask = torch.zeros(groups, count, count).masked_fill_(
            hidden, draw(st.sampled_from([-100.0, -1e9]))
        )
        # Rows that are hidden altogether have tests of their own.
        case.mask.diagonal(dim1=1, dim2=2).zero_()
    if draw(st.booleans()):
        padding = draw(st.integers(0, windows * count - 1))
        case = with_rows(case, padding, draw(st.integers(0, 3)), seed)
    return case


class Bounds:
    """The interval of the output, float64, shape of the output.

    Attributes:
        low, high: Ends of the interval, with float32's error of the sums.
        uncertain: Probability codes that may be either of two.
        codes: Probability codes altogether.
    """

    def __init__(self, case: AttentionCase):
        self.case = case
        qkv = case.qkv.float()
        windows = qkv if case.rows is None else qkv[case.rows.long()]
        self.batch, self.tokens, _ = windows.shape
        parts = windows.reshape(self.batch, self.tokens, 3, case.heads, -1)
        query, key, value = (
            self._codes(part, i) for i, part in enumerate(parts.permute(2, 0, 3, 1, 4))
        )
        size = self._score_size(query, key)
        query, key, value = (self._real(codes, i) for i, codes in enumerate((query, key, value)))
        scores = query @ key.transpose(-2, -1) * case.scale
        size = size + query.abs() @ key.abs().transpose(-2, -1) * abs(case.scale)
        if case.bias is not None:
            scores, size = scores + case.bias.double(), size + case.bias.double().abs()
        if case.mask is not None:
            mask = case.mask.double().repeat(self.batch // len(case.mask), 1, 1)[:, None]
            scores, size = scores + mask, size + mask.abs()
        top = scores.argmax(-1, keepdim=True)
        numerator = (scores - scores.gather(-1, top)).exp()
        error = OPERATIONS * EPSILON * (size + size.gather(-1, top) + 1)
        total = numerator.sum(-1, keepdim=True)
        probs = numerator if case.row_relative else numerator / total
        low, high = self._code_range(probs, error)
        self.uncertain, self.codes = int((low != high).sum()), low.numel()
        divisor = total if case.row_relative else torch.ones_like(total)
        self._mix(low, high, value, divisor)

    def _grid(self, i: int) -> tuple[Tensor, Tensor]:
        return self.case.grids[i, 0][:, None, None], self.case.grids[i, 1][:, None, None]

    def _codes(self, x: Tensor, i: int) -> Tensor:
        positions = quantize(x, *self._grid(i), *self.case.limits[2 * i : 2 * i + 2])
        return self._integers(positions.double(), i)

    def _integers(self, positions: Tensor, i: int) -> Tensor:
        table = self.case.tables[i]
        return look_up(positions, table) if table.numel() else positions

    def _real(self, codes: Tensor, i: int) -> Tensor:
        scale, offset = (part.double() for part in self._grid(i))
        return offset + codes * scale

    def _score_size(self, query: Tensor, key: Tensor) -> Tensor:
        """Sizes of the parts that an integer product makes a score of: codes of q from 0, those
        of k around 0, and what their offsets contribute."""
        parts = []
        for i, codes in enumerate((query, key)):
            low, high = self.case.limits[2 * i : 2 * i + 2]
            base = (low + high + 1) // 2 if i else low
            scale, _ = (part.double() for part in self._grid(i))
            offset = self._real(torch.tensor(float(base), dtype=torch.float64), i)
            parts.append(((codes - base) * scale, offset.expand_as(codes)))
        (left, left_offset), (right, right_offset) = parts
        size = 0
        for a in (left, left_offset):
            for b in (right, right_offset):
                size = size + (a @ b.transpose(-2, -1)).abs()
        return size * abs(self.case.scale)

    def _code_range(self, probs: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        scale, offset = self._grid(3)
        inverse = scale.reciprocal()
        shift = (offset * -inverse).double()
        steps = probs * inverse.double() + shift
        # Where p itself is rounded: a handful of operations, and those of the steps.
        slack = probs * inverse.double() * (error.expm1() + 16 * EPSILON)
        slack = slack + 4 * EPSILON * (shift.abs() + 1e-30)
        limits = self.case.limits[6:8]
        ends = ((steps + off).round().clamp(*limits) for off in (-slack, slack))
        # Levels ascend.
        return tuple(self._integers(end, 3) for end in ends)

    def _mix(self, low: Tensor, high: Tensor, value: Tensor, divisor: Tensor) -> None:
        scale, offset = (part.double() for part in self._grid(3))
        limits = self.case.limits[4:6]
        spread = (high - low) * scale
        product = (offset + low * scale) @ value
        largest = (self._real(torch.tensor(float(c), dtype=torch.float64), 2) for c in limits)
        size = (offset.abs() + high.abs() * scale).sum(-1, keepdim=True)
        size = size * torch.maximum(*(end.abs() for end in largest))
        slack = 16 * EPSILON * size
        down = (product + spread @ value.clamp(max=0) - slack) / divisor
        up = (product + spread @ value.clamp(min=0) + slack) / divisor
        # The sum of the numerators is rounded too.
        rounded = 1 + (4 + self.tokens) * EPSILON
        self.low = self._merge(torch.where(down > 0, down / rounded, down * rounded))
        self.high = self._merge(torch.where(up > 0, up * rounded, up / rounded))

    def _merge(self, heads: Tensor) -> Tensor:
        """``(B, heads, N, d)`` to the shape of the output."""
        rows = heads.transpose(1, 2).reshape(self.batch, self.tokens, -1)
        case = self.case
        if case.rows is None:
            return rows
        result = rows.new_zeros(case.out_rows, rows.shape[-1])
        keep = case.rows.flatten() < case.out_rows
        return result.index_copy_(0, case.rows.flatten()[keep].long(), rows.flatten(0, 1)[keep])

    def check(self, out: Tensor) -> None:
        """Asserts that ``out`` lies within the bounds."""
        assert out.shape == self.low.shape
        wrong = ~((self.low <= out) & (out <= self.high))
        beyond = torch.maximum(self.low - out, out - self.high)
        assert not wrong.any(), (
            f'{int(wrong.sum())} of {wrong.numel()} values out of bounds, at most by '
            f'{float(beyond.max()):g} (bounds {float((self.high - self.low).median()):g} apart)'
        )
