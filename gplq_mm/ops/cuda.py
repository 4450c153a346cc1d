"""Registers the ops for CUDA tensors; Triton is imported when the first of them arrives."""

import functools
import logging
from types import ModuleType

import torch

from . import reference
from .library import SCHEMAS

__all__ = ['cuda_backend']

# Earliest device that Triton compiles these kernels for.
CAPABILITY = (8, 0)

_logger = logging.getLogger(__name__)
# The library owns the registrations: it must live as long as the process.
_LIBRARY = torch.library.Library('gplq_mm', 'IMPL', 'CUDA')


@functools.cache
def cuda_backend() -> ModuleType:
    """Module whose functions compute the ops on CUDA tensors.

    The Triton kernels, or the plain-torch reference where they cannot run, which is logged once.
    """
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else CAPABILITY
    if torch.version.hip is not None:
        reason = 'the kernels are written for NVIDIA'
    elif capability < CAPABILITY:
        reason = f'the device has compute capability {capability[0]}.{capability[1]}, below 8.0'
    else:
        try:
            from . import triton_ops

            return triton_ops
        except ImportError as error:
            reason = f'triton cannot be imported ({error}); install it with `pip install triton`'
    _logger.warning('int4 ops on cuda run in plain torch, slowly: %s.', reason)
    return reference


def _deferred(name: str):
    def run(*args):
        return getattr(cuda_backend(), name)(*args)

    run.__name__ = name
    return run


for _name in SCHEMAS:
    _LIBRARY.impl(_name, _deferred(_name))
