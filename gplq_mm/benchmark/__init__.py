"""What tools/benchmark.py measures, and how it shows that."""

from .candidates import (
    LINEAR_IMPLS,
    MODEL_IMPLS,
    OURS,
    PeerUnavailable,
    count_operations,
    linear_candidates,
    model_candidates,
)
from .report import show, show_ptq, show_training, write

__all__ = [
    'LINEAR_IMPLS',
    'MODEL_IMPLS',
    'OURS',
    'PeerUnavailable',
    'count_operations',
    'linear_candidates',
    'model_candidates',
    'show',
    'show_ptq',
    'show_training',
    'write',
]
