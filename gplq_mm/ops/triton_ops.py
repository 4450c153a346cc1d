"""The ops of :mod:`.library` on CUDA tensors, through :mod:`.triton_kernels`.

Importing this module needs triton. Nothing here reads a value from the device: a call only
enqueues kernels, so after the first call of a shape (which compiles, tunes and packs) it can be
captured in a CUDA graph.
"""

import torch
import triton
from torch import Tensor

from . import checks, native, reference
from .attention_checks import check_attention
from .reference import gelu, layer_norm
from .triton_kernels import (
    GEMM_CONFIGS,
    INTERPRETED,
    LAUNCH,
    OUT_CODES,
    OUT_INT32,
    OUT_REAL,
    attention_kernel,
    expand_kernel,
    gemm_kernel,
    quantize_kernel,
    shared_bytes,
)
from .triton_layer import TritonLayer, prepared_layer, prepared_mlp

__all__ = [
    'gelu',
    'int4_accumulate',
    'int4_attention',
    'int4_conv2d',
    'int4_linear',
    'int4_linear_add',
    'int4_mlp',
    'int4_norm_linear',
    'layer_norm',
    'quantize_codes',
]

# Up to this many rows 4-bit weights are unpacked within the product. With more, every tile row
# would unpack them again, and one pass that leaves int8 in the L2 cache is cheaper.
UNPACK_IN_LOOP_ROWS = 256
# What a product is launched with in the interpreter, which has no clock to tune by.
INTERPRETER_BLOCKS = dict(BLOCK_M=16, BLOCK_N=64, BLOCK_K=32)
# Values of a tile that a program of quantize_kernel keeps in registers, in each half of a row.
QUANTIZE_TILE = 2048
# A program keeps what it read of the columns for several tiles of rows, as long as there are
# programs enough for every multiprocessor.
MAX_STEPS = 8
MANY_PROGRAMS = 512
# Keys times head size of attention that fit the shared memory of every device; above it the
# plain-torch form runs.
MAX_KEY_VALUES = 256 * 64


def eligible_configs(
    configs: list,
    half: int,
    group_size: int,
    rows: int,
    a_packed: bool,
    w_packed: bool,
    shared: int,
) -> list:
    """Configs of the product that can run, and that are not plainly too large for it.

    Args:
        configs: Triton configs.
        half: Packed bytes of a row.
        group_size: Stored columns that share a multiplier (read with ``w_packed``).
        rows: Rows of activations, rounded up to a power of two.
        a_packed, w_packed: Whether the operands are unpacked within the product.
        shared: Shared memory that a block can have, in bytes.

    Returns:
        At least one config.
    """

    def runs(config):
        step = config.kwargs['BLOCK_K']
        fits = shared_bytes(config, a_packed, w_packed) <= shared
        return fits and half % step == 0 and (not w_packed or group_size % step == 0)

    runnable = [config for config in configs if runs(config)]
    sensible = [
        config
        for config in runnable
        if config.kwargs['BLOCK_M'] <= max(rows, 16)
        # Sixteen rows feed a tensor core badly, steps of 32 feed it slowly.
        and (config.kwargs['BLOCK_M'] >= 64 or rows <= 64)
        and (config.kwargs['BLOCK_K'] >= 64 or (w_packed and group_size % 64))
    ]
    return sensible or runnable


def _prune(configs, named, **kwargs):
    given = {**named, **kwargs}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return eligible_configs(
        configs,
        given['half'],
        given['GROUP_SIZE'],
        given['M_BUCKET'],
        given['A_PACKED'],
        given['W_PACKED'],
        properties.shared_memory_per_block_optin,
    )


if INTERPRETED:
    _tuned_gemm = None
else:
    _tuned_gemm = triton.autotune(
        configs=list(GEMM_CONFIGS),
        key=['M_BUCKET', 'N', 'half', 'GROUP_SIZE', 'A_PACKED', 'W_PACKED', 'GELU', 'ADD', 'OUT'],
        prune_configs_by=dict(early_config_prune=_prune),
        cache_results=True,
    )(gemm_kernel)


