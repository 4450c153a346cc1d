"""Operators ``torch.ops.gplq_mm.*``: schemas, reference, compiled kernels."""

from . import cuda, library, training

__all__ = ['cuda', 'library', 'training']
