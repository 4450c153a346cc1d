"""Registers the ops for CUDA tensors; Triton is imported when the first of them arrives."""

import functools
import logging
from collections.abc import Callable
from types import ModuleType

import torch

from . import (
    reference,
    training,  # noqa: F401  (defines the ops of training)
    training_reference,
)
from .library import SCHEMAS

# Earliest device that Triton compiles these kernels for.
CAPABILITY = (8, 0)

_logger = logging.getLogger(__name__)
# The library owns the registrations: it must live as long as the process.
_LIBRARY = torch.library.Library('gplq_mm', 'IMPL', 'CUDA')


def _backend(what: str, kernels: Callable[[], ModuleType], fallback: ModuleType) -> ModuleType:
    """The Triton kernels that ``kernels`` imports, or what runs where they cannot."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else CAPABILITY
    if torch.version.hip is not None:
        reason = 'the kernels are written for NVIDIA'
    elif capability < CAPABILITY:
        reason = f'the device has compute capability {capability[0]}.{capability[1]}, below 8.0'
    else:
        try:
            return kernels()
        except ImportError as error:
            reason = f'triton cannot be imported ({error}); install it with `pip install triton`'
    _logger.warning('%s on cuda run in plain torch, slowly: %s.', what, reason)
    return fallback


def _triton_ops() -> ModuleType:
    from . import triton_ops

    return triton_ops


def _triton_training() -> ModuleType:
    from . import triton_training

    return triton_training


@functools.cache
def cuda_backend() -> ModuleType:
    """Module whose functions compute the packed ops on CUDA tensors.

    The Triton kernels, or the plain-torch reference where they cannot run, which is logged once.
    """
    return _backend('int4 ops', _triton_ops, reference)


@functools.cache
def training_backend() -> ModuleType:
    """The same of the ops of training."""
    return _backend('training ops', _triton_training, training_reference)


def _deferred(name: str, backend: Callable[[], ModuleType]) -> Callable:
    def run(*args):
        return getattr(backend(), name)(*args)

    run.__name__ = name
    return run


def _register() -> None:
    for name in SCHEMAS:
        _LIBRARY.impl(name, _deferred(name, cuda_backend))
    # Attention and MLPs of training are made of these.
    for name in training_reference.__all__:
        _LIBRARY.impl(name, _deferred(name, training_backend))


_register()
