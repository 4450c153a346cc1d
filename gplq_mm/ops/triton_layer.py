"""A packed layer as the Triton kernels read it; made from the ops' operands once, then kept."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant.packing import (
    half_width,
    interleave_halves,
    pack_halves,
    unpack_multiplier_panels,
    unpack_panels,
)
from .checks import check_layer, check_mlp
from .triton_common import table_or_none

# Codes up to here take half a byte, up to the next an int8 as they are; more are shifted.
NIBBLE, BYTE = 15, 127
SHIFT = 128
# Smallest step of gemm_kernel, which must lie within one group to unpack weights on the way.
LOOP_STEP = 32


@dataclass(frozen=True)
class TritonLayer:
    """One layer; N rows, K columns, H = :func:`gplq_mm.quant.packing.half_width` of K.

    Attributes:
        columns: K.
        half: H.
        code_min, code_max: Limits of an activation code.
        packed: Whether activations are packed two codes a byte (at most 16 codes).
        offset: Taken off a code that is stored as int8, so that it fits.
        weight: int8 ``(N, H)``, 4-bit codes packed by halves, or ``(N, 2H)``, multiplier * code.
        multiplier: uint8 ``(G, N)``, or None with the second form of ``weight``.
        group_size: Stored columns that share a multiplier.
        source: int32 ``(2H,)``, input column of each stored column, or None where they are the
            same.
        inverse, shift: float32 ``(K,)``, stored order.
        table: uint8 ``(64,)``, the levels of the codes, or None.
        row_scale, bias: float32 ``(N,)``.
        correction: int32 ``(N,)``, the effect of ``offset`` included.
    """

    columns: int
    half: int
    code_min: int
    code_max: int
    packed: bool
    offset: int
    weight: Tensor
    multiplier: Tensor | None
    group_size: int
    source: Tensor | None
    inverse: Tensor
    shift: Tensor
    table: Tensor | None
    row_scale: Tensor
    bias: Tensor
    correction: Tensor

    @property
    def rows(self) -> int:
        """N."""
        return self.weight.shape[0]

    @property
    def unpacks_in_loop(self) -> bool:
        """Whether gemm_kernel can take the 4-bit weight as it is."""
        if self.multiplier is None or self.group_size % LOOP_STEP:
            return False
        # There the accumulator holds 16 times the sum.
        return 2 * self.half * max(self.code_max - self.code_min, SHIFT) * 127 * 16 < 2**31

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of activation codes."""
        return self.half if self.packed else 2 * self.half


def _build(
    layer: list[Tensor],
    grid: list[int],
    device: torch.device,
    follow: TritonLayer | None = None,
) -> TritonLayer:
    """Makes the kernel's form.

    Args:
        layer, grid: Operands of the ops.
        device: Where the input is, and the layer must be.
        follow: The layer that reads this one's output as codes, if one does. The rows then
            stand in the order of its stored columns, so that codes are written where it reads
            them; rows of its padding are zero.

    Raises:
        ValueError: If the operands are not those of one layer. Values are looked at, too: this
            waits for the device, once a layer.
    """
    check_layer(layer, grid, device)
    inverse, shift, weight, multiplier, position, row_scale, bias, correction, table = layer
    code_min, code_max, group_size = grid
    columns, rows = inverse.shape[0], row_scale.shape[0]
    half = half_width(columns)
    padding = 2 * half - columns
    source = torch.argsort(position)
    codes = unpack_panels(weight, rows)
    factors = unpack_multiplier_panels(multiplier, rows)
    integers = codes.to(torch.int16) * factors.repeat_interleave(group_size, 1)[:, :columns]
    is_packed = weight.dtype == torch.uint8
    natural = torch.arange(columns, device=weight.device)
    if not torch.equal(position[source].long(), natural):
        raise ValueError(f'position must hold each of 0..{columns - 1} once.')
    if int(integers.abs().max()) > BYTE:
        raise ValueError('multiplier * code must lie in -127..127; the weight is damaged.')

    offset = SHIFT if code_max - code_min > BYTE else 0
    correction = correction - offset * integers.sum(1, dtype=torch.int32)
    if follow is not None:
        order = follow.source
        if order is None:
            order = torch.arange(2 * follow.half, device=weight.device)
        # Padding names one zero row more than there are.
        order = order.long().clone()
        order[follow.columns :] = rows
        if follow.packed:
            order = interleave_halves(order)
        codes, integers, factors, row_scale, bias, correction = (
            torch.cat((part, part.new_zeros(1, *part.shape[1:])))[order]
            for part in (codes, integers, factors, row_scale, bias, correction)
        )
    if is_packed:
        packed = pack_halves(codes).view(torch.int8)
    else:
        packed = F.pad(integers, (0, padding)).to(torch.int8)
    return TritonLayer(
        columns=columns,
        half=half,
        code_min=code_min,
        code_max=code_max,
        packed=code_max - code_min <= NIBBLE,
        offset=offset,
        weight=packed.contiguous(),
        multiplier=factors.T.contiguous() if is_packed else None,
        group_size=group_size if factors.shape[1] > 1 else 2 * half,
        source=None if torch.equal(source, natural) else F.pad(source, (0, padding)).int(),
        inverse=inverse[source].contiguous(),
        shift=shift[source].contiguous(),
        table=table_or_none(table),
        row_scale=row_scale.contiguous(),
        bias=bias.contiguous(),
        correction=correction.contiguous(),
    )


