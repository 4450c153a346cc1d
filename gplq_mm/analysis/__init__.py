"""Where a quantized model loses accuracy, and a policy of several widths that loses less.

Behind ``tools/analyze.py``: nothing else of the package imports this room.
"""

from .activations import activation_statistics, scale_histogram
from .allocation import BudgetError
from .diagnostics import AnalysisSettings, analyze
from .run_files import read_run
from .sensitivity import network_sensitivity
from .sizes import mean_bits
from .sqnr import layer_sqnr
from .suggestion import policy_source

__all__ = [
    'AnalysisSettings',
    'BudgetError',
    'activation_statistics',
    'analyze',
    'layer_sqnr',
    'mean_bits',
    'network_sensitivity',
    'policy_source',
    'read_run',
    'scale_histogram',
]
