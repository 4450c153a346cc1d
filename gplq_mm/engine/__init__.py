"""Runner, loops, hooks and optimizer settings of GPLQ and of direct QAT."""

from ..models import Bf16OptimWrapper, GPLQOptimWrapperConstructor
from ..progress import track
from .calibration_set import CalibrationSet
from .hooks import (
    CalibrationHook,
    DecisionHook,
    GPLQCheckpointHook,
    PCABasisHook,
    QuantStatsHook,
    WeightDriftHook,
)
from .loops import DirectQATLoop, GPLQTrainLoop, QuantTrainLoop
from .run_record import RunRecord, headline_metrics, print_summary, result_rows
from .runner import GPLQRunner
from .weights import load_run_weights, unwrap

__all__ = [
    'Bf16OptimWrapper',
    'CalibrationHook',
    'CalibrationSet',
    'DecisionHook',
    'DirectQATLoop',
    'GPLQCheckpointHook',
    'GPLQOptimWrapperConstructor',
    'GPLQRunner',
    'GPLQTrainLoop',
    'PCABasisHook',
    'QuantStatsHook',
    'QuantTrainLoop',
    'RunRecord',
    'WeightDriftHook',
    'headline_metrics',
    'load_run_weights',
    'print_summary',
    'result_rows',
    'track',
    'unwrap',
]
