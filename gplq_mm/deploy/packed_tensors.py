"""What a packed file holds of every quantized module, written and read side by side.

Layer ``name``: ``name.codes`` (4-bit codes, two to a byte, uint8 ``(N, ceil(K / 2))``; wider ones
int8 ``(N, K)``), ``name.multiplier`` (two to a byte, uint8 ``(N, ceil(G / 2))``),
``name.row_scale`` and ``name.bias`` float32 ``(N,)``, ``name.permutation`` int16 or int32
``(K,)``, and the grid of its input under ``name.input.``. An attention has four grids,
``name.q.`` to ``name.probs.``. A grid is ``scale`` and ``offset`` float32 or ``zero_point``
uint8, and ``levels`` uint8 ``(1 or heads, n)`` where its codes stand for chosen levels, of which
there are at most as many as codes; what each position is rounded to follows from them. A block's
compensation is ``name.compensation.weight`` and ``.bias``, float16.
"""

from collections.abc import Mapping
from typing import Any, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from ..errors import SettingError
from ..layers import (
    DeployError,
    Int4Attention,
    Int4WeightLayer,
    QuantAttention,
    QuantWeightLayer,
    build_compensation,
)
from ..layers.attention import OPERANDS
from ..layers.replace import kind_of
from ..quant import (
    ActQuantizer,
    QuantizedWeight,
    QuantState,
    WeightQuantizer,
)
from ..quant.levels import check_levels
from ..quant.packing import (
    pack_nibbles,
    unpack_multiplier_panels,
    unpack_nibbles,
    unpack_panels,
)
from ..quant.spec import completed

# A multiplier 1..15 minus this is a 4-bit code.
MULTIPLIER_BIAS = 8


