"""Random packed layers, their integers computed apart from the package, and hypothesis
strategies of them."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from gplq_mm.ops import native
from gplq_mm.quant.packing import pack_multiplier_panels, pack_panels

# Instruction sets of this machine, lowest first; none where no kernels are installed.
ISAS = native.available_isas()
# Examples are drawn afresh from a seed, so that shrinking changes shapes and not values.
SEEDS = st.integers(0, 2**16)
# Codes are the integers that are multiplied.
NO_TABLE = torch.empty(0, dtype=torch.uint8)


def every_isa(check: Callable[[], None]) -> None:
    """Calls ``check()`` with each instruction set; for tests that hypothesis drives."""
    if not ISAS:
        check()
    for name in ISAS:
        with native.use_isa(name):
            check()


def error_of(function: Callable, *args) -> str:
    """Message of the ValueError that a call raises."""
    with pytest.raises(ValueError, match=r'.') as error:
        function(*args)
    return str(error.value)


def level_table(count: int, generator: torch.Generator, extreme: bool = False) -> Tensor:
    """Table ``(64,)`` of ``count`` random levels, up to 63 if ``extreme``; uint8."""
    levels = torch.randperm(64, generator=generator)[:count].sort().values
    if extreme:
        levels[-1] = 63
    nearest = (torch.arange(64)[:, None] - levels).abs().argmin(1)
    return levels[nearest].to(torch.uint8)


@dataclass
class PackedCase:
    """A layer as the ops take it, and what its product is.

    Attributes:
        layer, grid: Operands of the ops, see :mod:`gplq_mm.ops.reference`.
        integers: int64 ``(N, K)``, multiplier * code in the order of the input columns.
    """

    layer: list[Tensor]
    grid: list[int]
    integers: Tensor

    @property
    def columns(self) -> int:
        return self.integers.shape[1]

    @property
    def rows(self) -> int:
        return self.integers.shape[0]

    def sums(self, codes: Tensor) -> Tensor:
        """Accumulators int32 ``(..., N)`` of codes ``(..., K)``."""
        return (codes.long() @ self.integers.T - self.layer[7].long()).int()


def random_layer(
    rows: int,
    columns: int,
    weight_bits: int = 4,
    act_bits: int = 4,
    group_size: int = 32,
    code_min: int = 0,
    seed: int = 0,
    extreme: bool = False,
    levels: int = 0,
) -> PackedCase:
    """A layer with random or, if ``extreme``, largest possible integers; its activations have a
    table of ``levels``, if any."""
    if levels:
        act_bits, code_min = 6, 0
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=generator)

    groups = -(-columns // group_size)
    low, high = -(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1) - 1
    most = 15 if weight_bits <= 4 else max(127 // -low, 1)
    codes = integers(low, high, rows, columns)
    multiplier = integers(1, most, rows, groups)
    if extreme:
        codes = torch.where(integers(0, 1, rows, 1) == 1, low, high).expand(rows, columns)
        multiplier = torch.full_like(multiplier, most)
    permutation = torch.randperm(columns, generator=generator)
    stored = codes * multiplier.repeat_interleave(group_size, 1)[:, :columns]
    natural = torch.empty_like(stored)
    natural[:, permutation] = stored
    position = torch.empty_like(permutation)
    position[permutation] = torch.arange(columns)

    def reals(low, high, *shape):
        return torch.rand(shape, generator=generator) * (high - low) + low

    layer = [
        reals(0.5, 4, columns),
        reals(code_min, code_min + 2**act_bits, columns),
        pack_panels(codes.to(torch.int8), weight_bits),
        pack_multiplier_panels(multiplier.to(torch.uint8)),
        position.int(),
        reals(0.001, 0.01, rows),
        reals(-2, 2, rows),
        integers(-9000, 9000, rows).int(),
        level_table(levels, generator, extreme) if levels else NO_TABLE,
    ]
    return PackedCase(layer, [code_min, code_min + 2**act_bits - 1, group_size], natural)


@st.composite
def layers(draw, max_rows: int = 150, max_columns: int = 140) -> PackedCase:
    """Layers of odd shapes, of every width of weights and activations."""
    act_bits = draw(st.integers(2, 8))
    return random_layer(
        rows=draw(st.integers(1, max_rows)),
        columns=draw(st.integers(1, max_columns)),
        weight_bits=draw(st.integers(2, 8)),
        act_bits=act_bits,
        group_size=draw(st.sampled_from([1, 3, 16, 32, 64, 1000])),
        code_min=draw(st.sampled_from([0, -(2 ** (act_bits - 1))])),
        seed=draw(SEEDS),
        extreme=draw(st.booleans()),
        levels=draw(st.sampled_from([0, 0, 1, 2, 8, 16, 64])),
    )


def identity_layer(columns: int, row_scale: Tensor, bias: Tensor, grid: list[int]) -> PackedCase:
    """A layer ``code * row_scale + bias`` of its own column's code; group size 32."""
    case = random_layer(columns, columns, group_size=32)
    eye = torch.eye(columns, dtype=torch.int8)
    layer = list(case.layer)
    layer[2] = pack_panels(eye, 4)
    layer[3] = torch.ones_like(layer[3])
    layer[4] = torch.arange(columns, dtype=torch.int32)
    layer[5], layer[6] = row_scale, bias
    layer[7] = torch.zeros(columns, dtype=torch.int32)
    return PackedCase(layer, [*grid, 32], eye.long())


def random_input(case: PackedCase, *shape: int, seed: int = 0) -> Tensor:
    """float32 ``(*shape, K)``, some of it beyond the grid on either side."""
    generator = torch.Generator().manual_seed(seed)
    inverse, shift = case.layer[:2]
    middle, span = sum(case.grid[:2]) / 2, case.grid[1] - case.grid[0] + 1
    steps = middle + (torch.rand((*shape, case.columns), generator=generator) - 0.5) * 1.5 * span
    return (steps - shift) / inverse
