"""Where a quantized model loses accuracy, and a policy of several widths that loses less.

Behind ``tools/analyze.py``: nothing else of the package imports this room.
"""

from .activations import activation_statistics, scale_histogram
from .allocation import BudgetError, allocate
from .diagnostics import AnalysisSettings, analyze
from .run_files import read_run
from .sensitivity import network_sensitivity, number_of_steps
from .sites import Site, quant_sites, weighted_sites, weights_are_quantized
from .sizes import code_sizes, mean_bits, other_bytes, weight_counts
from .sqnr import layer_sqnr
from .suggestion import (
    Budget,
    activation_budget,
    policy_rules,
    policy_source,
    suggest_policy,
    weight_budget,
)
from .widths import activation_noise, weight_noise

__all__ = [
    'AnalysisSettings',
    'Budget',
    'BudgetError',
    'Site',
    'activation_budget',
    'activation_noise',
    'activation_statistics',
    'allocate',
    'analyze',
    'code_sizes',
    'layer_sqnr',
    'mean_bits',
    'network_sensitivity',
    'number_of_steps',
    'other_bytes',
    'policy_rules',
    'policy_source',
    'quant_sites',
    'read_run',
    'scale_histogram',
    'suggest_policy',
    'weight_budget',
    'weight_counts',
    'weight_noise',
    'weighted_sites',
    'weights_are_quantized',
]
