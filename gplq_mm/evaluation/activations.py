"""What activation quantizers do to what passes through them: clip rate, scales, SQNR."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import all_reduce_sum
from ..layers import quantizers_disabled
from ..quant import ActQuantizer
from .error_sums import decibels
from .sites import operand_quantizers

__all__ = [
    'activation_statistics',
    'quantizer_statistics',
    'quantizer_sums',
    'scale_histogram',
]

TINY_POWER = 1e-30
HISTOGRAM_BINS = 40


@torch.no_grad()
def quantizer_sums(quantizer: ActQuantizer, x: Tensor, x_hat: Tensor) -> Tensor:
    """What adds up over inputs and ranks to :func:`quantizer_statistics`.

    Args:
        quantizer: A calibrated quantizer.
        x: Its input.
        x_hat: Its output for ``x``.

    Returns:
        Number of clipped values, power of noise and signal, number of values; float64 ``(4,)``, on
        the CPU.
    """
    x, x_hat = x.float(), x_hat.float()
    return torch.stack(
        (
            quantizer.clips(x).sum().double(),
            (x - x_hat).square().sum(dtype=torch.float64),
            x.square().sum(dtype=torch.float64),
            torch.tensor(float(x.numel()), dtype=torch.float64, device=x.device),
        )
    ).cpu()


@torch.no_grad()
def quantizer_statistics(quantizer: ActQuantizer, sums: Tensor) -> dict[str, float]:
    """Clip rate, mean scale and SQNR (dB) of one quantizer. The SQNR is finite even without noise,
    for curves.

    Args:
        quantizer: A calibrated quantizer.
        sums: Of :func:`quantizer_sums`, added up.
    """
    clipped, noise, signal, count = sums.tolist()
    count = max(count, 1.0)
    floor = TINY_POWER * count
    return {
        'clip_rate': clipped / count,
        'scale': float(quantizer.grid()[0].mean()),
        'sqnr_db': decibels(max(signal, floor), max(noise, floor)),
    }


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
    scale = quantizer.grid()[0].detach().double().flatten().cpu()
    points = torch.quantile(scale, torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64))
    names = ('smallest', 'first_quartile', 'median', 'third_quartile', 'largest')
    return {
        'bits': quantizer.spec.bits,
        'clip_rate': clipped / max(count, 1.0),
        'sqnr_db': decibels(signal, noise),
        'values': int(count),
        'scale': {
            'number': scale.numel(), **dict(zip(names, points.tolist(), strict=True))
        },
    }  # fmt: skip


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
        scale = quantizer.grid()[0].detach().double().flatten().cpu()
        by_operand.setdefault(name.rpartition('.')[2], []).append(scale)
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
