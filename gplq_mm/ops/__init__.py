"""Operators ``torch.ops.gplq_mm.*``: schemas, reference, compiled kernels."""

from . import library

__all__ = ['library']
