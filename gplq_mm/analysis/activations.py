"""Statistics of all activation quantizers of a model: clip rate, scales, SQNR."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import all_reduce_sum
from ..evaluation import decibels, quantizer_sums
from ..layers import quantizers_disabled
from ..quant import ActQuantizer
from .sites import operand_quantizers

HISTOGRAM_BINS = 40
QUARTILES = ('smallest', 'first_quartile', 'median', 'third_quartile', 'largest')


@torch.no_grad()
def activation_statistics(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], Any]
) -> dict[str, dict]:
    """Statistics of all activation quantizers on the inputs that they have in the float model.

    Args:
        model: Quantized and calibrated model in eval mode.
        batches: This rank's images; batches may differ in size.
        forward: Runs the model on a batch.

    Returns:
        ``<layer>.input`` or ``<attention>.q``, ``.k``, ``.v``, ``.probs`` -> ``bits``;
        ``clip_rate``, share of values further than half a step outside the grid; ``sqnr_db``
        (None without signal or noise); ``values``, how many passed through; ``scale``: number,
        smallest, quartiles and largest of its scales, in units of the activation.

    Raises:
        NotCalibratedError: If a quantizer has no scale.
    """
    quantizers = operand_quantizers(model)
    sums = {name: torch.zeros(4, dtype=torch.float64) for name in quantizers}
    with quantizers_disabled(model), ExitStack() as stack:
        for name, quantizer in quantizers.items():

            def see(module: ActQuantizer, args: tuple, _output: Tensor, name: str = name) -> None:
                module.enabled = True
                sums[name] += quantizer_sums(module, args[0], module.forward(args[0]))
                module.enabled = False

            stack.callback(quantizer.register_forward_hook(see).remove)
        for batch in batches:
            forward(batch)
    return {name: _describe(quantizers[name], value) for name, value in sums.items()}


def _describe(quantizer: ActQuantizer, sums: Tensor) -> dict:
    clipped, noise, signal, count = all_reduce_sum(sums).tolist()
    scale = _scales(quantizer)
    points = torch.quantile(scale, torch.linspace(0, 1, 5, dtype=torch.float64)).tolist()
    return {
        'bits': quantizer.spec.bits,
        'clip_rate': clipped / max(count, 1.0),
        'sqnr_db': decibels(signal, noise),
        'values': int(count),
        'scale': {'number': scale.numel(), **dict(zip(QUARTILES, points, strict=True))},
    }


def _scales(quantizer: ActQuantizer) -> Tensor:
    return quantizer.grid()[0].detach().double().flatten().cpu()


@torch.no_grad()
def scale_histogram(model: nn.Module) -> dict:
    """Histogram of the scales of all activation quantizers on a logarithmic axis.

    Args:
        model: Quantized and calibrated model.

    Returns:
        ``edges`` (bins + 1, in units of the activation) and ``counts``: operand (``'input'`` of a
        layer; ``'q'``, ``'k'``, ``'v'``, ``'probs'``) -> how many scales lie in each bin.
    """
    by_operand: dict[str, list[Tensor]] = {}
    for name, quantizer in operand_quantizers(model).items():
        by_operand.setdefault(name.rpartition('.')[2], []).append(_scales(quantizer))
    scales = {operand: torch.cat(parts).log10() for operand, parts in by_operand.items()}
    low = min(float(values.min()) for values in scales.values())
    high = max(float(values.max()) for values in scales.values())
    # Equal scales still make a bin of some width.
    high = max(high, low + 1e-3)
    edges = torch.linspace(low, high, HISTOGRAM_BINS + 1, dtype=torch.float64)
    counts = {
        operand: torch.histc(values, HISTOGRAM_BINS, low, high).to(torch.int64).tolist()
        for operand, values in scales.items()
    }
    return {'edges': (10**edges).tolist(), 'counts': counts}
