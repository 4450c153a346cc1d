"""Loops, one a file."""

from .direct_loop import DirectQATLoop
from .gplq_loop import GPLQTrainLoop
from .quant_loop import QuantTrainLoop

__all__ = ['DirectQATLoop', 'GPLQTrainLoop', 'QuantTrainLoop']
