"""Deployed layers and models with random weights: what a benchmark needs, without any training.

Grids come from random data by their range, weights are rounded to nearest. Speed does not depend
on either.
"""

import torch
from torch import Tensor, nn

from ..layers import (
    Int4Linear,
    QuantLinear,
    QwT,
    calibrate,
    freeze_activations,
    quantize_model,
)
from ..layers.compensation import block_input
from ..ptq import RoundToNearest, round_weights
from ..quant import ActSpec, QuantPolicy, SiteSpec, WeightSpec
from .convert import convert

__all__ = ['synthetic_linear', 'synthetic_model']


@torch.no_grad()
def synthetic_linear(linear: nn.Linear, x: Tensor) -> Int4Linear:
    """Packed W4A4 twin of a layer.

    Args:
        linear: The float layer.
        x: Input ``(..., K)`` for the activation grid.
    """
    spec = SiteSpec(ActSpec(observer='minmax'), WeightSpec(observer='minmax'))
    layer = QuantLinear.from_float(linear, spec, 'linear').eval()
    calibrate(layer, lambda _index, _passes: layer(x))
    freeze_activations(layer)
    matrix, order = layer.foldable()
    layer.set_quantized_weight(
        RoundToNearest()(matrix, layer.weight_quantizer.spec, order, None), None
    )
    return Int4Linear.from_quantized(layer)


@torch.no_grad()
def synthetic_model(model: nn.Module, x: Tensor, compensation: str | None = None) -> nn.Module:
    """Deployed W4A4 twin of a float model, with the default policy.

    Args:
        model: Float model; it is quantized in place, so give a copy.
        x: Input for the activation grids.
        compensation: ``'QwT'`` or ``'QwTv2'`` puts a random map beside every block that can
            have one, as if all of them had been fitted and kept.

    Returns:
        The deployed model.
    """
    policy = QuantPolicy(activation={'observer': 'minmax'}, weight={'observer': 'minmax'})
    quantize_model(model, policy, None if compensation is None else {'type': compensation})
    model.eval()
    handles = [
        module.register_forward_hook(_fill_compensation, with_kwargs=True)
        for module in model.modules()
        if hasattr(module, 'compensation')
    ]
    calibrate(model, lambda _index, _passes: model(x))
    for handle in handles:
        handle.remove()
    freeze_activations(model)
    round_weights(model, RoundToNearest())
    return convert(model)


def _fill_compensation(block: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
    """Fills the compensation of a block whose output has the shape of its input."""
    source, module = block_input(args, kwargs), block.compensation
    if output.shape != source.shape or module.is_fitted:
        return
    channels = source.shape[module.axis]
    shape = (channels, channels) if isinstance(module, QwT) else (channels,)
    module.weight = torch.randn(shape, dtype=torch.float16) / (10 * channels)
    module.bias = torch.zeros(channels, dtype=torch.float16)
