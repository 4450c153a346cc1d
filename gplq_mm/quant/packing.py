"""The int4 layout: the only Python that knows it (its C++ twin is ``ops/csrc/int4_layout.h``).

There are two forms. A file holds *rows*: two codes a byte along a row, simple for any reader.
CPU kernels read *panels*: 64 output rows side by side, so that one stored column of a panel is
one vector. Within a panel the rows stand in the order that an interleave of four columns brings
back to ascending order; see :func:`panel_order`.

GPU kernels read *halves*: a byte of a row holds a column of the row's first half and one of its
second. Panels do not serve there: tensor cores want an int8 operand with its reduction axis side
by side, which a panel has across, and unpacking a panel's bytes makes neighbours of rows that are
not. The halves are made from the panels once a layer.
"""

import torch
from torch import Tensor

# Output rows of a panel: four 512-bit vectors of int32 accumulators.
PANEL = 64
# Packed bytes of a row in halves are a multiple of this: the longest step of a GPU kernel that
# needs no mask.
HALF_STEP = 64
# Codes -8..7 are stored as 0..15.
BIAS = 8


def pack_nibbles(codes: Tensor) -> Tensor:
    """Packs 4-bit codes two to a byte along the last axis, the first in the low nibble.

    Args:
        codes: int8 ``(..., K)``, -8..7.

    Returns:
        uint8 ``(..., ceil(K / 2))``; an odd last nibble holds code 0.

    Raises:
        ValueError: If a code does not fit four bits.
    """
    if codes.numel() and not (int(codes.min()) >= -BIAS and int(codes.max()) < BIAS):
        raise ValueError('pack_nibbles takes codes from -8 to 7.')
    stored = (codes.to(torch.int16) + BIAS).to(torch.uint8)
    if stored.shape[-1] % 2:
        stored = torch.nn.functional.pad(stored, (0, 1), value=BIAS)
    return stored[..., ::2] | (stored[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """Inverse of :func:`pack_nibbles`.

    Args:
        packed: uint8 ``(..., ceil(columns / 2))``.
        columns: Number of codes in a row.

    Returns:
        int8 ``(..., columns)``.

    Raises:
        ValueError: If the bytes are not those of ``columns`` codes.
    """
    if packed.dtype != torch.uint8 or packed.shape[-1] != (columns + 1) // 2:
        raise ValueError(
            f'{columns} codes of 4 bits take {(columns + 1) // 2} uint8, got '
            f'{packed.shape[-1]} {packed.dtype}.'
        )
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :columns]
    return codes.to(torch.int8) - BIAS


def panel_order() -> Tensor:
    """Row within a panel that each of its 64 positions holds, int64 ``(64,)``.

    Position ``16 L + 4 t + i`` holds row ``16 t + 4 L + i`` (L, t, i in 0..3): interleaving the
    bytes of four columns within 128-bit lanes then leaves rows in ascending order. The map is its
    own inverse.
    """
    return torch.arange(PANEL).reshape(4, 4, 4).transpose(0, 1).flatten()


def _to_panels(rows: Tensor, fill: int) -> Tensor:
    """``(N, C)`` to ``(P, C, 64)`` in panel order; missing rows hold ``fill``."""
    missing = -rows.shape[0] % PANEL
    if missing:
        rows = torch.cat((rows, rows.new_full((missing, rows.shape[1]), fill)))
    panels = rows.reshape(len(rows) // PANEL, PANEL, rows.shape[1]).transpose(1, 2)
    return panels[..., panel_order().to(rows.device)].contiguous()


def _from_panels(panels: Tensor, rows: int) -> Tensor:
    order = panel_order().to(panels.device)
    ordered = panels[..., order].transpose(1, 2)
    return ordered.reshape(len(panels) * PANEL, panels.shape[1])[:rows].contiguous()


def pack_panels(codes: Tensor, bits: int) -> Tensor:
    """Codes as the kernels read them.

    Args:
        codes: int8 ``(N, K)``, columns in stored order.
        bits: Width of a code. Up to 4 bits are packed, more are kept as bytes.

    Returns:
        uint8 ``(P, K, 32)`` with P = ceil(N / 64): byte b holds position b in its low nibble and
        position b + 32 in its high one, both plus 8; or int8 ``(P, K, 64)``.
    """
    panels = _to_panels(codes, 0)
    if bits > 4:
        return panels
    stored = (panels.to(torch.int16) + BIAS).to(torch.uint8)
    return stored[..., : PANEL // 2] | (stored[..., PANEL // 2 :] << 4)


def unpack_panels(weight: Tensor, rows: int) -> Tensor:
    """Inverse of :func:`pack_panels`: int8 ``(rows, K)``."""
    if weight.dtype == torch.uint8:
        codes = torch.cat((weight & 15, weight >> 4), -1).to(torch.int8) - BIAS
    else:
        codes = weight
    return _from_panels(codes, rows)


def pack_multiplier_panels(multiplier: Tensor) -> Tensor:
    """Group multipliers uint8 ``(N, G)`` to ``(P, G, 64)`` in panel order."""
    return _to_panels(multiplier, 1)


def unpack_multiplier_panels(multiplier: Tensor, rows: int) -> Tensor:
    """Inverse of :func:`pack_multiplier_panels`."""
    return _from_panels(multiplier, rows)


def half_width(columns: int) -> int:
    """Bytes H of a row of ``columns`` codes packed by halves, a multiple of 64."""
    return max(-(-columns // (2 * HALF_STEP)), 1) * HALF_STEP


def pack_halves(codes: Tensor) -> Tensor:
    """Packs 4-bit codes so that byte j of a row holds columns j (low nibble) and H + j (high).

    Args:
        codes: int8 ``(N, K)``, -8..7 (weights) or 0..15 (activations); only four bits are kept,
            of negative codes in two's complement.

    Returns:
        uint8 ``(N, H)`` with H = :func:`half_width` of K; codes past K are 0.
    """
    half = half_width(codes.shape[1])
    padded = torch.nn.functional.pad(codes, (0, 2 * half - codes.shape[1]))
    nibbles = padded.view(torch.uint8) & 15
    return (nibbles[:, :half] | (nibbles[:, half:] << 4)).contiguous()


def unpack_halves(packed: Tensor, columns: int, signed: bool) -> Tensor:
    """Inverse of :func:`pack_halves`: int8 ``(N, columns)``."""
    codes = torch.cat((packed & 15, packed >> 4), 1)[:, :columns].to(torch.int8)
    return (codes ^ 8) - 8 if signed else codes


def interleave_halves(columns: Tensor) -> Tensor:
    """``(2H,)`` stored columns in the order in which a packed row names them, byte by byte."""
    return columns.reshape(2, -1).T.flatten()
