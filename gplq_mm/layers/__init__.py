"""Quantized layers, attention adapters, compensation, and the in-place swap."""

from .attention import QuantAttention
from .attention_adapters import register_attention_adapter
from .block_checkpoint import checkpoint_blocks
from .compensation import Compensation, QwT, QwTv2, attach_compensation, build_compensation
from .compiled import compiled_products
from .conv import QuantConv2d
from .conv_transpose import QuantConvTranspose2d
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
from .patching import patched_forward
from .replace import QuantReport, find_blocks, quant_layers, quant_units, quantize_model
from .weight_layer import QuantWeightLayer

__all__ = [
    'Compensation',
    'DeployError',
    'Int4Attention',
    'Int4Conv2d',
    'Int4ConvTranspose2d',
    'Int4Linear',
    'Int4WeightLayer',
    'QuantAttention',
    'QuantConv2d',
    'QuantConvTranspose2d',
    'QuantLinear',
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
    'register_attention_adapter',
    'require_frozen',
    'set_saved_bytes',
    'weights_are_learned',
    'weights_disabled',
]
