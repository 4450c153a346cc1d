"""Checks of what the ops are given; each raises ValueError in one sentence.

``csrc/cpu/checks.cpp`` makes the same checks with the same words; a test compares them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..quant.functional import POSITIONS
from ..quant.packing import PANEL

LAYER_FIELDS = (
    'inverse', 'shift', 'weight', 'multiplier', 'position', 'row_scale', 'bias', 'correction',
    'table',
)  # fmt: skip
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_DTYPES = {
    'multiplier': torch.uint8,
    'position': torch.int32,
    'correction': torch.int32,
    'table': torch.uint8,
}
# -8 * 15 is the last product that an int8 holds.
MAX_PACKED_MULTIPLIER = 15
MAX_MULTIPLIER = 127
MAX_CODES = 256
CODE_LIMIT = 2**15


def require(condition: bool, message: str) -> None:
    """Raises ValueError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


def check_tensor(
    name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], shape: Sequence[int], device
) -> None:
    """Checks dtype, device and shape."""
    wanted = ' or '.join(_name(dtype) for dtype in dtypes)
    require(tensor.dtype in dtypes, f'{name} must be {wanted}, got {_name(tensor.dtype)}.')
    require(tensor.device == device, f'{name} must be on {device}, got {tensor.device}.')
    require(
        list(tensor.shape) == list(shape),
        f'{name} must have shape {list(shape)}, got {list(tensor.shape)}.',
    )


def check_codes(grid: Sequence[int]) -> None:
    """Checks that ``grid`` begins with the ends of a range of codes that fit a byte."""
    low, high = grid[0], grid[1]
    require(
        0 <= high - low < MAX_CODES and low >= -CODE_LIMIT and high < CODE_LIMIT,
        f'codes must fit a byte: at most {MAX_CODES} of them within {-CODE_LIMIT}..'
        f'{CODE_LIMIT - 1}, got {low}..{high}.',
    )


def table_shape(table: Tensor, shape: Sequence[int]) -> Sequence[int]:
    """``shape`` for a table of levels, ``(0,)`` where there is none."""
    return (0,) if table.dim() == 1 and not len(table) else shape


def check_table(name: str, table: Tensor, grid: Sequence[int]) -> None:
    """Checks what a table of levels holds, of the right dtype and shape, for a range of codes.

    Values are only looked at on the CPU: elsewhere that would wait for the device.
    """
    if not table.numel():
        return
    low, high, last = grid[0], grid[1], POSITIONS - 1
    require(
        (low, high) == (0, last),
        f'codes must be positions 0..{last} where {name} has levels, got {low}..{high}.',
    )
    if table.device.type == 'cpu':
        _check_range(name, table, 0, last)
        require(
            bool((table[..., 1:] >= table[..., :-1]).all()),
            f'{name} must hold levels that ascend.',
        )


def check_float(x: Tensor) -> None:
    """Checks the dtype of an op's input."""
    wanted = ', '.join(_name(dtype) for dtype in FLOATS)
    require(x.dtype in FLOATS, f'the input must be one of {wanted}, got {_name(x.dtype)}.')


def check_input(x: Tensor, columns: int) -> None:
    """Checks dtype and last axis of an op's input."""
    check_float(x)
    require(x.dim() > 0, 'the input must have at least one axis.')
    require(
        x.shape[-1] == columns,
        f'the input has {x.shape[-1]} columns, the layer takes {columns}.',
    )


def check_quantize(
    x: Tensor, inverse: Tensor, shift: Tensor, grid: Sequence[int], table: Tensor
) -> None:
    """Checks the arguments of ``quantize_codes``."""
    require(len(grid) >= 2, f'grid must be [code_min, code_max, ...], got {len(grid)} integers.')
    check_codes(grid)
    require(x.dim() > 0, 'the input must have at least one axis.')
    check_tensor('inverse', inverse, (torch.float32,), x.shape[-1:], x.device)
    check_tensor('shift', shift, (torch.float32,), x.shape[-1:], x.device)
    check_tensor('table', table, (torch.uint8,), table_shape(table, (POSITIONS,)), x.device)
    check_table('table', table, grid)
    check_input(x, x.shape[-1])


