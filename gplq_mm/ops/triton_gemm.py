"""The product of codes on CUDA, and what follows it.

Activations and 4-bit weights lie in memory two codes a byte, packed by *halves* (see
:func:`gplq_mm.quant.packing.pack_halves`): byte j of a row holds columns j and H + j, so a byte
tile of either operand splits into two operands of plain dot products, without interleaving.
Tensor cores multiply int8: Hopper has no 4-bit instruction, and older ones gain little.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import INTERPRETED, LAUNCH, SQRT_HALF, fma, levels_of
from .triton_layer import TritonLayer
from .triton_tuning import tuned

# Up to this many rows 4-bit weights are unpacked within the product. With more, every tile row
# would unpack them again, and one pass that leaves int8 in the L2 cache is cheaper.
UNPACK_IN_LOOP_ROWS = 256
# What a product is launched with in the interpreter, which has no clock to tune by.
INTERPRETER_BLOCKS = dict(BLOCK_M=16, BLOCK_N=64, BLOCK_K=32, num_warps=4)

NOTHING_FOLLOWS = dict(NEXT_PACKED=False, NEXT_MIN=0, NEXT_MAX=0, NEXT_OFFSET=0)
# What gemm_kernel stores.
OUT_REAL, OUT_INT32, OUT_CODES = 0, 1, 2

_INTERPRETED = tl.constexpr(INTERPRETED)
_OUT_INT32 = tl.constexpr(OUT_INT32)
_OUT_CODES = tl.constexpr(OUT_CODES)


@triton.jit
def _split_unsigned(byte):
    """Both nibbles of each byte as int8 0..15: low, high."""
    if _INTERPRETED:
        low = byte & 15
        high = (byte >> 4) & 15
    else:
        # Four bytes an instruction. Left to the compiler this costs five times as many, as much
        # time as the products themselves (SASS of sm_90: 128 instead of 24 in a step).
        low, high = tl.inline_asm_elementwise(
            """
            and.b32 $0, $2, 0x0f0f0f0f;
            shr.b32 $1, $2, 4;
            and.b32 $1, $1, 0x0f0f0f0f;
            """,
            '=&r,=&r,r',
            [byte],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    return low, high


@triton.jit
def _split_signed(byte):
    """16 times each signed nibble, as int8: low, high. So there is no sign to extend."""
    if _INTERPRETED:
        low = byte << 4
        high = byte & -16
    else:
        low, high = tl.inline_asm_elementwise(
            """
            and.b32 $1, $2, 0xf0f0f0f0;
            shl.b32 $0, $2, 4;
            and.b32 $0, $0, 0xf0f0f0f0;
            """,
            '=&r,=&r,r',
            [byte],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    return low, high


@triton.jit
def expand_kernel(
    packed,  # int8 view of uint8 (rows, half)
    multiplier,  # uint8 (groups, rows)
    out,  # int8 (rows, 2 * half)
    rows, half, groups, group_size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``multiplier * code`` of packed weights, once per call, for the tiles of a large product."""
    row = tl.program_id(0)
    low = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = low < half
    byte = tl.load(packed + row * half + low, mask=inside, other=0).to(tl.int32)
    last = groups - 1
    group = tl.minimum(low // group_size, last)
    factor = tl.load(multiplier + group * rows + row, mask=inside, other=0).to(tl.int32)
    tl.store(out + row * 2 * half + low, (((byte << 28) >> 28) * factor).to(tl.int8), mask=inside)
    group = tl.minimum((half + low) // group_size, last)
    factor = tl.load(multiplier + group * rows + row, mask=inside, other=0).to(tl.int32)
    tl.store(out + (row * 2 + 1) * half + low, ((byte >> 4) * factor).to(tl.int8), mask=inside)


@triton.jit(do_not_specialize=['M', 'M_BUCKET'])
def gemm_kernel(
    a,  # int8 view: (M, half) codes packed by halves, or (M, 2 * half) codes minus an offset
    w,  # int8 view: (N, half) codes packed by halves, or (N, 2 * half) multiplier * code
    multiplier,  # uint8 (groups, N); read with W_PACKED
    out,  # (M, N); with OUT_CODES bytes (M, N / 2) packed by halves or (M, N)
    row_scale, bias,  # float32 (N,)
    correction,  # int32 (N,)
    gamma, residual,  # float (N,) and (M, N); read with GAMMA and ADD
    next_inverse, next_shift,  # float32 (N,): grid of the next layer; read with OUT_CODES
    next_table,  # uint8 (64,): levels of the next layer's codes, or None
    M, N, half, groups,
    M_BUCKET,  # M rounded up to a power of two: a key of autotuning
    GROUP_SIZE: tl.constexpr,
    A_PACKED: tl.constexpr, W_PACKED: tl.constexpr,
    GELU: tl.constexpr, GAMMA: tl.constexpr, ADD: tl.constexpr,
    OUT: tl.constexpr, NEXT_PACKED: tl.constexpr,
    NEXT_MIN: tl.constexpr, NEXT_MAX: tl.constexpr, NEXT_OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``(a @ w.T - correction) * row_scale + bias`` and what follows it.

    BLOCK_K divides half, and GROUP_SIZE with W_PACKED. With W_PACKED 16 times the sum must fit
    int32.
    """
    # Programs that run together share columns of w and neighbouring rows of a in the L2 cache.
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    band: tl.constexpr = 8
    program = tl.program_id(0)
    first = program // (band * tiles_n) * band
    height = tl.minimum(tiles_m - first, band)
    tile_m = first + program % (band * tiles_n) % height
    tile_n = program % (band * tiles_n) // height

    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end wrap around instead of being masked: loads stay plain, stores are masked.
    a_row = rows % M
    w_row = columns % N
    step = tl.arange(0, BLOCK_K)
    a_stride = half if A_PACKED else 2 * half
    w_stride = half if W_PACKED else 2 * half
    a_tile = a + a_row.to(tl.int64)[:, None] * a_stride + step[None, :]
    w_tile = w + w_row[None, :] * w_stride + step[:, None]

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k in range(0, half if A_PACKED or W_PACKED else 2 * half, BLOCK_K):
        if A_PACKED:
            a_low, a_high = _split_unsigned(tl.load(a_tile))
        elif W_PACKED:
            a_low = tl.load(a_tile)
            a_high = tl.load(a_tile + half)
        if W_PACKED:
            # A step lies in one group, so the multiplier comes after the product, which for few
            # rows is less work than multiplying the weights.
            w_low, w_high = _split_signed(tl.load(w_tile))
            group = tl.minimum(k // GROUP_SIZE, groups - 1)
            factor = tl.load(multiplier + group * N + w_row).to(tl.int32)
            sums += tl.dot(a_low, w_low) * factor[None, :]
            group = tl.minimum((half + k) // GROUP_SIZE, groups - 1)
            factor = tl.load(multiplier + group * N + w_row).to(tl.int32)
            sums += tl.dot(a_high, w_high) * factor[None, :]
        elif A_PACKED:
            sums = tl.dot(a_low, tl.load(w_tile), sums, out_dtype=tl.int32)
            sums = tl.dot(a_high, tl.load(w_tile + half), sums, out_dtype=tl.int32)
        else:
            sums = tl.dot(tl.load(a_tile), tl.load(w_tile), sums, out_dtype=tl.int32)
        a_tile += BLOCK_K
        w_tile += BLOCK_K
    if W_PACKED:
        sums = sums >> 4

    ok = columns < N
    sums -= tl.load(correction + w_row)[None, :]
    mask = (rows < M)[:, None] & ok[None, :]
    place = rows.to(tl.int64)[:, None] * N + columns[None, :]
    if OUT == _OUT_INT32:
        tl.store(out + place, sums, mask=mask)
    else:
        scale = tl.load(row_scale + w_row)[None, :]
        value = fma(sums.to(tl.float32), scale, tl.load(bias + w_row)[None, :])
        if GELU:
            value = value * 0.5 * (1.0 + tl.erf(value * SQRT_HALF))
        if GAMMA:
            value = value * tl.load(gamma + w_row).to(tl.float32)[None, :]
        if ADD:
            value = tl.load(residual + place, mask=mask, other=0.0).to(tl.float32) + value
        if OUT == _OUT_CODES:
            factor = tl.load(next_inverse + w_row)[None, :]
            offset = tl.load(next_shift + w_row)[None, :]
            code = levels_of(value, factor, offset, NEXT_MIN, NEXT_MAX, next_table)
            if NEXT_PACKED:
                # The rows of w are ordered such that two neighbours share a byte.
                low, high = tl.split(code.reshape(BLOCK_M, BLOCK_N // 2, 2))
                pairs = tile_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
                place = rows.to(tl.int64)[:, None] * (N // 2) + pairs[None, :]
                mask = (rows < M)[:, None] & (pairs < N // 2)[None, :]
                tl.store(out + place, (low | (high << 4)).to(tl.uint8), mask=mask)
            else:
                tl.store(out + place, (code - NEXT_OFFSET).to(tl.int8), mask=mask)
        else:
            tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)


tuned_gemm = gemm_kernel if INTERPRETED else tuned(gemm_kernel)


def expand_weight(layer: TritonLayer) -> Tensor:
    """``multiplier * code`` of a layer, int8 ``(N, 2H)``."""
    if layer.multiplier is None:
        return layer.weight
    out = layer.weight.new_empty(layer.rows, 2 * layer.half)
    block = min(triton.next_power_of_2(layer.half), 1024)
    if layer.rows:
        expand_kernel[(layer.rows, triton.cdiv(layer.half, block))](
            layer.weight,
            layer.multiplier,
            out,
            layer.rows,
            layer.half,
            layer.multiplier.shape[0],
            layer.group_size,
            BLOCK=block,
            num_warps=4,
            **LAUNCH,
        )
    return out


def multiply(
    codes: Tensor,
    layer: TritonLayer,
    out: Tensor,
    *,
    gelu: bool = False,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    follow: tuple[Tensor, Tensor, TritonLayer] | None = None,
    unpack_in_loop: bool | None = None,
) -> Tensor:
    """Runs gemm_kernel on codes ``(M, row_bytes)`` into ``out`` and returns that.

    An int32 ``out`` takes the accumulators. ``follow`` is (inverse, shift, layer) of the layer
    whose codes ``out`` takes. ``unpack_in_loop`` is decided by M if None.
    """
    rows = codes.shape[0]
    if not rows or not layer.rows:
        return out
    if unpack_in_loop is None:
        unpack_in_loop = rows <= UNPACK_IN_LOOP_ROWS
    w_packed = unpack_in_loop and layer.unpacks_in_loop
    weight = layer.weight if w_packed else expand_weight(layer)
    kind = OUT_INT32 if out.dtype == torch.int32 else OUT_REAL
    next_inverse, next_shift, second = follow or (layer.row_scale, layer.bias, None)
    following = {}
    if second is not None:
        kind = OUT_CODES
        following = dict(
            NEXT_PACKED=second.packed,
            NEXT_MIN=second.code_min,
            NEXT_MAX=second.code_max,
            NEXT_OFFSET=second.offset,
        )

    def grid(meta):
        return (triton.cdiv(rows, meta['BLOCK_M']) * triton.cdiv(layer.rows, meta['BLOCK_N']),)

    tuned_gemm[grid](
        codes,
        weight,
        layer.multiplier if w_packed else layer.weight,
        out.view(torch.uint8) if following.get('NEXT_PACKED') else out,
        layer.row_scale,
        layer.bias,
        layer.correction,
        layer.row_scale if gamma is None else gamma,
        layer.row_scale if residual is None else residual,
        next_inverse,
        next_shift,
        None if second is None else second.table,
        rows,
        layer.rows,
        layer.half,
        layer.multiplier.shape[0] if w_packed else 1,
        M_BUCKET=triton.next_power_of_2(rows),
        GROUP_SIZE=layer.group_size if w_packed else 1,
        A_PACKED=layer.packed,
        W_PACKED=w_packed,
        GELU=gelu,
        GAMMA=gamma is not None,
        ADD=residual is not None,
        OUT=kind,
        **{**NOTHING_FOLLOWS, **following},
        **(INTERPRETER_BLOCKS if INTERPRETED else {}),
        **LAUNCH,
    )
    return out