# Ids of weights -> (references to all operands, their versions, limits, result). An entry goes
# with the first operand that does.
_prepared: dict[tuple[int, ...], tuple] = {}


def _version(tensor: Tensor) -> tuple[int, int]:
    # Tensors made in inference mode cannot be written outside it and count no versions.
    return (0 if tensor.is_inference() else tensor._version, tensor.data_ptr())


def _cached(tensors: list[Tensor], grids: tuple, key: tuple[int, ...], build: Callable) -> Any:
    """``build()``, or what it gave for the same unchanged tensors before."""
    versions = [_version(tensor) for tensor in tensors]
    entry = _prepared.get(key)
    if entry is not None:
        references, seen, limits, result = entry
        if (
            limits == grids
            and seen == versions
            and all(ref() is tensor for ref, tensor in zip(references, tensors, strict=True))
        ):
            return result
    result = build()
    references = [weakref.ref(tensor, lambda _: _prepared.pop(key, None)) for tensor in tensors]
    _prepared[key] = (references, versions, grids, result)
    return result


def prepared_layer(layer: list[Tensor], grid: list[int], device: torch.device) -> TritonLayer:
    """Kernel form of one layer for an input on ``device``, made at its first use.

    Raises:
        ValueError: If the operands are not those of one layer.
    """
    limits = (tuple(grid), device)
    return _cached(layer, limits, (id(layer[2]),), lambda: _build(layer, grid, device))


def prepared_mlp(
    layer1: list[Tensor],
    grid1: list[int],
    layer2: list[Tensor],
    grid2: list[int],
    device: torch.device,
) -> tuple[TritonLayer, Tensor, Tensor, TritonLayer]:
    """Kernel form of two layers of which the second quantizes the first's output.

    Returns:
        First layer with its rows in the second's stored order, inverse and shift of those rows'
        codes (float32, one a row), second layer.

    Raises:
        ValueError: If the operands are not those of two layers that fit.
    """

    def build():
        second = prepared_layer(layer2, grid2, device)
        check_mlp(layer1[5].numel(), second.columns, layer1[0].numel(), second.rows)
        inverse = F.pad(second.inverse, (0, 2 * second.half - second.columns))
        shift = F.pad(second.shift, (0, 2 * second.half - second.columns), value=second.code_min)
        if second.packed:
            inverse, shift = interleave_halves(inverse), interleave_halves(shift)
        first = _build(layer1, grid1, device, second)
        return first, inverse.contiguous(), shift.contiguous(), second

    key = (id(layer1[2]), id(layer2[2]))
    limits = (tuple(grid1), tuple(grid2), device)
    return _cached([*layer1, *layer2], limits, key, build)
