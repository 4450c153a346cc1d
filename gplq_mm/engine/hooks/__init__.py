"""Hooks, one a file."""

from .calibration_hook import CalibrationHook
from .checkpoint_hook import GPLQCheckpointHook
from .decision_hook import DecisionHook
from .pca_basis_hook import PCABasisHook
from .quant_stats_hook import QuantStatsHook
from .weight_drift_hook import WeightDriftHook

__all__ = [
    'CalibrationHook',
    'DecisionHook',
    'GPLQCheckpointHook',
    'PCABasisHook',
    'QuantStatsHook',
    'WeightDriftHook',
]
