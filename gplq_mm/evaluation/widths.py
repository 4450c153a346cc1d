"""Rounding error of weights and activations at other widths than the model's own.

The effect of a layer on the network is measured at one width (:mod:`.sensitivity`). For small
errors it is proportional to the power of the rounding error, which is cheap to measure at every
width: from the weight itself, and from a sample of the activations.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import all_reduce_sum
from ..layers import quantizers_disabled
from ..quant import ActQuantizer
from ..quant.observers import by_channel
from ..quant.quantizers import build_act_quantizer
from .sites import Site, operand_quantizers, quant_sites

__all__ = ['activation_noise', 'weight_noise']

CHANNELS = 64
VALUES_PER_CHANNEL = 2048
# A histogram of the sample needs no more bins than that of 4 bits has.
BINS = 512


@torch.no_grad()
def weight_noise(
    model: nn.Module,
    widths: Iterable[int],
    method: Callable,
    step: Callable[[], Any] = lambda: None,
) -> dict[str, dict[int, float]]:
    """Squared rounding error of every weight at several widths, relative to the weight's square.

    In the folded layout both are those of the folded weight, whose columns meet codes of about
    the same spread.

    Args:
        model: Quantized and calibrated model.
        widths: Bits, 2 to 8. The layer's own width is added to them.
        method: Weight PTQ method that needs no statistics, as in ``round_weights``.
        step: Called after every layer.

    Returns:
        Name of the layer -> bits -> error.
    """
    result: dict[str, dict[int, float]] = {}
    for name, site in quant_sites(model).items():
        if site.weight is None:
            continue
        spec = site.weight.spec
        weight, permutation = site.module.foldable()
        power = float(weight.double().square().sum())
        result[name] = {}
        for bits in sorted({*widths, spec.bits}):
            value = method(weight, replace(spec, bits=bits), permutation, None)
            error = (value.dequantize() - weight).double().square().sum()
            result[name][bits] = float(error) / max(power, 1e-30)
        step()
    return result


@torch.no_grad()
def activation_noise(
    model: nn.Module,
    batch: Any,
    forward: Callable[[Any], Any],
    widths: Iterable[int],
    step: Callable[[], Any] = lambda: None,
) -> dict[str, dict[int, float]]:
    """Squared rounding error of activations at several widths, relative to their square.

    At every width a quantizer of the same kind is calibrated anew, on a sample of the channels
    and values of one batch. What counts is the ratio between two widths.

    Args:
        model: Quantized and calibrated model in eval mode.
        batch: This rank's images.
        forward: Runs the model on them.
        widths: Bits, 2 to 8.
        step: Called after every site.

    Returns:
        Name of the site -> bits -> error, summed over the operands of an attention. The key 0
        stands for the widths that its quantizers have now, which may differ between operands.
    """
    quantizers = operand_quantizers(model)
    samples: dict[str, Tensor] = {}
    with quantizers_disabled(model), ExitStack() as stack:
        for key, quantizer in quantizers.items():

            def keep(module, args, _output, key: str = key) -> None:
                samples.setdefault(key, _sample(module, args[0]))

            stack.callback(quantizer.register_forward_hook(keep).remove)
        forward(batch)
    # A rank may have no value where another one has many: the boxes of a RoI head.
    seen = all_reduce_sum(
        torch.tensor([float(samples[k].numel()) if k in samples else 0 for k in quantizers])
    )
    reached = {key for key, values in zip(quantizers, seen.tolist(), strict=True) if values}
    result = {}
    for name, site in quant_sites(model).items():
        result[name] = _site_noise(name, site, samples, reached, sorted(set(widths)))
        step()
    return result


def _sample(quantizer: ActQuantizer, x: Tensor) -> Tensor:
    """Some rows and channels ``(n, c)`` of what enters a quantizer."""
    rows = by_channel(x.detach().float(), tuple(quantizer.scale.shape))
    rows = rows[:: max(1, len(rows) // VALUES_PER_CHANNEL)]
    return rows[:, :: _channel_step(quantizer)].clone()


def _channel_step(quantizer: ActQuantizer) -> int:
    return -(-quantizer.scale.numel() // CHANNELS)


def _no_sample(quantizer: ActQuantizer) -> Tensor:
    channels = len(range(0, quantizer.scale.numel(), _channel_step(quantizer)))
    return quantizer.scale.new_zeros(0, channels)


def _site_noise(
    name: str, site: Site, samples: Mapping[str, Tensor], reached: set[str], widths: list[int]
) -> dict[int, float]:
    result = dict.fromkeys([0, *widths], 0.0)
    for operand, quantizer in site.activations.items():
        key = f'{name}.{operand}'
        if key not in reached:
            continue
        sample = samples.get(key, _no_sample(quantizer))
        own = quantizer.spec.bits
        errors = {bits: _noise(quantizer, bits, sample) for bits in sorted({*widths, own})}
        for bits, error in {0: errors[own], **{bits: errors[bits] for bits in widths}}.items():
            result[bits] += error
    return result


def _noise(quantizer: ActQuantizer, bits: int, sample: Tensor) -> float:
    """Relative squared error of all ranks' samples on a grid of ``bits`` calibrated on them."""
    spec = replace(
        quantizer.spec, bits=bits, granularity='channel', tokens=None, reparametrize=False
    )
    other = build_act_quantizer(spec, (sample.shape[1],), quantizer.site).to(sample.device)
    other.observe()
    observer = other.observer
    if observer.num_passes > 1:
        observer.bins_per_step = max(2, BINS >> bits)
    for _ in range(observer.num_passes):
        observer.update(sample)
        observer.end_pass()
    other.finish_observing()
    powers = torch.zeros(2, dtype=torch.float64)
    if sample.numel():
        powers[0] = (other(sample) - sample).double().square().sum()
        powers[1] = sample.double().square().sum()
    noise, signal = all_reduce_sum(powers).tolist()
    return noise / max(signal, 1e-30)
