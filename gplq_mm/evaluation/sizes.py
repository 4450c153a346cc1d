"""Size of a quantized model: bytes of the packed file, mean bits of weights and activations."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..layers import Compensation
from ..quant.packing import code_bytes
from .sites import operand_quantizers, quant_sites

__all__ = ['code_sizes', 'mean_bits', 'other_bytes', 'weight_counts']


def weight_counts(model: nn.Module) -> dict[str, int]:
    """Number of weights of every quantized layer."""
    return {
        name: site.module.weight.numel()
        for name, site in quant_sites(model).items()
        if site.weight is not None
    }


def code_sizes(model: nn.Module, widths: Iterable[int]) -> dict[str, dict[int, int]]:
    """Bytes of every layer's codes in a packed file, by width; 2 and 3 bits take as much as 4."""
    widths = tuple(widths)
    return {
        name: {bits: code_bytes(*site.weight.shape, bits) for bits in widths}
        for name, site in quant_sites(model).items()
        if site.weight is not None
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
            groups = -(-columns // site.weight.group_size)
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
    """Bytes a value: integers are stored in the smallest type that holds them."""
    if tensor.dtype not in (torch.int64, torch.int32, torch.int16) or not tensor.numel():
        return tensor.element_size()
    low, high = int(tensor.min()), int(tensor.max())
    fitting = [
        dtype.itemsize
        for dtype in (torch.int8, torch.int16, torch.int32)
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max
    ]
    return min([*fitting, tensor.element_size()])


def mean_bits(model: nn.Module, values: Mapping[str, int] | None = None) -> dict[str, float]:
    """Mean width of the quantized weights and activations of a model.

    Args:
        model: Quantized model.
        values: ``<layer>.input`` or ``<attention>.q`` ... -> how many values pass through that
            quantizer, of ``activation_statistics``. None leaves activations out.

    Returns:
        ``weights``, a mean over weights, and ``activations``, a mean over values.
    """
    sites = quant_sites(model)
    counts = weight_counts(model)
    result = {'weights': _mean({name: sites[name].weight_bits for name in counts}, counts)}
    if values is not None:
        quantizers = operand_quantizers(model)
        result['activations'] = _mean({key: q.spec.bits for key, q in quantizers.items()}, values)
    return result


def _mean(bits: Mapping[str, int], counts: Mapping[str, int]) -> float:
    total = sum(counts[name] for name in bits)
    return sum(bits[name] * counts[name] for name in bits) / max(total, 1)