class TensorTable:
    """Tensors of a file, taken out one by one and checked.

    Args:
        tensors: By name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = dict(tensors)

    def take(self, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
        """Removes and returns a tensor.

        Raises:
            DeployError: If it is absent, of another shape or type, or not finite.
        """
        tensor = self.tensors.pop(name, None)
        if tensor is None:
            raise DeployError(f'the file lacks the tensor {name}; deploy the checkpoint again.')
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype not in dtypes:
            expected = ' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)
            raise DeployError(
                f'{name} is {str(tensor.dtype).removeprefix("torch.")} {tuple(tensor.shape)}, the '
                f'architecture needs {expected} {tuple(shape)}; deploy the checkpoint again.'
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DeployError(f'{name} holds NaN or infinity; deploy the checkpoint again.')
        return tensor


def _is_of(value: Any, hint: Any) -> bool:
    """Whether JSON data is of a field's type."""
    if get_origin(hint) is tuple:
        return isinstance(value, list) and all(_is_of(item, float) for item in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


def spec_of(cls: type, data: Any, where: str) -> Any:
    """Spec of a class from a header, or DeployError."""
    hints = get_type_hints(cls)
    fields = completed(cls, data) if isinstance(data, Mapping) else {}
    if set(fields) != set(hints) or not all(_is_of(fields[key], hints[key]) for key in hints):
        raise DeployError(
            f'{where}: the header does not describe the quantizer; deploy the checkpoint again.'
        )
    try:
        spec = cls(**fields)
        spec.code_format  # noqa: B018 (checks what does not go with it)
        return spec
    except (TypeError, ValueError) as error:
        raise DeployError(f'{where}: {error}') from error


# -- grids ------------------------------------------------------------------------------------


def _grid_tensors(quantizer: ActQuantizer) -> dict[str, Tensor]:
    scale, _ = quantizer.grid()
    tensors = {'scale': scale.detach().float()}
    if quantizer.offset is not None:
        tensors['offset'] = quantizer.offset.detach().float()
    if quantizer.spec.zero_point == 'integer':
        tensors['zero_point'] = quantizer.zero_point.to(torch.uint8)
    if quantizer.levels is not None:
        tensors['levels'] = quantizer.levels
    # A scale may be the parameter itself, which goes on changing elsewhere.
    return {key: value.clone() for key, value in tensors.items()}


def _fill_grid(quantizer: ActQuantizer, prefix: str, table: TensorTable) -> None:
    shape = tuple(quantizer.scale.shape)
    state = {
        'scale': table.take(f'{prefix}.scale', shape, torch.float32),
        'state_code': torch.tensor(int(QuantState.FROZEN), dtype=torch.uint8),
    }
    if not bool((state['scale'] > 0).all()):
        raise DeployError(f'{prefix}.scale must be positive; deploy the checkpoint again.')
    if quantizer.offset is not None:
        state['offset'] = table.take(f'{prefix}.offset', shape, torch.float32)
    if quantizer.spec.zero_point == 'integer':
        zero_point = table.take(f'{prefix}.zero_point', shape, torch.uint8)
        if zero_point.numel() and int(zero_point.max()) > quantizer.qmax:
            raise DeployError(f'{prefix}.zero_point is no code; deploy the checkpoint again.')
        state['zero_point'] = zero_point.float()
    if quantizer.levels is not None:
        state['levels'] = _take_levels(f'{prefix}.levels', quantizer, table)
    quantizer.load_state_dict(state)


def _take_levels(name: str, quantizer: ActQuantizer, table: TensorTable) -> Tensor:
    """Codebook of a file; it may have fewer levels than there are codes."""
    rows, count = quantizer.levels.shape
    given = table.tensors.get(name)
    if given is not None and given.dim() == 2:
        count = given.shape[1]
    levels = table.take(name, (rows, count), torch.uint8)
    try:
        check_levels(levels, quantizer.spec.bits)
    except SettingError as error:
        raise DeployError(f'{name}: {error} Deploy the checkpoint again.') from error
    return levels


# -- layers -----------------------------------------------------------------------------------


def layer_record(
    name: str, layer: QuantWeightLayer | Int4WeightLayer
) -> tuple[dict, dict[str, Tensor]]:
    """Header entry and tensors of a layer after Stage 2, or of its packed twin."""
    if isinstance(layer, Int4WeightLayer):
        entry, grid = _recalled(layer)
        rows = len(layer.row_scale)
        # A family may hide the name: transformers asks a layer for the dtype of its weight.
        codes = unpack_panels(layer._buffers['weight'], rows)
        multiplier = unpack_multiplier_panels(layer.multiplier, rows)
        permutation, row_scale, bias = layer.position.argsort(), layer.row_scale, layer.bias
    else:
        value = layer.weight_quantizer.value
        entry, grid = layer_origin(layer)
        codes, multiplier, permutation = value.codes, value.multiplier, value.permutation
        row_scale, bias = value.row_scale, layer.weight_quantizer.bias
    narrow = torch.int16 if codes.shape[1] <= 2**15 else torch.int32
    factors = multiplier.to(torch.int8) - MULTIPLIER_BIAS
    tensors = {
        f'{name}.codes': pack_nibbles(codes) if entry['weight']['bits'] <= 4 else codes,
        f'{name}.multiplier': pack_nibbles(factors),
        f'{name}.row_scale': row_scale,
        f'{name}.permutation': permutation.to(narrow),
        f'{name}.bias': bias,
        **{f'{name}.input.{key}': value for key, value in grid.items()},
    }
    return entry, tensors


def remember(packed: nn.Module, entry: dict, grids: dict[str, Tensor]) -> None:
    """Gives a packed module what a file says of it and it cannot tell itself: the header entry, and
    the grids, as buffers beside its state."""
    packed.origin = (entry, list(grids))
    for key, value in grids.items():
        packed.register_buffer(_buffer_of(key), value, persistent=False)


def _recalled(packed: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    entry, keys = packed.origin
    return entry, {key: getattr(packed, _buffer_of(key)) for key in keys}


def _buffer_of(key: str) -> str:
    return f'origin_{key.replace(".", "_")}'


def layer_origin(layer: QuantWeightLayer) -> tuple[dict, dict[str, Tensor]]:
    """What a packed layer cannot tell of itself: header entry, and the grid of its input."""
    entry = {
        'kind': kind_of(layer),
        'activation': _act_entry(layer.act_quantizer),
        'weight': layer.weight_quantizer.spec.to_dict(),
    }
    return entry, _grid_tensors(layer.act_quantizer)


def fill_layer(name: str, layer: QuantWeightLayer, table: TensorTable) -> None:
    """Gives a fresh quantized layer the integers of a file.

    Raises:
        DeployError: If a tensor is absent, of another shape or type, or out of range.
    """
    quantizer: WeightQuantizer = layer.weight_quantizer
    rows, columns = quantizer.shape
    group = quantizer.group_size
    groups = -(-columns // group)
    if quantizer.spec.bits <= 4:
        packed = table.take(f'{name}.codes', (rows, (columns + 1) // 2), torch.uint8)
        codes = unpack_nibbles(packed, columns)
    else:
        codes = table.take(f'{name}.codes', (rows, columns), torch.int8)
    packed = table.take(f'{name}.multiplier', (rows, (groups + 1) // 2), torch.uint8)
    multiplier = unpack_nibbles(packed, groups).to(torch.int16) + MULTIPLIER_BIAS
    largest = quantizer.spec.max_multiplier
    if multiplier.numel() and not 1 <= int(multiplier.min()) <= int(multiplier.max()) <= largest:
        raise DeployError(f'{name}.multiplier leaves 1 to {largest}; deploy the checkpoint again.')
    permutation = table.take(f'{name}.permutation', (columns,), torch.int16, torch.int32).long()
    if not torch.equal(permutation.sort().values, torch.arange(columns)):
        raise DeployError(
            f'{name}.permutation does not name every column once; deploy the checkpoint again.'
        )
    value = QuantizedWeight(
        codes=codes,
        row_scale=table.take(f'{name}.row_scale', (rows,), torch.float32),
        multiplier=multiplier.to(torch.uint8),
        permutation=permutation,
        group_size=group,
    )
    _fill_grid(layer.act_quantizer, f'{name}.input', table)
    try:
        quantizer.set(value, table.take(f'{name}.bias', (rows,), torch.float32))
    except ValueError as error:
        raise DeployError(f'{error} Deploy the checkpoint again.') from error


def _act_entry(quantizer: ActQuantizer) -> dict:
    """Spec of a quantizer; integers, or levels, of any kind are plain ones now that it is
    frozen."""
    entry = quantizer.spec.to_dict()
    if not quantizer.format.is_integer_product:
        return entry
    return {**entry, 'format': 'levels' if quantizer.format.has_levels else 'integer'}


# -- attention --------------------------------------------------------------------------------


def attention_record(attention: QuantAttention | Int4Attention) -> tuple[dict, dict[str, Tensor]]:
    """Header entry (operand -> spec or None) and grids of an attention, by operand."""
    if isinstance(attention, Int4Attention):
        return _recalled(attention)
    entry: dict[str, dict | None] = {}
    tensors: dict[str, Tensor] = {}
    for operand in OPERANDS:
        quantizer = getattr(attention, operand)
        if isinstance(quantizer, ActQuantizer):
            entry[operand] = _act_entry(quantizer)
            grid = _grid_tensors(quantizer).items()
            tensors.update({f'{operand}.{key}': value for key, value in grid})
        else:
            entry[operand] = None
    return entry, tensors


def fill_attention(name: str, attention: QuantAttention, table: TensorTable) -> None:
    """Gives a fresh attention the grids of a file, or raises DeployError."""
    for operand in OPERANDS:
        quantizer = getattr(attention, operand)
        if isinstance(quantizer, ActQuantizer):
            _fill_grid(quantizer, f'{name}.{operand}', table)


# -- compensation -----------------------------------------------------------------------------


def compensation_record(name: str, compensation: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    """Header entry and tensors of a fitted compensation of block ``name``."""
    entry = {'type': type(compensation).__name__, 'axis': compensation.axis}
    prefix = f'{name}.compensation'
    return entry, {
        f'{prefix}.{key}': getattr(compensation, key) for key in compensation.buffers_of_map
    }


def channels_of(block: nn.Module) -> tuple[int, int]:
    """Channels into and out of a block: of its first and of its last layer."""
    layers = [layer for layer in block.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    if not layers:
        raise DeployError('a compensation needs a block with layers; deploy the checkpoint again.')
    first, last = layers[0], layers[-1]
    return (
        first.in_features if isinstance(first, nn.Linear) else first.in_channels,
        last.out_features if isinstance(last, nn.Linear) else last.out_channels,
    )


def fill_compensation(name: str, block: nn.Module, entry: Any, table: TensorTable) -> nn.Module:
    """Compensation of a file for ``block``; call it before the block's layers are packed.

    Raises:
        DeployError: For an unknown type, or tensors that do not fit the block.
    """
    types = ('QwT', 'QwTv2')
    if not isinstance(entry, Mapping) or entry.get('type') not in types:
        raise DeployError(f'{name}: the compensation is of none of the types {", ".join(types)}.')
    if entry.get('axis') not in (-1, 1):
        raise DeployError(f'{name}: the compensation has axis {entry.get("axis")}, not -1 or 1.')
    compensation = build_compensation({'type': entry['type']}, entry['axis'])
    inputs, outputs = channels_of(block)
    shapes = {'QwT': (outputs, inputs), 'QwTv2': (outputs,)}
    prefix = f'{name}.compensation'
    compensation.weight = table.take(f'{prefix}.weight', shapes[entry['type']], torch.float16)
    compensation.bias = table.take(f'{prefix}.bias', (outputs,), torch.float16)
    return compensation
