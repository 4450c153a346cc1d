"""The ops of :mod:`.training` on CUDA tensors, through :mod:`.triton_training_kernels`.

Importing this module needs triton. Nothing here reads a value from the device, and results do not
depend on the order in which programs run: they are the same in every call.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..quant.code_state import state_dtype
from . import native, training_checks, training_reference
from .triton_kernels import LAUNCH
from .triton_training_kernels import (
    decode_kernel,
    encode_kernel,
    fake_quant_backward_kernel,
    gelu_backward_kernel,
    gelu_kernel,
    softmax_backward_kernel,
    softmax_kernel,
)

__all__ = [
    'fake_quant',
    'fake_quant_backward',
    'fake_quant_values',
    'gelu_fake_quant',
    'gelu_fake_quant_backward',
    'softmax_fake_quant_',
    'softmax_fake_quant_backward_',
]

# Values of a tile, and columns of one: as many as lie side by side where a grid is learned a
# column (its sums run down the tile), or in all.
TILE = 4096
COLUMNS = {True: 128, False: 1024}
# Values of a tile of whole rows of scores, which several arrays of its size are kept of, and the
# longest row that registers hold; above it the plain-torch form runs.
SCORES_TILE = 1024
MAX_KEYS = 1 << 14
# From this size on places are counted in 64 bits. Tiles reach past the end, so it is below 2**31.
WIDE_FROM = 1 << 30


class _Cut(NamedTuple):
    """How a tensor is worked on: ``rows`` of ``columns``, and where its grids lie."""

    rows: int
    columns: int
    channels: int
    per_column: bool

    @property
    def launch(self) -> tuple[tuple[int], dict]:
        """Grid of programs, and options of a launch."""
        block = min(triton.next_power_of_2(self.columns), COLUMNS[self.per_column])
        rows = 1 if self.rows == 1 else TILE // block
        programs = triton.cdiv(self.rows, rows) * triton.cdiv(self.columns, block)
        options = dict(PER_COLUMN=self.per_column, ROWS=rows, BLOCK=block)
        return (programs,), {**options, **_shared(self.rows * self.columns, rows * block)}

    def new_parts(self, like: Tensor) -> Tensor:
        """Room for the sums of every tile, float32 ``(2, blocks of rows, columns)`` or
        ``(2, blocks of columns, rows)``."""
        _, options = self.launch
        if self.per_column:
            shape = triton.cdiv(self.rows, options['ROWS']), self.columns
        else:
            shape = triton.cdiv(self.columns, options['BLOCK']), self.rows
        return torch.empty(2, *shape, dtype=torch.float32, device=like.device)

    def totals(self, parts: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of scale and offset from those sums."""
        by_channel = parts.view(2, -1, self.channels).sum(1)
        return by_channel[0].view(scale.shape), by_channel[1].view(scale.shape)


