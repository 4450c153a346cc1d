"""What an activation quantizer does to what passes through it: clip rate, scale, SQNR."""

import torch
from torch import Tensor

from ..quant import ActQuantizer
from .error_sums import decibels

TINY_POWER = 1e-30


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
