"""Quantization core: specs, rounding, observers, quantizers. Pure torch, knows no model."""

from .block_format import BlockFormat, MXFP4Format, NVFP4Format
from .format import Format, IntegerFormat, LogSqrt2Format
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
    QuantState,
)
from .spec import ActSpec, PolicyError, SiteSpec, WeightSpec
from .weight_quantizer import WeightQuantizer

__all__ = [
    'ActQuantizer',
    'ActSpec',
    'BlockFormat',
    'Format',
    'IntegerFormat',
    'LearnedQuantizer',
    'LearnedWeightQuantizer',
    'LogSqrt2Format',
    'MSEObserver',
    'MXFP4Format',
    'MinMaxObserver',
    'NVFP4Format',
    'NotCalibratedError',
    'PercentileObserver',
    'PolicyError',
    'QuantPolicy',
    'QuantState',
    'QuantizedWeight',
    'SiteSpec',
    'WeightQuantizer',
    'WeightSpec',
    'build_observer',
    'dequantize',
    'dequantize_log_sqrt2',
    'fake_quantize',
    'fake_quantize_log_sqrt2',
    'quantize',
    'quantize_log_sqrt2',
]
