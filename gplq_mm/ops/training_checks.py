"""Checks of what the ops of training are given; each raises ValueError, which says what is wrong.

Those of the C++ kernels use the same words.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..quant.code_state import state_dtype
from ..quant.functional import POSITIONS
from .checks import check_codes, check_float, check_table, check_tensor, require, table_shape

MAX_LEVEL_BITS = 14
MAX_STATES = 2**16


def check_learned_grid(
    shape: Sequence[int],
    scale: Tensor,
    offset: Tensor | None,
    table: Tensor,
    grid: Sequence[int],
    device: torch.device,
) -> None:
    """Checks scale, offset, table and grid against the shape of what they quantize."""
    require(len(shape) > 0, 'the input must have at least one axis.')
    require(
        len(grid) == 3, f'grid must be [code_min, code_max, level_bits], got {len(grid)} integers.'
    )
    check_codes(grid)
    count = grid[1] - grid[0] + 1
    require(
        1 <= grid[2] <= MAX_LEVEL_BITS and count << grid[2] <= MAX_STATES,
        f'code and level must fit two bytes, got {count} codes and {grid[2]} bits of level.',
    )
    check_tensor('scale', scale, (torch.float32,), scale.shape, device)
    if offset is not None:
        check_tensor('offset', offset, (torch.float32,), scale.shape, device)
    long = [axis for axis in range(1, scale.dim() + 1) if scale.shape[-axis] != 1]
    fits = not long or (
        len(long) == 1 and long[0] <= len(shape) and scale.shape[-long[0]] == shape[-long[0]]
    )
    require(
        fits,
        f'scale of shape {list(scale.shape)} must have at most one axis longer than 1, as long as '
        f'that of the input {list(shape)}.',
    )
    has_heads = table.dim() > 1 and len(shape) > 2
    wanted = (shape[-3], POSITIONS) if has_heads else (POSITIONS,)
    check_tensor('table', table, (torch.uint8,), table_shape(table, wanted), device)
    check_table('table', table, grid)


def check_quantized(
    x: Tensor, scale: Tensor, offset: Tensor | None, table: Tensor, grid: Sequence[int]
) -> None:
    """Checks what is quantized, or its gradient, and its grid."""
    check_float(x)
    check_learned_grid(x.shape, scale, offset, table, grid, x.device)


def check_gelu(
    x: Tensor, scale: Tensor, offset: Tensor | None, table: Tensor, grid: Sequence[int]
) -> None:
    """Checks the input of a GELU and the grid of its output."""
    check_quantized(x, scale, offset, table, grid)
    require(scale.numel() in (1, *scale.shape[-1:]), 'scale must have one number, or one a column.')
    require(table.dim() == 1, 'the output of a GELU has one table.')


def check_state(state: Tensor, grid: Sequence[int]) -> None:
    """Checks dtype and memory of a state."""
    require(
        len(grid) == 3, f'grid must be [code_min, code_max, level_bits], got {len(grid)} integers.'
    )
    check_tensor('state', state, (state_dtype(*grid),), state.shape, state.device)
    require(state.is_contiguous(), 'state must be contiguous.')


def check_same_shape(first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Checks that two tensors have one shape."""
    require(a.shape == b.shape, f'{first} has shape {list(a.shape)}, {second} {list(b.shape)}.')


def check_scores(
    scores: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: Tensor,
    offset: Tensor | None,
    table: Tensor,
    grid: Sequence[int],
) -> None:
    """Checks the arguments of a softmax."""
    require(scores.dim() == 4, f'scores must have 4 axes, got {scores.dim()}.')
    batch, heads, queries, keys = scores.shape
    check_tensor('scores', scores, (torch.float32,), scores.shape, scores.device)
    require(scores.is_contiguous(), 'scores must be contiguous.')
    if bias is not None:
        check_tensor('bias', bias, (torch.float32,), (heads, queries, keys), scores.device)
    if mask is not None:
        windows = mask.shape[0]
        shape = (windows, queries, keys)
        check_tensor('mask', mask, (torch.float32,), shape, scores.device)
        require(
            windows > 0 and batch % windows == 0,
            f'the batch of {batch} must be a multiple of the {windows} masks.',
        )
    check_learned_grid(scores.shape, scale, offset, table, grid, scores.device)
    require(scale.numel() == 1 or scale.shape[-1] == 1, 'scores have no scale a column.')


def check_score_gradient(grad: Tensor, scores: Tensor) -> None:
    """Checks the gradient that a softmax replaces in place."""
    check_tensor('grad', grad, (torch.float32,), scores.shape, scores.device)
    require(grad.is_contiguous(), 'grad must be contiguous.')
