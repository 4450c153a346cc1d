"""Operators ``torch.ops.gplq_mm.*``: schemas, reference, compiled kernels."""

from . import cuda, library

__all__ = ['cuda', 'library']
