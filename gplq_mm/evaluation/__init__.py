"""Diagnostics as functions that return plain dicts; hooks, loops and tools print them."""

from .activations import (
    activation_statistics,
    quantizer_statistics,
    quantizer_sums,
    scale_histogram,
)
from .allocation import BudgetError, allocate
from .features import feature_distance
from .linear_probe import linear_probe
from .mixed_precision import costs_at, policy_rules, require_reachable, suggest_widths
from .ptq_error import layer_output_error
from .sensitivity import network_sensitivity, number_of_steps
from .sites import Site, quant_sites, weights_are_quantized
from .sizes import code_sizes, mean_bits, other_bytes, weight_counts
from .sqnr import layer_sqnr
from .weight_drift import weight_drift
from .widths import activation_noise, weight_noise

__all__ = [
    'BudgetError',
    'Site',
    'activation_noise',
    'activation_statistics',
    'allocate',
    'code_sizes',
    'costs_at',
    'feature_distance',
    'layer_output_error',
    'layer_sqnr',
    'linear_probe',
    'mean_bits',
    'network_sensitivity',
    'number_of_steps',
    'other_bytes',
    'policy_rules',
    'quant_sites',
    'quantizer_statistics',
    'quantizer_sums',
    'require_reachable',
    'scale_histogram',
    'suggest_widths',
    'weight_counts',
    'weight_drift',
    'weight_noise',
    'weights_are_quantized',
]
