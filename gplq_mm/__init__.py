"""GPLQ: activations first, weights later. 4-bit vision transformers for OpenMMLab."""

from .version import __version__

__all__ = ['__version__']
