"""Diagnostics as functions that return plain dicts; hooks, loops and tools print them."""

from .features import feature_distance
from .linear_probe import linear_probe
from .ptq_error import layer_output_error
from .weight_drift import weight_drift

__all__ = ['feature_distance', 'layer_output_error', 'linear_probe', 'weight_drift']
