"""How far Stage 1 moved the weights (the paper's basin diagnostic)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..layers import quant_layers
from .error_sums import with_means


@torch.no_grad()
def weight_drift(model: nn.Module, reference: Mapping[str, Tensor]) -> dict:
    """Deviation of every quantized layer's latent weight from its original.

    Args:
        model: Quantized model.
        reference: Original FP32 weights under the same keys.

    Returns:
        ``mae`` and ``mse``, means over layers, and ``layers``: name -> ``{'mae', 'mse'}``. In
        units of the weight.
    """
    layers = {}
    for name, layer in quant_layers(model).items():
        difference = layer.original_weight() - reference[f'{name}.weight'].to(
            layer.weight.device, torch.float64
        )
        layers[name] = {
            'mae': float(difference.abs().mean()),
            'mse': float(difference.square().mean()),
        }
    return with_means(layers)
