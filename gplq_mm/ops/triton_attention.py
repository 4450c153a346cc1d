"""Attention on codes on CUDA: one program holds all keys and values of a head."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import native, reference
from .attention_checks import check_attention
from .triton_common import LAUNCH, MANY_PROGRAMS, levels_of, table_or_none

# Keys times head size that fit the shared memory of every device; above it the plain-torch form
# runs.
MAX_KEY_VALUES = 256 * 64


@triton.jit
def _on_grid(x, grid, table, operand, head, heads, ok, MIN: tl.constexpr, MAX: tl.constexpr):
    """Codes or levels in the range of int8 (0 where not ok), and their scale and offset."""
    base: tl.constexpr = 128 if MAX - MIN > 127 else 0
    scale = tl.load(grid + operand * 2 * heads + head)
    offset = tl.load(grid + (operand * 2 + 1) * heads + head)
    inverse = tl.div_rn(1.0, scale)
    if table is not None:
        table += head * (MAX - MIN + 1)
    code = levels_of(x, inverse, offset * -inverse, MIN, MAX, table) - base
    return tl.where(ok, code, 0), scale, scale * (MIN + base) + offset


@triton.jit(do_not_specialize=['steps', 'in_rows', 'out_rows'])
def attention_kernel(
    qkv,  # (in_rows, 3 * heads * D)
    out,  # (rows of the result, heads * D)
    grids,  # float32 (4, 2, heads): scale and offset of q, k, v, probabilities
    q_table, k_table, v_table, p_table,  # uint8 (heads, 64): levels of their codes, or None
    bias,  # float32 (heads, N, N)
    mask,  # float32 (mask_count, N, N)
    index,  # int32 (windows, N): row of qkv and out of each token
    tokens, heads, mask_count, in_rows, out_rows, scale,
    steps,  # blocks of BLOCK_Q queries that a program works through
    LIMITS: tl.constexpr,  # smallest and largest code of q, k, v, probabilities
    ROW_RELATIVE: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, INDEXED: tl.constexpr,
    WIDE: tl.constexpr,  # whether an offset into qkv needs 64 bits, which take registers
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Softmax attention on codes; a program holds all keys and values of a head.

    All keys at once, since a code of a probability depends on the maximum (or the sum) of its
    whole row. With x_hat = s * c + o a product of two operands is ``s s' cc' + s o' sum c +
    s' o sum c' + n o o'``, and the sums of codes are exact.
    """
    parts = tl.cdiv(tokens, BLOCK_Q * steps)
    program = tl.program_id(0)
    window = program // (parts * heads)
    head = program // parts % heads
    key = tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_D)
    ok_k = key < tokens
    ok_d = (depth < D)[None, :]
    if WIDE:
        window = window.to(tl.int64)
    first = window * tokens
    channels = heads * D
    read = qkv + head * D + depth[None, :]

    k_row = first + key
    ok_kv = ok_k
    if INDEXED:
        k_row = tl.load(index + k_row, mask=ok_k, other=0).to(first.dtype)
        # A wrong index must not reach foreign memory.
        ok_kv = ok_k & (k_row >= 0) & (k_row < in_rows)
    ok_kv = ok_kv[:, None] & ok_d
    kv = read + k_row[:, None] * (3 * channels)
    k = tl.load(kv + channels, mask=ok_kv, other=0.0).to(tl.float32)
    k, k_scale, k_offset = _on_grid(k, grids, k_table, 1, head, heads, ok_kv, LIMITS[2], LIMITS[3])
    v = tl.load(kv + 2 * channels, mask=ok_kv, other=0.0).to(tl.float32)
    v, v_scale, v_offset = _on_grid(v, grids, v_table, 2, head, heads, ok_kv, LIMITS[4], LIMITS[5])
    k_sum = tl.sum(k, 1).to(tl.float32)[None, :]
    v_sum = tl.sum(v, 0).to(tl.float32)[None, :]
    k_codes = tl.trans(k.to(tl.int8))
    # float16 holds these codes and float32 their sums over 1024 keys exactly; an int8 product
    # would want v with its keys side by side.
    v_codes = v.to(tl.float16)

    for step in range(steps):
        query = (program % parts * steps + step) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        row = first + query
        ok_q = query < tokens
        if INDEXED:
            row = tl.load(index + row, mask=ok_q, other=0).to(first.dtype)
            ok_q = ok_q & (row >= 0) & (row < in_rows)
        ok = ok_q[:, None] & ok_d
        q = tl.load(read + row[:, None] * (3 * channels), mask=ok, other=0.0).to(tl.float32)
        q, q_scale, q_offset = _on_grid(q, grids, q_table, 0, head, heads, ok, LIMITS[0], LIMITS[1])
        scores = tl.dot(q.to(tl.int8), k_codes).to(tl.float32) * (q_scale * k_scale)
        scores += (tl.sum(q, 1).to(tl.float32) * (q_scale * k_offset))[:, None]
        scores += k_sum * (k_scale * q_offset) + D * q_offset * k_offset
        scores *= scale
        pair = query[:, None] * tokens + key[None, :]
        ok_pair = (query < tokens)[:, None] & ok_k[None, :]
        if BIAS:
            at = bias + head * tokens * tokens
            scores += tl.load(at + pair, mask=ok_pair, other=0.0)
        if MASK:
            at = mask + window % mask_count * tokens * tokens
            scores += tl.load(at + pair, mask=ok_pair, other=0.0)
        scores = tl.where(ok_k[None, :], scores, float('-inf'))
        probs = tl.exp(scores - tl.max(scores, 1)[:, None])
        total = tl.sum(probs, 1)[:, None]
        if not ROW_RELATIVE:
            probs = tl.div_rn(probs, tl.broadcast_to(total, probs.shape))
        p, p_scale, p_offset = _on_grid(
            probs, grids, p_table, 3, head, heads, ok_k[None, :], LIMITS[6], LIMITS[7]
        )
        value = tl.dot(p.to(tl.float16), v_codes) * (p_scale * v_scale)
        value += (tl.sum(p, 1).to(tl.float32) * (p_scale * v_offset))[:, None]
        value += v_sum * (v_scale * p_offset) + tokens * p_offset * v_offset
        if ROW_RELATIVE:
            value = tl.div_rn(value, tl.broadcast_to(total, value.shape))
        if INDEXED:
            # A row past the end is padding: its token was a key, nothing is kept of it.
            ok = ok & (row < out_rows)[:, None]
        to = out + row[:, None] * channels + head * D + depth[None, :]
        tl.store(to, value.to(out.dtype.element_ty), mask=ok)


