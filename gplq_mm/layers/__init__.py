"""Quantized layers, compensation, the in-place swap, and what a model family is."""

from .attention import QuantAttention
from .block_checkpoint import checkpoint_blocks
from .compensation import Compensation, QwT, QwTv2, attach_compensation, build_compensation
from .compiled import compiled_products
from .conv import QuantConv2d
from .conv_transpose import QuantConvTranspose2d
from .family import AttentionKind, Family, MlpNames, with_mixin
from .int4_attention import Int4Attention
from .int4_conv import Int4Conv2d
from .int4_conv_transpose import Int4ConvTranspose2d
from .int4_linear import Int4Linear
from .int4_weight import DeployError, Int4WeightLayer
from .lifecycle import (
    act_quantizers,
    calibrate,
    freeze_activations,
    freeze_learned_weights,
    is_calibrated,
    learn_weights,
    learned_parameters,
    quantizers_disabled,
    require_frozen,
    set_saved_bytes,
    weights_are_learned,
    weights_disabled,
)
from .linear import QuantLinear
from .mlp import QuantMlp
from .patching import patched_forward
from .replace import (
    QuantReport,
    find_blocks,
    quant_layers,
    quant_units,
    quantize_model,
    unchanged_on_error,
)
from .weight_layer import QuantWeightLayer

__all__ = [
    'AttentionKind',
    'Compensation',
    'DeployError',
    'Family',
    'Int4Attention',
    'Int4Conv2d',
    'Int4ConvTranspose2d',
    'Int4Linear',
    'Int4WeightLayer',
    'MlpNames',
    'QuantAttention',
    'QuantConv2d',
    'QuantConvTranspose2d',
    'QuantLinear',
    'QuantMlp',
    'QuantReport',
    'QuantWeightLayer',
    'QwT',
    'QwTv2',
    'act_quantizers',
    'attach_compensation',
    'build_compensation',
    'calibrate',
    'checkpoint_blocks',
    'compiled_products',
    'find_blocks',
    'freeze_activations',
    'freeze_learned_weights',
    'is_calibrated',
    'learn_weights',
    'learned_parameters',
    'patched_forward',
    'quant_layers',
    'quant_units',
    'quantize_model',
    'quantizers_disabled',
    'require_frozen',
    'set_saved_bytes',
    'unchanged_on_error',
    'weights_are_learned',
    'weights_disabled',
    'with_mixin',
]
