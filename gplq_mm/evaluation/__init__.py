"""Diagnostics of a run as functions that return plain dicts; hooks, loops and tools print them."""

from .activations import quantizer_statistics, quantizer_sums
from .error_sums import ErrorSums, decibels
from .features import feature_distance
from .linear_probe import linear_probe
from .ptq_error import layer_output_error
from .weight_drift import weight_drift

__all__ = [
    'ErrorSums',
    'decibels',
    'feature_distance',
    'layer_output_error',
    'linear_probe',
    'quantizer_statistics',
    'quantizer_sums',
    'weight_drift',
]