def _shared(size: int, tile: int, each: int = 16) -> dict:
    """Options that every launch has: ``size`` of the tensor, values of a tile and of a thread."""
    return dict(WIDE=size >= WIDE_FROM, num_warps=min(max(tile // (32 * each), 1), 32), **LAUNCH)


def _learned_axis(scale: Tensor) -> int:
    """Axis that a scale is learned along, counted from the end; 0 for one number."""
    return next((i for i in range(1, scale.dim() + 1) if scale.shape[-i] != 1), 0)


def _cut(shape: torch.Size, scale: Tensor) -> _Cut:
    axis, channels = _learned_axis(scale), scale.numel()
    if not axis:
        return _Cut(1, math.prod(shape), 1, False)
    inner = math.prod(shape[len(shape) - axis + 1 :])
    if inner == 1:
        return _Cut(math.prod(shape) // channels, channels, channels, True)
    return _Cut(math.prod(shape) // inner, inner, channels, False)


def _numbers(scale: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and offset as the kernels read them."""
    scale = scale.contiguous()
    return scale, scale if offset is None else offset.contiguous()


def _like(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _zeros(scale: Tensor) -> tuple[Tensor, Tensor]:
    zeros = scale.new_zeros(2, *scale.shape)
    return zeros[0], zeros[1]


def fake_quant(
    x: Tensor, scale: Tensor, offset: Tensor | None, grid: list[int]
) -> tuple[Tensor, Tensor]:
    training_checks.check_quantized(x, scale, offset, grid)
    x = x.contiguous()
    x_hat = _like(x)
    state = _like(x, state_dtype(*grid))
    if x.numel():
        cut = _cut(x.shape, scale)
        programs, options = cut.launch
        with torch.cuda.device_of(x):
            encode_kernel[programs](
                x,
                x_hat,
                state,
                *_numbers(scale, offset),
                cut.rows,
                cut.columns,
                cut.channels,
                CODE_MIN=grid[0],
                CODE_MAX=grid[1],
                LEVEL_BITS=grid[2],
                OFFSET=offset is not None,
                **options,
            )
    return x_hat, state


def fake_quant_values(
    state: Tensor, scale: Tensor, offset: Tensor | None, grid: list[int]
) -> Tensor:
    training_checks.check_state(state, grid)
    training_checks.check_learned_grid(state.shape, scale, offset, grid, state.device)
    x_hat = _like(state)
    if state.numel():
        cut = _cut(state.shape, scale)
        programs, options = cut.launch
        with torch.cuda.device_of(state):
            decode_kernel[programs](
                state,
                x_hat,
                *_numbers(scale, offset),
                cut.rows,
                cut.columns,
                cut.channels,
                CODE_MIN=grid[0],
                CODE_MAX=grid[1],
                LEVEL_BITS=grid[2],
                OFFSET=offset is not None,
                **options,
            )
    return x_hat


def fake_quant_backward(
    grad: Tensor, state: Tensor, scale: Tensor, offset: Tensor | None, grid: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    training_checks.check_state(state, grid)
    training_checks.check_quantized(grad, scale, offset, grid)
    training_checks.check_same_shape('grad', grad, 'state', state)
    grad = grad.contiguous()
    grad_x = _like(grad)
    if not grad.numel():
        return grad_x, *_zeros(scale)
    cut = _cut(grad.shape, scale)
    programs, options = cut.launch
    with torch.cuda.device_of(grad):
        parts = cut.new_parts(grad)
        fake_quant_backward_kernel[programs](
            grad,
            state,
            grad_x,
            parts,
            cut.rows,
            cut.columns,
            CODE_MIN=grid[0],
            CODE_MAX=grid[1],
            LEVEL_BITS=grid[2],
            **options,
        )
        return grad_x, *cut.totals(parts, scale)


def gelu_fake_quant(x: Tensor, scale: Tensor, offset: Tensor | None, grid: list[int]) -> Tensor:
    training_checks.check_gelu(x, scale, offset, grid)
    x = x.contiguous()
    x_hat = _like(x)
    if x.numel():
        cut = _cut(x.shape, scale)
        programs, options = cut.launch
        with torch.cuda.device_of(x):
            gelu_kernel[programs](
                x,
                x_hat,
                *_numbers(scale, offset),
                cut.rows,
                cut.columns,
                CODE_MIN=grid[0],
                CODE_MAX=grid[1],
                OFFSET=offset is not None,
                **options,
            )
    return x_hat


def gelu_fake_quant_backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, grid: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    training_checks.check_gelu(x, scale, offset, grid)
    training_checks.check_same_shape('grad', grad, 'the input', x)
    grad, x = grad.contiguous(), x.contiguous()
    grad_x, x_hat = (_like(x) for _ in range(2))
    if not x.numel():
        return grad_x, x_hat, *_zeros(scale)
    cut = _cut(x.shape, scale)
    programs, options = cut.launch
    with torch.cuda.device_of(x):
        parts = cut.new_parts(x)
        gelu_backward_kernel[programs](
            grad,
            x,
            grad_x,
            x_hat,
            parts,
            *_numbers(scale, offset),
            cut.rows,
            cut.columns,
            CODE_MIN=grid[0],
            CODE_MAX=grid[1],
            OFFSET=offset is not None,
            **options,
        )
        return grad_x, x_hat, *cut.totals(parts, scale)


def _softmax_launch(
    scores: Tensor,
    factor: float,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: Tensor,
    offset: Tensor | None,
    grid: list[int],
    row_relative: bool,
) -> tuple[tuple[int], list, dict]:
    """Programs of a softmax, and the arguments that forward and backward share."""
    batch, heads, queries, keys = scores.shape
    rows, block = batch * heads * queries, triton.next_power_of_2(keys)
    tile_rows = max(SCORES_TILE // block, 1)
    axis = _learned_axis(scale)
    arguments = [
        scores if bias is None else bias.contiguous(),
        scores if mask is None else mask.contiguous(),
        *_numbers(scale, offset),
        rows,
        keys,
        queries,
        heads * queries,
        1 if mask is None else len(mask),
        # Rows that a scale lasts for.
        math.prod(scores.shape[4 - axis + 1 : 3]) if axis else 1,
        scale.numel(),
        factor,
    ]
    options = dict(
        CODE_MIN=grid[0],
        CODE_MAX=grid[1],
        ROW_RELATIVE=row_relative,
        OFFSET=offset is not None,
        BIAS=bias is not None,
        MASK=mask is not None,
        ROWS=tile_rows,
        BLOCK=block,
        **_shared(scores.numel(), tile_rows * block, each=8),
    )
    return (triton.cdiv(rows, tile_rows),), arguments, options


def _is_too_long(scores: Tensor) -> bool:
    keys = scores.shape[-1]
    if keys > MAX_KEYS:
        native.announce(
            f'softmaxes of training over {keys} keys on {scores.device.type}',
            'their rows do not fit the registers',
        )
    return keys > MAX_KEYS


def softmax_fake_quant_(
    scores: Tensor,
    factor: float,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: Tensor,
    offset: Tensor | None,
    grid: list[int],
    row_relative: bool,
) -> Tensor:
    training_checks.check_scores(scores, bias, mask, scale, offset, grid)
    given = (scores, factor, bias, mask, scale, offset, grid, row_relative)
    if _is_too_long(scores):
        return training_reference.softmax_fake_quant_(*given)
    total = scores.new_empty(*scores.shape[:-1], 1)
    if scores.numel():
        programs, arguments, options = _softmax_launch(*given)
        with torch.cuda.device_of(scores):
            softmax_kernel[programs](scores, total, *arguments, **options)
    return total


def softmax_fake_quant_backward_(
    grad: Tensor,
    scores: Tensor,
    factor: float,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: Tensor,
    offset: Tensor | None,
    grid: list[int],
    row_relative: bool,
) -> tuple[Tensor, Tensor]:
    training_checks.check_scores(scores, bias, mask, scale, offset, grid)
    training_checks.check_score_gradient(grad, scores)
    given = (scores, factor, bias, mask, scale, offset, grid, row_relative)
    if _is_too_long(scores):
        return training_reference.softmax_fake_quant_backward_(grad, *given)
    if not scores.numel():
        return _zeros(scale)
    programs, arguments, options = _softmax_launch(*given)
    rows, inner, channels = arguments[4], arguments[9], arguments[10]
    with torch.cuda.device_of(scores):
        parts = torch.empty(2, rows, dtype=torch.float32, device=scores.device)
        softmax_backward_kernel[programs](grad, scores, parts, *arguments, **options)
        sums = parts.view(2, -1, channels, inner).sum((1, 3))
    return sums[0].view(scale.shape), sums[1].view(scale.shape)
