"""GPLQ: activations first, weights later. 4-bit vision transformers for OpenMMLab."""

from typing import Any

from .version import __version__

__all__ = ['__version__', 'convert', 'coverage', 'load', 'quantize_', 'save']


def __getattr__(name: str) -> Any:
    """The functions of :mod:`gplq_mm.api`, imported when one is asked for: torch and the OpenMMLab
    packages take seconds."""
    if name.startswith('_') or name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from . import api

    return getattr(api, name)
