"""Float and deployed models with random weights: what a benchmark needs, without any training.

Grids come from random data by their range, weights are rounded to nearest. Speed does not depend
on either.
"""

import copy

import torch
from mmengine.config import Config
from torch import Tensor, nn

from ..deploy import convert
from ..layers import QwT, calibrate, freeze_activations, quantize_model
from ..layers.compensation import block_input
from ..ptq import RoundToNearest, round_weights
from ..quant import QuantPolicy
from ..registry import MODELS


def architecture_of(cfg: Config) -> tuple[dict, tuple[int, int, int]]:
    """Config of a float model, and the shape ``(C, H, W)`` of its images.

    Args:
        cfg: Config of a GPLQ run or of a float model.
    """
    architecture = copy.deepcopy(cfg.model.get('architecture', cfg.model))
    # Training only, and it says so in the log.
    architecture.pop('train_cfg', None)
    size = architecture.backbone.get('img_size', 224)
    height, width = (size, size) if isinstance(size, int) else size
    return architecture, (architecture.backbone.get('in_channels', 3), height, width)


def float_model(cfg: Config) -> tuple[nn.Module, tuple[int, int, int]]:
    """Float model of a config with random weights, and the shape of its images."""
    architecture, image = architecture_of(cfg)
    torch.manual_seed(0)
    return MODELS.build(architecture).eval().requires_grad_(False), image


@torch.no_grad()
def synthetic_model(
    model: nn.Module, x: Tensor, compensation: str = 'none', levels: bool = False
) -> nn.Module:
    """Deployed W4A4 twin of a float model, with the default policy.

    Args:
        model: Float model; it is quantized in place, so give a copy.
        x: Input for the activation grids.
        compensation: ``'QwT'`` or ``'QwTv2'`` puts a random map beside every block that can
            have one, as if all of them had been fitted and kept.
        levels: Whether the codes of activations stand for chosen levels instead of equidistant
            integers.
    """
    activation = {'format': 'levels'} if levels else {'observer': 'minmax'}
    operands = {key: activation for key in ('q', 'k', 'v', 'probs') if levels}
    policy = QuantPolicy(activation=activation, weight={'observer': 'minmax'}, **operands)
    quantize_model(model, policy, None if compensation == 'none' else {'type': compensation})
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
