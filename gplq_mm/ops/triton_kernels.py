"""Triton kernels for CUDA (compute capability 8.0 and later): quantize, multiply, attend.

Activations and 4-bit weights lie in memory two codes a byte, packed by *halves* (see
:func:`gplq_mm.quant.packing.pack_halves`): byte j of a row holds columns j and H + j, so a byte
tile of either operand splits into two operands of plain dot products, without interleaving.
Tensor cores multiply int8: Hopper has no 4-bit instruction, and older ones gain little.

Codes and rescaled sums equal those of the reference, ties included. What is one fused
multiply-add there (``torch.addcmul``) is one here, by name; all other multiplications and
additions are kept apart by ``enable_fp_fusion=False`` at every launch (:data:`LAUNCH`).
"""

import triton
import triton.language as tl

__all__ = [
    'GEMM_CONFIGS',
    'INTERPRETED',
    'LAUNCH',
    'MAGIC',
    'OUT_CODES',
    'OUT_INT32',
    'OUT_REAL',
    'SQRT_HALF',
    'attention_kernel',
    'expand_kernel',
    'fma',
    'gemm_kernel',
    'quantize_kernel',
    'shared_bytes',
]

# Whether the kernels below run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1).
INTERPRETED = bool(triton.knobs.runtime.interpret)
# Options of every launch. Numbers that follow the batch are not specialized on, or a kernel would
# be compiled for batches of one, of multiples of 16 and of others.
LAUNCH = dict(enable_fp_fusion=False)

# What gemm_kernel stores.
OUT_REAL, OUT_INT32, OUT_CODES = 0, 1, 2

_INTERPRETED = tl.constexpr(INTERPRETED)
_OUT_INT32 = tl.constexpr(OUT_INT32)
_OUT_CODES = tl.constexpr(OUT_CODES)
# 1.5 * 2**23: adding it leaves an integer in the low bits of a float32, rounded half to even.
MAGIC = tl.constexpr(12582912.0)
_MAGIC_BITS = tl.constexpr(0x4B400000)
SQRT_HALF = tl.constexpr(0.7071067811865476)

# Blocks of gemm_kernel that autotuning chooses from: rows, columns, packed bytes a step; warps;
# pipeline stages. 64 rows and more feed a warpgroup instruction (wgmma) on Hopper.
GEMM_CONFIGS = tuple(
    triton.Config(dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k), num_warps=warps, num_stages=stages)
    for m, n, k, warps, stages in (
        (128, 256, 64, 8, 3),
        (128, 128, 128, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 128, 64, 8, 3),
        (64, 128, 64, 4, 4),
        (64, 64, 64, 4, 4),
        (16, 64, 64, 4, 4),
        # Weights unpacked in the loop in groups of 32 take steps of 32.
        (128, 128, 32, 8, 4),
        (64, 128, 32, 4, 4),
        (64, 64, 32, 4, 5),
        (16, 64, 32, 4, 5),
    )
)


def shared_bytes(config: triton.Config, a_packed: bool, w_packed: bool) -> int:
    """Shared memory that the pipelined loads of :func:`gemm_kernel` take, in bytes."""
    block = config.kwargs
    rows = block['BLOCK_M'] * (2 if w_packed and not a_packed else 1)
    rows += block['BLOCK_N'] * (2 if a_packed and not w_packed else 1)
    return rows * block['BLOCK_K'] * config.num_stages


@triton.jit
def fma(x, y, z):
    """``x * y + z`` rounded once, float32."""
    if _INTERPRETED:
        # The interpreter's own fma rounds twice. A product of two float32 is exact in float64.
        return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@triton.jit