def int4_attention(
    qkv: Tensor,
    heads: int,
    scale: float,
    grids: Tensor,
    limits: list[int],
    tables: list[Tensor],
    row_relative: bool,
    bias: Tensor | None,
    mask: Tensor | None,
    rows: Tensor | None,
    out_rows: int,
) -> Tensor:
    check_attention(qkv, heads, grids, limits, tables, bias, mask, rows, out_rows)
    windows, tokens = qkv.shape[:2] if rows is None else rows.shape
    channels = qkv.shape[-1] // 3
    depth = channels // heads
    keys = max(triton.next_power_of_2(tokens), 32)
    depth_block = max(triton.next_power_of_2(depth), 32)
    if keys * depth_block > MAX_KEY_VALUES:
        native.announce(
            f'attentions over {tokens} tokens with {depth} channels a head on {qkv.device.type}',
            'their keys and values do not fit the shared memory',
        )
        return reference.int4_attention(
            qkv, heads, scale, grids, limits, tables, row_relative, bias, mask, rows, out_rows
        )
    qkv = qkv.contiguous()
    shape = (*qkv.shape[:-1], channels) if rows is None else (out_rows, channels)
    # Rows of the result that no window names are zero.
    out = qkv.new_empty(shape) if rows is None else qkv.new_zeros(shape)
    if not windows or not tokens:
        return out
    queries = max(16, min(64, 8192 // keys, triton.next_power_of_2(tokens)))
    blocks = triton.cdiv(tokens, queries)
    steps = max(1, min(blocks, windows * heads * blocks // MANY_PROGRAMS))
    with torch.cuda.device_of(qkv):
        attention_kernel[(windows * heads * triton.cdiv(blocks, steps),)](
            qkv,
            out,
            grids.contiguous(),
            *(table_or_none(table) for table in tables),
            qkv if bias is None else bias.contiguous(),
            qkv if mask is None else mask.contiguous(),
            qkv if rows is None else rows.contiguous(),
            tokens,
            heads,
            1 if mask is None else mask.shape[0],
            windows * tokens if rows is None else qkv.numel() // qkv.shape[-1],
            out_rows,
            scale,
            steps,
            LIMITS=tuple(limits),
            ROW_RELATIVE=row_relative,
            BIAS=bias is not None,
            MASK=mask is not None,
            INDEXED=rows is not None,
            WIDE=max(qkv.numel(), windows * tokens) >= 2**31,
            D=depth,
            BLOCK_D=depth_block,
            BLOCK_Q=queries,
            BLOCK_N=keys,
            num_warps=8 if queries * keys >= 8192 else 4,
            # Nothing to load ahead: a second stage of bias and mask would only take registers.
            num_stages=1,
            **LAUNCH,
        )
    return out