def _launch_quantize(
    x: Tensor,
    out: Tensor,
    rows: int,
    columns: int,
    half: int,
    source: Tensor | None,
    inverse: Tensor,
    shift: Tensor,
    limits: tuple[int, int, int],
    packed: bool,
    norm: tuple[Tensor, Tensor, float] | None = None,
    image: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
) -> None:
    """Runs quantize_kernel; ``image`` is ``(geometry, (out_h, out_w))`` of an NCHW input."""
    if norm is None:
        block = min(triton.next_power_of_2(half), 256)
    else:
        block = triton.next_power_of_2(half)
    tile_rows = max(1, min(QUANTIZE_TILE // block, triton.next_power_of_2(rows)))
    strides, size, geometry = (columns, 0, 0, 0), (0, 0, 1, 1), None
    if image is not None:
        geometry, out_size = image
        strides, size = x.stride(), (*x.shape[2:], *out_size)
    tiles = triton.cdiv(rows, tile_rows)
    steps = max(1, min(MAX_STEPS, tiles // MANY_PROGRAMS))
    grid = (triton.cdiv(tiles, steps), triton.cdiv(half, block))
    quantize_kernel[grid](
        x,
        out,
        x if source is None else source,
        inverse,
        shift,
        *((x, x, 0.0) if norm is None else norm),
        rows,
        columns,
        half,
        out.shape[-1],
        steps,
        *strides,
        *size,
        CODE_MIN=limits[0],
        CODE_MAX=limits[1],
        OFFSET=limits[2],
        PACKED=packed,
        NORM=norm is not None,
        GATHER=source is not None,
        GEOMETRY=geometry,
        ROWS=tile_rows,
        BLOCK=block,
        num_warps=16 if block > QUANTIZE_TILE else 8,
        **LAUNCH,
    )


def _quantize(
    x: Tensor, layer: TritonLayer, rows: int, norm: tuple | None = None, image: tuple | None = None
) -> Tensor:
    """Codes of activations as gemm_kernel reads them, int8 ``(rows, layer.row_bytes)``."""
    out = torch.empty(rows, layer.row_bytes, dtype=torch.int8, device=x.device)
    if rows:
        _launch_quantize(
            x,
            out.view(torch.uint8) if layer.packed else out,
            rows,
            layer.columns,
            layer.half,
            layer.source,
            layer.inverse,
            layer.shift,
            (layer.code_min, layer.code_max, layer.offset),
            layer.packed,
            norm,
            image,
        )
    return out


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


def _multiply(
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
    kind = OUT_REAL
    next_inverse, next_shift, next_limits, next_packed = (
        layer.row_scale,
        layer.bias,
        (0, 0, 0),
        False,
    )
    if follow is not None:
        next_inverse, next_shift, second = follow
        kind, next_packed = OUT_CODES, second.packed
        next_limits = (second.code_min, second.code_max, second.offset)
    elif out.dtype == torch.int32:
        kind = OUT_INT32

    def grid(meta):
        return (triton.cdiv(rows, meta['BLOCK_M']) * triton.cdiv(layer.rows, meta['BLOCK_N']),)

    blocks = {**INTERPRETER_BLOCKS, 'num_warps': 4} if INTERPRETED else {}
    (gemm_kernel if INTERPRETED else _tuned_gemm)[grid](
        codes,
        weight,
        layer.multiplier if w_packed else layer.weight,
        out.view(torch.uint8) if next_packed else out,
        layer.row_scale,
        layer.bias,
        layer.correction,
        layer.row_scale if gamma is None else gamma,
        layer.row_scale if residual is None else residual,
        next_inverse,
        next_shift,
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
        NEXT_PACKED=next_packed,
        NEXT_MIN=next_limits[0],
        NEXT_MAX=next_limits[1],
        NEXT_OFFSET=next_limits[2],
        **blocks,
        **LAUNCH,
    )
    return out


def _rows_of(x: Tensor) -> int:
    return x.numel() // x.shape[-1] if x.shape[-1] else x.shape[:-1].numel()


def _new(x: Tensor, layer: TritonLayer, dtype: torch.dtype) -> Tensor:
    return torch.empty(*x.shape[:-1], layer.rows, dtype=dtype, device=x.device)


def _prepare(x: Tensor, layer: list[Tensor], grid: list[int]) -> TritonLayer:
    prepared = prepared_layer(layer, grid, x.device)
    checks.check_input(x, prepared.columns)
    return prepared


def quantize_codes(x: Tensor, inverse: Tensor, shift: Tensor, grid: list[int]) -> Tensor:
    checks.check_quantize(x, inverse, shift, grid)
    columns = inverse.shape[0]
    x = x.contiguous()
    out = torch.empty_like(x, dtype=torch.uint8)
    if x.numel():
        rows = _rows_of(x)
        limits = (grid[0], grid[1], 0)
        with torch.cuda.device_of(x):
            _launch_quantize(
                x, out, rows, columns, -(-columns // 2), None, inverse, shift, limits, False
            )
    return out


def int4_accumulate(x: Tensor, layer: list[Tensor], grid: list[int]) -> Tensor:
    with torch.cuda.device_of(x):
        prepared = _prepare(x, layer, grid)
        codes = _quantize(x.contiguous(), prepared, _rows_of(x))
        return _multiply(codes, prepared, _new(x, prepared, torch.int32))


def int4_linear(x: Tensor, layer: list[Tensor], grid: list[int]) -> Tensor:
    with torch.cuda.device_of(x):
        prepared = _prepare(x, layer, grid)
        codes = _quantize(x.contiguous(), prepared, _rows_of(x))
        return _multiply(codes, prepared, _new(x, prepared, x.dtype))


def int4_linear_add(
    x: Tensor, layer: list[Tensor], grid: list[int], residual: Tensor, gamma: Tensor | None
) -> Tensor:
    with torch.cuda.device_of(x):
        prepared = _prepare(x, layer, grid)
        checks.check_residual(x, residual, prepared.rows)
        checks.check_gamma(gamma, prepared.rows, x.device)
        codes = _quantize(x.contiguous(), prepared, _rows_of(x))
        out = _new(x, prepared, residual.dtype)
        return _multiply(codes, prepared, out, gamma=gamma, residual=residual.contiguous())


def int4_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    layer: list[Tensor],
    grid: list[int],
) -> Tensor:
    with torch.cuda.device_of(x):
        prepared = _prepare(x, layer, grid)
        checks.check_norm(norm_weight, norm_bias, prepared.columns, x.device)
        norm = (norm_weight.float(), norm_bias.float(), eps)
        codes = _quantize(x.contiguous(), prepared, _rows_of(x), norm)
        return _multiply(codes, prepared, _new(x, prepared, x.dtype))


def int4_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    layer1: list[Tensor],
    grid1: list[int],
    layer2: list[Tensor],
    grid2: list[int],
    gamma: Tensor | None,
) -> Tensor:
    with torch.cuda.device_of(x):
        first, inverse, shift, second = prepared_mlp(layer1, grid1, layer2, grid2, x.device)
        checks.check_input(x, first.columns)
        checks.check_norm(norm_weight, norm_bias, first.columns, x.device)
        checks.check_gamma(gamma, second.rows, x.device)
        x = x.contiguous()
        rows = _rows_of(x)
        codes = _quantize(x, first, rows, (norm_weight.float(), norm_bias.float(), eps))
        hidden = torch.empty(rows, second.row_bytes, dtype=torch.int8, device=x.device)
        _multiply(codes, first, hidden, gelu=True, follow=(inverse, shift, second))
        out = _new(x, second, x.dtype)
        return _multiply(hidden, second, out, gamma=gamma, residual=x)


def int4_conv2d(x: Tensor, layer: list[Tensor], grid: list[int], geometry: list[int]) -> Tensor:
    with torch.cuda.device_of(x):
        prepared = prepared_layer(layer, grid, x.device)
        checks.check_conv(x, prepared.columns, geometry)
        kernel, stride, padding, dilation = (geometry[i : i + 2] for i in (0, 2, 4, 6))
        out_h, out_w = (
            (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
            for i in (0, 1)
        )
        rows = x.shape[0] * out_h * out_w
        codes = _quantize(x, prepared, rows, image=(tuple(geometry), (out_h, out_w)))
        out = torch.empty(x.shape[0], out_h, out_w, prepared.rows, dtype=x.dtype, device=x.device)
        return _multiply(codes, prepared, out).permute(0, 3, 1, 2)


def int4_attention(
    qkv: Tensor,
    heads: int,
    scale: float,
    grids: Tensor,
    limits: list[int],
    row_relative: bool,
    bias: Tensor | None,
    mask: Tensor | None,
    rows: Tensor | None,
    out_rows: int,
) -> Tensor:
    check_attention(qkv, heads, grids, limits, bias, mask, rows, out_rows)
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
            qkv, heads, scale, grids, limits, row_relative, bias, mask, rows, out_rows
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
