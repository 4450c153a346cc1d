"""Loops, one a file."""

from .gplq_loop import GPLQTrainLoop

__all__ = ['GPLQTrainLoop']
