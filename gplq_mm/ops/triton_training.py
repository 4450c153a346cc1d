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
from .triton_common import count_tables, launch_options, learned_axis, numbers_of, zeros_of
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
    """How a tensor is worked on: ``rows`` of ``columns``, where its grids lie, and its tables.

    A grid and a table last for ``inner`` and ``table_rows`` rows.
    """

    rows: int
    columns: int
    channels: int
    per_column: bool
    inner: int = 1
    tables: int = 1
    table_rows: int = 1

    @property
    def numbers(self) -> tuple[int, ...]:
        """What kernels are told of it."""
        return (*self[:3], *self[4:])

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
        by_channel = parts.view(2, -1, self.channels, self.inner).sum((1, 3))
        return by_channel[0].view(scale.shape), by_channel[1].view(scale.shape)


def _cut(shape: torch.Size, scale: Tensor, table: Tensor) -> _Cut:
    axis, channels, size = learned_axis(scale), scale.numel(), math.prod(shape)
    tables = count_tables(table)
    # Axes at the end that make a row, for all of which a grid and a table, that of a head
    # (..., N, d), last.
    whole = max(axis - 1, 1) if axis else len(shape)
    if table.dim() > 1:
        whole = min(whole, 2)
    table_rows = math.prod(shape[-2 : len(shape) - whole]) if table.dim() > 1 else 1
    columns = math.prod(shape[len(shape) - whole :])
    if axis == 1 or (axis and columns == 1 and table.dim() == 1):
        return _Cut(size // channels, channels, channels, True, 1, tables, table_rows)
    inner = math.prod(shape[len(shape) - axis + 1 : len(shape) - whole]) if axis else 1
    return _Cut(size // columns, columns, channels, False, inner, tables, table_rows)


def _run(
    kernel,
    tensors: list[Tensor],
    scale: Tensor,
    offset: Tensor | None,
    table: Tensor,
    grid: list[int],
) -> None:
    """Runs a kernel on tensors of one shape, and room for sums behind them where it gives some."""
    if not tensors[0].numel():
        return
    cut = _cut(tensors[0].shape, scale, table)
    programs, options = cut.launch
    with torch.cuda.device_of(tensors[0]):
        kernel[programs](
            *tensors,
            *numbers_of(scale, offset, table),
            *cut.numbers,
            CODE_MIN=grid[0],
            CODE_MAX=grid[1],
            LEVEL_BITS=grid[2],
            OFFSET=offset is not None,
            TABLE=table.numel() > 0,
            **options,
        )


def _run_backward(
    kernel, tensors: list[Tensor], scale: Tensor, offset: Tensor | None, table: Tensor, grid
) -> tuple[Tensor, Tensor]:
    """The same of a kernel that gives sums: gradients of scale and offset."""
    if not tensors[0].numel():
        return zeros_of(scale)
    cut = _cut(tensors[0].shape, scale, table)
    parts = cut.new_parts(tensors[0])
    _run(kernel, [*tensors, parts], scale, offset, table, grid)
    with torch.cuda.device_of(parts):
        return cut.totals(parts, scale)


def _like(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


# A quantizer is scale, offset, table and grid, as training_reference says.


def fake_quant(x: Tensor, *quantizer) -> tuple[Tensor, Tensor]:
    training_checks.check_quantized(x, *quantizer)
    x_hat, state = _like(x), _like(x, state_dtype(*quantizer[3]))
    _run(encode_kernel, [x.contiguous(), x_hat, state], *quantizer)
    return x_hat, state


def fake_quant_values(state: Tensor, *quantizer) -> Tensor:
    training_checks.check_state(state, quantizer[3])
    training_checks.check_learned_grid(state.shape, *quantizer, state.device)
    x_hat = _like(state)
    _run(decode_kernel, [state, x_hat], *quantizer)
    return x_hat


def fake_quant_backward(grad: Tensor, state: Tensor, *quantizer) -> tuple[Tensor, Tensor, Tensor]:
    training_checks.check_state(state, quantizer[3])
    training_checks.check_quantized(grad, *quantizer)
    training_checks.check_same_shape('grad', grad, 'state', state)
    grad_x = _like(grad)
    tensors = [grad.contiguous(), state, grad_x]
    return grad_x, *_run_backward(fake_quant_backward_kernel, tensors, *quantizer)


def gelu_fake_quant(x: Tensor, *quantizer) -> Tensor:
    training_checks.check_gelu(x, *quantizer)
    x_hat = _like(x)
    _run(gelu_kernel, [x.contiguous(), x_hat], *quantizer)
    return x_hat


def gelu_fake_quant_backward(
    grad: Tensor, x: Tensor, *quantizer
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    training_checks.check_gelu(x, *quantizer)
    training_checks.check_same_shape('grad', grad, 'the input', x)
    grad_x, x_hat = _like(x), _like(x)
    tensors = [grad.contiguous(), x.contiguous(), grad_x, x_hat]
    return grad_x, x_hat, *_run_backward(gelu_backward_kernel, tensors, *quantizer)
