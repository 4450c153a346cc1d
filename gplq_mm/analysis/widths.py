"""Rounding error of weights and activations at other widths than the model's own.

The effect of a layer on the network is measured at one width (:mod:`.sensitivity`). For small
errors it is proportional to the power of the rounding error, which is cheap to measure at every
width: from the weight itself, and from a sample of the activations.
"""

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import all_reduce_sum
from ..layers import quantizers_disabled
from ..quant import ActQuantizer
from ..quant.observers import by_channel
from .sites import operand_quantizers, quant_sites, weighted_sites

CHANNELS = 64
VALUES_PER_CHANNEL = 2048
# A histogram of the sample needs no more bins than that of 4 bits has.
BINS = 512


@torch.no_grad()
def weight_noise(
    model: nn.Module,
    widths: Collection[int],
    method: Callable,
    step: Callable[[], Any] = lambda: None,
) -> dict[str, dict[int, float]]:
    """Squared rounding error of every weight at several widths, relative to the weight's square.

    In the folded layout both are those of the folded weight, whose columns meet codes of about
    the same spread.

    Args:
        model: Quantized and calibrated model.
        widths: Bits, 2 to 8.
        method: Weight PTQ method that needs no statistics, as in ``round_weights``.
        step: Called after every layer.

    Returns:
        Name of the layer -> bits -> error. The key 0 stands for the width that it has now.
    """
    result = {}
    for name, site in weighted_sites(model).items():
        spec = site.weight.spec
        weight, permutation = site.module.foldable()
        power = max(float(weight.double().square().sum()), 1e-30)
        errors = {}
        for bits in sorted({*widths, spec.bits}):
            value = method(weight, spec.with_bits(bits), permutation, None)
            errors[bits] = float((value.dequantize() - weight).double().square().sum()) / power
        result[name] = {0: errors[spec.bits], **{bits: errors[bits] for bits in widths}}
        step()
    return result


@torch.no_grad()
def activation_noise(
    model: nn.Module,
    batch: Any,
    forward: Callable[[Any], Any],
    widths: Collection[int],
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
    # A rank may have no value where another one has many: the boxes of a RoI head.
    samples = {
        key: _sample(quantizer, quantizer.scale.new_zeros(0, *quantizer.scale.shape))
        for key, quantizer in quantizers.items()
    }
    with quantizers_disabled(model), ExitStack() as stack:
        for key, quantizer in quantizers.items():

            def keep(module, args, _output, key: str = key) -> None:
                if not samples[key].numel():
                    samples[key] = _sample(module, args[0])

            stack.callback(quantizer.register_forward_hook(keep).remove)
        forward(batch)
    counts = torch.tensor([float(sample.numel()) for sample in samples.values()])
    reached = dict(zip(samples, all_reduce_sum(counts).tolist(), strict=True))
    result = {}
    for name, site in quant_sites(model).items():
        result[name] = dict.fromkeys([0, *widths], 0.0)
        for operand, quantizer in site.activations.items():
            key, own = f'{name}.{operand}', quantizer.spec.bits
            if not reached[key]:
                continue
            errors = {
                bits: _noise(quantizer, bits, samples[key]) for bits in sorted({*widths, own})
            }
            for bits in result[name]:
                result[name][bits] += errors[bits or own]
        step()
    return result


def _sample(quantizer: ActQuantizer, x: Tensor) -> Tensor:
    """Some rows and channels ``(n, c)`` of what enters a quantizer."""
    rows = by_channel(x.detach().float(), tuple(quantizer.scale.shape))
    rows = rows[:: max(1, len(rows) // VALUES_PER_CHANNEL)]
    return rows[:, :: -(-quantizer.scale.numel() // CHANNELS)].clone()


def _noise(quantizer: ActQuantizer, bits: int, sample: Tensor) -> float:
    """Relative squared error of all ranks' samples on a grid of ``bits`` calibrated on them."""
    spec = quantizer.spec.with_bits(bits)
    if spec.code_format.block_size is None:
        spec = replace(spec, granularity='channel', tokens=None, reparametrize=False)
    other = ActQuantizer(spec, (sample.shape[1],), quantizer.site).to(sample.device)
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
        error = other(sample) - sample
        powers = torch.stack([x.double().square().sum().cpu() for x in (error, sample)])
    noise, signal = all_reduce_sum(powers).tolist()
    return noise / max(signal, 1e-30)