def _codes(x, inverse, shift, CODE_MIN: tl.constexpr, CODE_MAX: tl.constexpr):
    """Codes from 0, int32, of float32 values; NaN gives 0."""
    steps = fma(x, inverse, shift)
    # Clamping to integers and rounding commute, and within the range the magic sum is exact. NaN
    # is not above CODE_MIN.
    steps = tl.minimum(tl.where(steps > CODE_MIN, steps, CODE_MIN), CODE_MAX)
    return (steps + MAGIC).to(tl.int32, bitcast=True) - (_MAGIC_BITS + CODE_MIN)


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
def _load_values(
    x, row, column, mask, row_stride, stride_c, stride_h, stride_w, height, width, out_h, out_w,
    GEOMETRY: tl.constexpr,
):  # fmt: skip
    """Values (ROWS, BLOCK) float32 of input columns; zero where masked."""
    if GEOMETRY is None:
        address = row.to(tl.int64)[:, None] * row_stride + column[None, :]
    else:
        # A row is an output pixel, a column (channel, kernel row, kernel column).
        kernel_w: tl.constexpr = GEOMETRY[1]
        taps: tl.constexpr = GEOMETRY[0] * GEOMETRY[1]
        channel = column // taps
        tap_y = (column % taps) // kernel_w * GEOMETRY[6] - GEOMETRY[4]
        tap_x = column % kernel_w * GEOMETRY[7] - GEOMETRY[5]
        image = row // (out_w * out_h)
        in_y = (row // out_w % out_h * GEOMETRY[2])[:, None] + tap_y[None, :]
        in_x = (row % out_w * GEOMETRY[3])[:, None] + tap_x[None, :]
        mask = mask & (in_y >= 0) & (in_y < height) & (in_x >= 0) & (in_x < width)
        address = image.to(tl.int64)[:, None] * row_stride + (channel * stride_c)[None, :]
        address += in_y * stride_h + in_x * stride_w
    return tl.load(x + address, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=['rows', 'steps'])
def quantize_kernel(
    x,  # (rows, columns), or an image (B, C, H, W) with GEOMETRY
    out,  # uint8 (rows, half) packed by halves, or int8 (rows, out_columns)
    source,  # int32: input column of each stored column; read with GATHER
    inverse, shift,  # float32, stored order
    norm_weight, norm_bias, eps,  # LayerNorm over the input columns; read with NORM
    rows, columns, half, out_columns,
    steps,  # tiles of ROWS that a program works through
    row_stride, stride_c, stride_h, stride_w, height, width, out_h, out_w,
    CODE_MIN: tl.constexpr, CODE_MAX: tl.constexpr,
    OFFSET: tl.constexpr,  # taken off a code that is stored as a byte
    PACKED: tl.constexpr, NORM: tl.constexpr, GATHER: tl.constexpr,
    GEOMETRY: tl.constexpr,  # kernel, stride, padding, dilation (h, w each), or None
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Codes of activations in stored column order, one pass over memory.

    Columns are gathered where they are read: a row lies in the L1 cache after the first touch,
    and what is written is contiguous. A program with NORM holds whole rows in registers.
    """
    low = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    high = half + low
    inside = low < half
    ok_low = inside & (low < columns)
    ok_high = inside & (high < columns)
    low_column = tl.load(source + low, mask=ok_low, other=0) if GATHER else low
    high_column = tl.load(source + high, mask=ok_high, other=0) if GATHER else high
    # A column that pads K meets zero weights; its code only has to lie in the range.
    low_inverse = tl.load(inverse + low, mask=ok_low, other=0.0)[None, :]
    low_shift = tl.load(shift + low, mask=ok_low, other=CODE_MIN)[None, :]
    high_inverse = tl.load(inverse + high, mask=ok_high, other=0.0)[None, :]
    high_shift = tl.load(shift + high, mask=ok_high, other=CODE_MIN)[None, :]
    if NORM:
        low_weight = tl.load(norm_weight + low_column, mask=ok_low, other=0.0)[None, :]
        low_bias = tl.load(norm_bias + low_column, mask=ok_low, other=0.0)[None, :]
        high_weight = tl.load(norm_weight + high_column, mask=ok_high, other=0.0)[None, :]
        high_bias = tl.load(norm_bias + high_column, mask=ok_high, other=0.0)[None, :]
        count = columns.to(tl.float32)
    for step in range(steps):
        row = (tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)
        ok_row = (row < rows)[:, None]
        x_low = _load_values(
            x, row, low_column, ok_row & ok_low[None, :], row_stride,
            stride_c, stride_h, stride_w, height, width, out_h, out_w, GEOMETRY,
        )  # fmt: skip
        x_high = _load_values(
            x, row, high_column, ok_row & ok_high[None, :], row_stride,
            stride_c, stride_h, stride_w, height, width, out_h, out_w, GEOMETRY,
        )  # fmt: skip
        if NORM:
            mean = tl.div_rn(tl.sum(x_low, 1) + tl.sum(x_high, 1), count)[:, None]
            x_low = tl.where(ok_low[None, :], x_low - mean, 0.0)
            x_high = tl.where(ok_high[None, :], x_high - mean, 0.0)
            squares = tl.sum(x_low * x_low, 1) + tl.sum(x_high * x_high, 1)
            rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, count) + eps))[:, None]
            x_low = x_low * rstd * low_weight + low_bias
            x_high = x_high * rstd * high_weight + high_bias
        low_code = _codes(x_low, low_inverse, low_shift, CODE_MIN, CODE_MAX)
        high_code = _codes(x_high, high_inverse, high_shift, CODE_MIN, CODE_MAX)
        to = out + row.to(tl.int64)[:, None] * out_columns + low[None, :]
        mask = ok_row & inside[None, :]
        if PACKED:
            tl.store(to, (low_code | (high_code << 4)).to(tl.uint8), mask=mask)
        else:
            # Truncating keeps the low byte: right for uint8 and int8 alike.
            tl.store(to, (low_code - OFFSET).to(tl.int8), mask=mask)
            mask = mask & (high < out_columns)[None, :]
            tl.store(to + half, (high_code - OFFSET).to(tl.int8), mask=mask)


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
            code = _codes(value, factor, offset, NEXT_MIN, NEXT_MAX)
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


@triton.jit
def _on_grid(x, grid, operand, head, heads, ok, MIN: tl.constexpr, MAX: tl.constexpr):
    """Codes in the range of int8 (0 where not ok), and what turns them back: scale, offset."""
    base: tl.constexpr = 128 if MAX - MIN > 127 else 0
    scale = tl.load(grid + operand * 2 * heads + head)
    offset = tl.load(grid + (operand * 2 + 1) * heads + head)
    inverse = tl.div_rn(1.0, scale)
    code = _codes(x, inverse, offset * -inverse, MIN, MAX) - base
    return tl.where(ok, code, 0), scale, scale * (MIN + base) + offset


@triton.jit(do_not_specialize=['steps', 'in_rows', 'out_rows'])
def attention_kernel(
    qkv,  # (in_rows, 3 * heads * D)
    out,  # (rows of the result, heads * D)
    grids,  # float32 (4, 2, heads): scale and offset of q, k, v, probabilities
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
    k, k_scale, k_offset = _on_grid(k, grids, 1, head, heads, ok_kv, LIMITS[2], LIMITS[3])
    v = tl.load(kv + 2 * channels, mask=ok_kv, other=0.0).to(tl.float32)
    v, v_scale, v_offset = _on_grid(v, grids, 2, head, heads, ok_kv, LIMITS[4], LIMITS[5])
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
        q, q_scale, q_offset = _on_grid(q, grids, 0, head, heads, ok, LIMITS[0], LIMITS[1])
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
            probs, grids, 3, head, heads, ok_k[None, :], LIMITS[6], LIMITS[7]
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
