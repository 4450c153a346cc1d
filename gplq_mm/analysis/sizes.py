"""Size of a quantized model: bytes of the packed file, mean bits of weights and activations."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ..layers import Compensation
from .sites import operand_quantizers, quant_sites, weighted_sites


def weight_counts(model: nn.Module) -> dict[str, int]:
    """Number of weights of every quantized layer."""
    return {name: site.module.weight.numel() for name, site in weighted_sites(model).items()}


def code_sizes(model: nn.Module, widths: Iterable[int]) -> dict[str, dict[int, int]]:
    """Bytes of every layer's codes in a packed file, by width; 2 and 3 bits take as much as 4."""
    widths = tuple(widths)
    return {
        name: {
            bits: site.weight.spec.with_bits(bits).code_format.bytes(*site.weight.shape)
            for bits in widths
        }
        for name, site in weighted_sites(model).items()
    }


def other_bytes(model: nn.Module) -> int:
    """Bytes of all tensors of a packed file but the codes and the compensations.

    These are group multipliers, row scales, biases, permutations, the grids of activations, and
    what is not quantized.
    """
    total, owned = 0, []
    for site in quant_sites(model).values():
        total += sum(map(_grid_bytes, site.activations.values()))
        if site.weight is not None:
            owned.append(f'{site.path}.')
            rows, columns = site.weight.shape
            blocks = site.weight.spec.code_format.block_size
            groups = 0 if blocks else -(-columns // site.weight.group_size)
            # Float32 scale and bias; two multipliers to a byte.
            total += rows * (8 + (groups + 1) // 2) + columns * (2 if columns <= 2**15 else 4)
        else:
            owned += [f'{site.path}.{operand}.' for operand in site.activations]
    owned += [f'{name}.' for name, m in model.named_modules() if isinstance(m, Compensation)]
    for name, tensor in model.state_dict().items():
        if not name.startswith(tuple(owned)):
            total += tensor.numel() * _stored_width(tensor)
    return total


def _grid_bytes(quantizer: nn.Module) -> int:
    offset = 0 if quantizer.offset is None else 4
    offset += 1 if quantizer.spec.zero_point == 'integer' else 0
    return quantizer.scale.numel() * (4 + offset)


def _stored_width(tensor: Tensor) -> int:
    """Bytes a value: integers are stored in the smallest signed type that holds them."""
    if tensor.dtype not in (torch.int64, torch.int32, torch.int16) or not tensor.numel():
        return tensor.element_size()
    return np.min_scalar_type(min(int(tensor.min()), ~int(tensor.max()), -1)).itemsize


def mean_bits(model: nn.Module, values: Mapping[str, int]) -> dict[str, float]:
    """Mean width of the quantized weights and activations of a model.

    Args:
        model: Quantized model.
        values: ``<layer>.input`` or ``<attention>.q`` ... -> how many values pass through that
            quantizer, of ``activation_statistics``.

    Returns:
        ``weights``, a mean over weights, and ``activations``, a mean over values.
    """
    weights = [(s.weight_bits, s.module.weight.numel()) for s in weighted_sites(model).values()]
    quantizers = operand_quantizers(model).items()
    activations = [(quantizer.spec.bits, values[name]) for name, quantizer in quantizers]
    return {'weights': _mean(weights), 'activations': _mean(activations)}


def _mean(bits_and_counts: list[tuple[int, int]]) -> float:
    total = sum(count for _, count in bits_and_counts)
    return sum(bits * count for bits, count in bits_and_counts) / max(total, 1)
