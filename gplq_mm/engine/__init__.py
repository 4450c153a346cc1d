"""Runner, loops, hooks and optimizer settings of GPLQ and of direct QAT."""

from ..models import Bf16OptimWrapper, GPLQOptimWrapperConstructor
from ..progress import track
from .calibration_set import CalibrationError, CalibrationSet
from .class_count import ClassCountError, ClassCountHook, check_class_count
from .hooks import (
    CalibrationHook,
    GPLQCheckpointHook,
    PCABasisHook,
    QuantStatsHook,
    WeightDriftHook,
)
from .loops import DirectQATLoop, GPLQTrainLoop, QuantTrainLoop
from .mask_check import MaskCheckHook, MaskError
from .run_record import RunRecord, headline_metrics, print_summary, result_rows
from .runner import GPLQRunner
from .transfer import TransferError
from .weights import load_run_weights, unwrap

__all__ = [
    'Bf16OptimWrapper',
    'CalibrationError',
    'CalibrationHook',
    'CalibrationSet',
    'ClassCountError',
    'ClassCountHook',
    'DirectQATLoop',
    'GPLQCheckpointHook',
    'GPLQOptimWrapperConstructor',
    'GPLQRunner',
    'GPLQTrainLoop',
    'MaskCheckHook',
    'MaskError',
    'PCABasisHook',
    'QuantStatsHook',
    'QuantTrainLoop',
    'RunRecord',
    'TransferError',
    'WeightDriftHook',
    'check_class_count',
    'headline_metrics',
    'load_run_weights',
    'print_summary',
    'result_rows',
    'track',
    'unwrap',
]