def check_layer(layer: Sequence[Tensor], grid: Sequence[int], device: torch.device) -> None:
    """Checks a packed layer.

    Values of tensors are only looked at on the CPU: elsewhere that would wait for the device.

    Args:
        layer, grid: As in :mod:`.reference`.
        device: Where the tensors must be.
    """
    require(
        len(layer) == len(LAYER_FIELDS),
        f'layer must be the {len(LAYER_FIELDS)} tensors {", ".join(LAYER_FIELDS)}; '
        f'got {len(layer)}.',
    )
    require(
        len(grid) == 3, f'grid must be [code_min, code_max, group_size], got {len(grid)} integers.'
    )
    check_codes(grid)
    group_size = grid[2]
    require(group_size >= 1, f'group_size must be at least 1, got {group_size}.')
    tensors = dict(zip(LAYER_FIELDS, layer, strict=True))
    columns, rows = tensors['inverse'].numel(), tensors['row_scale'].numel()
    require(
        columns > 0 and rows > 0,
        f'a layer needs columns and rows, got {columns} columns and {rows} rows.',
    )
    panels, groups = -(-rows // PANEL), -(-columns // group_size)
    packed = tensors['weight'].dtype == torch.uint8
    shapes = {
        'inverse': (columns,),
        'shift': (columns,),
        'weight': (panels, columns, PANEL // 2 if packed else PANEL),
        'multiplier': (panels, groups, PANEL),
        'position': (columns,),
        'row_scale': (rows,),
        'bias': (rows,),
        'correction': (rows,),
        'table': table_shape(tensors['table'], (POSITIONS,)),
    }
    for name, tensor in tensors.items():
        dtypes = (
            (torch.uint8, torch.int8) if name == 'weight' else (_DTYPES.get(name, torch.float32),)
        )
        check_tensor(name, tensor, dtypes, shapes[name], device)
    check_table('table', tensors['table'], grid)
    widest = grid[1] - grid[0]
    require(
        widest * 128 * columns < 2**31,
        f'sums over {columns} columns of codes up to {widest} can exceed int32.',
    )
    if device.type == 'cpu':
        limit = MAX_PACKED_MULTIPLIER if packed else MAX_MULTIPLIER
        _check_range('position', tensors['position'], 0, columns - 1)
        _check_range('multiplier', tensors['multiplier'], 1, limit)


def _check_range(name: str, tensor: Tensor, low: int, high: int) -> None:
    least, most = (int(value) for value in tensor.aminmax())
    require(
        low <= least and most <= high,
        f'{name} must lie in {low}..{high}, got {least}..{most}.',
    )


def check_norm(norm_weight: Tensor, norm_bias: Tensor, columns: int, device) -> None:
    """Checks the parameters of a LayerNorm over ``columns``."""
    check_tensor('norm_weight', norm_weight, FLOATS, (columns,), device)
    check_tensor('norm_bias', norm_bias, FLOATS, (columns,), device)


def check_residual(x: Tensor, residual: Tensor, rows: int) -> None:
    """Checks what is added to a layer's output of ``rows`` columns for the input ``x``."""
    check_tensor('residual', residual, FLOATS, (*x.shape[:-1], rows), x.device)


def check_gamma(gamma: Tensor | None, rows: int, device) -> None:
    """Checks the factors of a layer's ``rows`` output columns."""
    if gamma is not None:
        check_tensor('gamma', gamma, FLOATS, (rows,), device)


def check_mlp(first_rows: int, second_columns: int, columns: int, second_rows: int) -> None:
    """Checks that two layers follow each other and lead back to ``columns``."""
    require(
        first_rows == second_columns,
        f'the first layer gives {first_rows} columns, the second takes {second_columns}.',
    )
    require(
        second_rows == columns,
        f'the second layer gives {second_rows} columns, the input has {columns}.',
    )


def check_conv(x: Tensor, columns: int, geometry: Sequence[int]) -> None:
    """Checks the input and the geometry of a convolution."""
    require(
        len(geometry) == 8,
        'geometry must be kernel, stride, padding, dilation (height, width each), '
        f'got {len(geometry)} integers.',
    )
    kernel, stride, padding, dilation = (geometry[i : i + 2] for i in (0, 2, 4, 6))
    require(
        min(*kernel, *stride, *dilation) >= 1 and min(padding) >= 0,
        'kernel, stride and dilation must be at least 1 and padding at least 0, '
        f'got {list(geometry)}.',
    )
    check_float(x)
    require(x.dim() == 4, f'the input must be (N, C, H, W), got shape {list(x.shape)}.')
    taken = x.shape[1] * kernel[0] * kernel[1]
    require(
        taken == columns,
        f'{x.shape[1]} channels under a kernel of {kernel[0]} x {kernel[1]} are {taken} columns, '
        f'the layer takes {columns}.',
    )
    spans = [dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
    sizes = [x.shape[2 + i] + 2 * padding[i] for i in (0, 1)]
    require(
        sizes[0] >= spans[0] and sizes[1] >= spans[1],
        f'the kernel spans {spans[0]} x {spans[1]}, the padded input is {sizes[0]} x {sizes[1]}.',
    )
