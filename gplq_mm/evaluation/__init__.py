"""Diagnostics of a run as functions that return plain dicts; hooks, loops and tools print them."""

from .activations import quantizer_statistics, quantizer_sums
from .decisions import Decisions, accuracy_difference
from .error_sums import ErrorSums, decibels
from .features import feature_distance
from .linear_probe import linear_probe
from .ptq_error import layer_output_error
from .weight_drift import weight_drift

__all__ = [
    'Decisions',
    'ErrorSums',
    'accuracy_difference',
    'decibels',
    'feature_distance',
    'layer_output_error',
    'linear_probe',
    'quantizer_statistics',
    'quantizer_sums',
    'weight_drift',
]
