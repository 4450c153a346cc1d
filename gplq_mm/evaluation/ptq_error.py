"""Error that weight quantization causes at the output of every layer."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..errors import StateError
from ..layers import (
    QuantWeightLayer,
    quant_layers,
    quantizers_disabled,
    weights_disabled,
)
from .error_sums import ErrorSums, with_means


@torch.no_grad()
def layer_output_error(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    activations_quantized: bool,
) -> dict:
    """Compares every layer before and after weight quantization on the same input.

    The inputs are those of the model with FP32 weights, so errors of different layers do not
    mix. Before means W32A4 (``activations_quantized``: the paper's W32A4 -> W4A4) or W32A32
    (W32A32 -> W4A4); after means quantized weight and input.

    Args:
        model: Model with quantized weights.
        batches: Images.
        forward: Runs the model on a batch.
        activations_quantized: Which model is the reference.

    Returns:
        ``mae`` and ``mse``, means over layers, and ``layers``: name -> ``{'mae', 'mse'}``. In
        units of the layer's output.

    Raises:
        StateError: If a weight is not quantized.
    """
    layers = quant_layers(model)
    sums = {name: ErrorSums() for name in layers}
    for name, layer in layers.items():
        if not layer.weight_quantizer.is_quantized:
            raise StateError(f'{name} has no quantized weight; run Stage 2 first.')

    def compare(layer: QuantWeightLayer, args: tuple, output: torch.Tensor, name: str) -> None:
        layer.weight_quantizer.enabled, before = True, layer.act_quantizer.enabled
        layer.act_quantizer.enabled = True
        # Not through __call__: that would come back here.
        sums[name].add(layer.forward(args[0]), output)
        layer.weight_quantizer.enabled, layer.act_quantizer.enabled = False, before

    context = weights_disabled(model) if activations_quantized else quantizers_disabled(model)
    with ExitStack() as stack:
        stack.enter_context(context)
        for name, layer in layers.items():
            handle = layer.register_forward_hook(
                lambda module, args, output, name=name: compare(module, args, output, name)
            )
            stack.callback(handle.remove)
        for batch in batches:
            forward(batch)
    return with_means({name: value.reduce() for name, value in sums.items()})
