"""Quantization core: specs, rounding, observers, quantizers. Pure torch, knows no model."""

from .functional import (
    dequantize,
    dequantize_log_sqrt2,
    fake_quantize,
    fake_quantize_log_sqrt2,
    quantize,
    quantize_log_sqrt2,
)
from .learned_weight import LearnedWeightQuantizer
from .observers import MinMaxObserver, MSEObserver, PercentileObserver, build_observer
from .policy import QuantPolicy
from .quantized_weight import QuantizedWeight
from .quantizers import (
    ActQuantizer,
    LearnedQuantizer,
    NotCalibratedError,
    ProbQuantizer,
    QuantState,
    build_act_quantizer,
)
from .spec import ActSpec, PolicyError, SiteSpec, WeightSpec
from .weight_quantizer import WeightQuantizer

__all__ = [
    'ActQuantizer',
    'ActSpec',
    'LearnedQuantizer',
    'LearnedWeightQuantizer',
    'MSEObserver',
    'MinMaxObserver',
    'NotCalibratedError',
    'PercentileObserver',
    'PolicyError',
    'ProbQuantizer',
    'QuantPolicy',
    'QuantState',
    'QuantizedWeight',
    'SiteSpec',
    'WeightQuantizer',
    'WeightSpec',
    'build_act_quantizer',
    'build_observer',
    'dequantize',
    'dequantize_log_sqrt2',
    'fake_quantize',
    'fake_quantize_log_sqrt2',
    'quantize',
    'quantize_log_sqrt2',
]
