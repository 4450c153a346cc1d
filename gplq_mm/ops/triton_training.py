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
from . import training_checks
from .triton_common import launch_options, learned_axis, numbers_of, zeros_of
from .triton_softmax import softmax_fake_quant_, softmax_fake_quant_backward_
from .triton_training_kernels import (
    decode_kernel,
    encode_kernel,
    fake_quant_backward_kernel,
    gelu_backward_kernel,
    gelu_kernel,
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
        return (programs,), {**options, **launch_options(self.rows * self.columns, rows * block)}

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


def _cut(shape: torch.Size, scale: Tensor) -> _Cut:
    axis, channels = learned_axis(scale), scale.numel()
    if not axis:
        return _Cut(1, math.prod(shape), 1, False)
    inner = math.prod(shape[len(shape) - axis + 1 :])
    if inner == 1:
        return _Cut(math.prod(shape) // channels, channels, channels, True)
    return _Cut(math.prod(shape) // inner, inner, channels, False)


def _run(
    kernel, tensors: list[Tensor], scale: Tensor, offset: Tensor | None, grid: list[int]
) -> None:
    """Runs a kernel on tensors of one shape, and room for sums behind them where it gives some."""
    if not tensors[0].numel():
        return
    cut = _cut(tensors[0].shape, scale)
    programs, options = cut.launch
    with torch.cuda.device_of(tensors[0]):
        kernel[programs](
            *tensors,
            *numbers_of(scale, offset),
            cut.rows,
            cut.columns,
            cut.channels,
            CODE_MIN=grid[0],
            CODE_MAX=grid[1],
            LEVEL_BITS=grid[2],
            OFFSET=offset is not None,
            **options,
        )


def _run_backward(
    kernel, tensors: list[Tensor], scale: Tensor, offset: Tensor | None, grid: list[int]
) -> tuple[Tensor, Tensor]:
    """The same of a kernel that gives sums: gradients of scale and offset."""
    if not tensors[0].numel():
        return zeros_of(scale)
    cut = _cut(tensors[0].shape, scale)
    parts = cut.new_parts(tensors[0])
    _run(kernel, [*tensors, parts], scale, offset, grid)
    with torch.cuda.device_of(parts):
        return cut.totals(parts, scale)


def _like(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def fake_quant(
    x: Tensor, scale: Tensor, offset: Tensor | None, grid: list[int]
) -> tuple[Tensor, Tensor]:
    training_checks.check_quantized(x, scale, offset, grid)
    x_hat, state = _like(x), _like(x, state_dtype(*grid))
    _run(encode_kernel, [x.contiguous(), x_hat, state], scale, offset, grid)
    return x_hat, state


def fake_quant_values(
    state: Tensor, scale: Tensor, offset: Tensor | None, grid: list[int]
) -> Tensor:
    training_checks.check_state(state, grid)
    training_checks.check_learned_grid(state.shape, scale, offset, grid, state.device)
    x_hat = _like(state)
    _run(decode_kernel, [state, x_hat], scale, offset, grid)
    return x_hat


def fake_quant_backward(
    grad: Tensor, state: Tensor, scale: Tensor, offset: Tensor | None, grid: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    training_checks.check_state(state, grid)
    training_checks.check_quantized(grad, scale, offset, grid)
    training_checks.check_same_shape('grad', grad, 'state', state)
    grad_x = _like(grad)
    tensors = [grad.contiguous(), state, grad_x]
    return grad_x, *_run_backward(fake_quant_backward_kernel, tensors, scale, offset, grid)


def gelu_fake_quant(x: Tensor, scale: Tensor, offset: Tensor | None, grid: list[int]) -> Tensor:
    training_checks.check_gelu(x, scale, offset, grid)
    x_hat = _like(x)
    _run(gelu_kernel, [x.contiguous(), x_hat], scale, offset, grid)
    return x_hat


def gelu_fake_quant_backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, grid: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    training_checks.check_gelu(x, scale, offset, grid)
    training_checks.check_same_shape('grad', grad, 'the input', x)
    grad_x, x_hat = _like(x), _like(x)
    tensors = [grad.contiguous(), x.contiguous(), grad_x, x_hat]
    return grad_x, x_hat, *_run_backward(gelu_backward_kernel, tensors, scale, offset, grid)
