"""mmcv's ``FFN``, the MLP of OpenMMLab's ViT and Swin, and the LayerScale beside it."""

from torch import Tensor, nn

from ..layers.family import full_name
from ..layers.fused import fuses_mlp, is_identity_in_eval, is_plain, mlp_add
from ..layers.mlp import as_quant_mlp

__all__ = ['MLPS', 'fuses_ffn', 'gamma_of', 'is_layer_scale', 'run_ffn']

FFN = 'mmcv.cnn.bricks.transformer.FFN'
# The residual branch is beside `layers`, which is the MLP alone.
MLPS = {FFN: lambda ffn: as_quant_mlp(ffn.layers, '0.0', '0.1', '1')}


def is_layer_scale(module: nn.Module) -> bool:
    """Whether the module is no factor, or a factor per channel of the last axis."""
    if isinstance(module, nn.Identity):
        return True
    return type(module).__name__ == 'LayerScale' and module.data_format == 'channels_last'


def gamma_of(module: nn.Module) -> Tensor | None:
    """Factors of what :func:`is_layer_scale` has accepted."""
    return None if isinstance(module, nn.Identity) else module.weight


def fuses_ffn(norm: nn.Module, ffn: nn.Module) -> bool:
    """Whether ``ffn(norm(x), identity=x)`` is what :func:`run_ffn` computes."""
    if full_name(type(ffn)) != FFN or ffn.num_fcs != 2 or not ffn.add_identity:
        return False
    (first, gelu, drop1), second, drop2 = ffn.layers
    return (
        fuses_mlp(norm, first, gelu, second)
        and is_identity_in_eval(drop1, drop2, ffn.dropout_layer)
        and is_layer_scale(ffn.gamma2)
        and is_plain(norm, ffn)
    )


def run_ffn(x: Tensor, norm: nn.LayerNorm, ffn: nn.Module, fused: bool) -> Tensor:
    """``ffn(norm(x), identity=x)``, in one op if ``fused``."""
    if not fused:
        return ffn(norm(x), identity=x)
    return mlp_add(x, norm, ffn.layers[0][0], ffn.layers[1], gamma_of(ffn.gamma2))
