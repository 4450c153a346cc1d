"""Hooks, one a file."""

from .calibration_hook import CalibrationHook
from .checkpoint_hook import GPLQCheckpointHook
from .pca_basis_hook import PCABasisHook
from .quant_stats_hook import QuantStatsHook, quantizer_statistics

__all__ = [
    'CalibrationHook',
    'GPLQCheckpointHook',
    'PCABasisHook',
    'QuantStatsHook',
    'quantizer_statistics',
]
