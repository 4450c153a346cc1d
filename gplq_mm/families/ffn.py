"""mmcv's ``FFN``, the MLP of OpenMMLab's ViT and Swin."""

from torch import nn

from ..layers.family import MlpNames, full_name
from .blocks import MlpParts

FFN = 'mmcv.cnn.bricks.transformer.FFN'
# The residual branch is beside `layers`, which is the MLP alone.
MLPS = {FFN: MlpNames('0.0', '0.1', '1', inside='layers')}


def ffn_parts(norm: nn.Module, ffn: nn.Module) -> MlpParts | None:
    """Parts of ``ffn(norm(x), identity=x)``, or None where it computes something else."""
    if full_name(type(ffn)) != FFN or ffn.num_fcs != 2 or not ffn.add_identity:
        return None
    (first, gelu, drop1), second, drop2 = ffn.layers
    idle = (drop1, drop2, ffn.dropout_layer)
    return MlpParts(ffn, norm, first, gelu, second, ffn.gamma2, idle)
