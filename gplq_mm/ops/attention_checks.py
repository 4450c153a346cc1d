"""Checks of what the attention op is given; they raise ValueError.

``csrc/cpu/attention.cpp`` makes the same checks with the same words; a test compares them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..quant.functional import POSITIONS
from .checks import check_codes, check_float, check_table, check_tensor, require, table_shape

OPERANDS = 4
# 255 * 128 * 2**16 < 2**31: sums of so many products of codes are exact in int32.
LONGEST_SUM = 2**16


def check_attention(
    qkv: Tensor,
    heads: int,
    grids: Tensor,
    limits: Sequence[int],
    tables: Sequence[Tensor],
    bias: Tensor | None,
    mask: Tensor | None,
    rows: Tensor | None,
    out_rows: int,
) -> None:
    """Checks the arguments of ``int4_attention``.

    Values of tensors are only looked at on the CPU: elsewhere that would wait for the device.
    """
    check_float(qkv)
    require(heads >= 1, f'heads must be at least 1, got {heads}.')
    if rows is not None:
        require(
            qkv.dim() == 2,
            f'with rows, qkv must be (R, 3 * channels), got shape {list(qkv.shape)}.',
        )
        require(rows.dim() == 2, f'rows must be (windows, tokens), got shape {list(rows.shape)}.')
        check_tensor('rows', rows, (torch.int32,), rows.shape, qkv.device)
        require(
            0 <= out_rows <= qkv.shape[0],
            f'out_rows must lie in 0..{qkv.shape[0]}, got {out_rows}.',
        )
        windows, tokens = rows.shape
    else:
        require(
            qkv.dim() == 3,
            f'qkv must be (batch, tokens, 3 * channels), got shape {list(qkv.shape)}.',
        )
        windows, tokens = qkv.shape[:2]
    columns = qkv.shape[-1]
    require(
        columns > 0 and columns % 3 == 0 and columns // 3 % heads == 0,
        f'qkv has {columns} columns, they cannot be q, k and v of {heads} heads.',
    )
    check_tensor('grids', grids, (torch.float32,), (OPERANDS, 2, heads), qkv.device)
    require(
        len(limits) == 2 * OPERANDS,
        'limits must be the smallest and largest code of q, k, v and probabilities, '
        f'got {len(limits)} integers.',
    )
    for i in range(OPERANDS):
        check_codes(limits[2 * i : 2 * i + 2])
    require(
        len(tables) == OPERANDS,
        f'tables must be those of q, k, v and probabilities, got {len(tables)} tensors.',
    )
    for i, table in enumerate(tables):
        name = f'tables[{i}]'
        shape = table_shape(table, (heads, POSITIONS))
        check_tensor(name, table, (torch.uint8,), shape, qkv.device)
        check_table(name, table, limits[2 * i : 2 * i + 2])
    if bias is not None:
        check_tensor('bias', bias, (torch.float32,), (heads, tokens, tokens), qkv.device)
    if mask is not None:
        require(
            mask.dim() == 3 and mask.shape[0] > 0 and windows % mask.shape[0] == 0,
            f'mask must be (M, tokens, tokens) with M a divisor of the {windows} windows, '
            f'got shape {list(mask.shape)}.',
        )
        shape = (mask.shape[0], tokens, tokens)
        check_tensor('mask', mask, (torch.float32,), shape, qkv.device)
    longest = max(tokens, columns // 3 // heads)
    require(
        longest <= LONGEST_SUM,
        f'sums over {longest} codes can exceed int32; at most {LONGEST_SUM} tokens or channels '
        'of a head are supported.',
    )
    if qkv.device.type == 'cpu':
        _check_scales(grids)
        if rows is not None:
            _check_rows(rows, qkv.shape[0], out_rows)


def _check_scales(grids: Tensor) -> None:
    for scale in grids[:, 0].flatten().tolist():
        require(0 < scale < math.inf, f'grids must hold positive finite scales, got {scale:g}.')


def _check_rows(rows: Tensor, count: int, out_rows: int) -> None:
    flat = rows.flatten()
    wrong = flat[(flat < 0) | (flat >= count)]
    if len(wrong):
        raise ValueError(f'rows must lie in 0..{count - 1}, got {int(wrong[0])}.')
    times = flat[flat < out_rows].bincount()
    if len(times) and times.max() > 1:
        raise ValueError(f'rows must name an output row once, {int(times.argmax())} occurs again.')
