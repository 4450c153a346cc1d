"""The compiled kernels: loading them, and which instruction set they use."""

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_logger = logging.getLogger(__name__)
_loaded = False
_announced: set[str] = set()


def load() -> None:
    """Loads ``gplq_mm._C`` if it was installed; the ops must be defined already.

    The environment variable ``GPLQ_MM_LIBRARY`` names another build to load in its place
    (`make test-asan` does).

    Raises:
        ImportError: If it was compiled against another torch.
    """
    global _loaded
    path = os.environ.get('GPLQ_MM_LIBRARY')
    if not path:
        spec = importlib.util.find_spec('gplq_mm._C')
        path = spec.origin if spec else None
    if path is None or _loaded:
        return
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f'the kernels {path} do not load with torch {torch.__version__}: install '
            f'gplq_mm again, they are compiled against the torch that is present ({error}).'
        ) from error
    _loaded = True


def is_loaded() -> bool:
    """Whether the compiled kernels are installed."""
    return _loaded


def backend() -> str:
    """What runs the ops on the CPU: 'avx512_vnni', 'avx_vnni', 'avx2', 'portable', or 'torch'
    where the package was installed without kernels.

    The best that the machine supports, or what the environment variable ``GPLQ_MM_ISA`` names.

    Raises:
        ValueError: If ``GPLQ_MM_ISA`` names an instruction set that is not supported.
    """
    return torch.ops.gplq_mm._cpu_isa() if _loaded else 'torch'


def available_isas() -> list[str]:
    """Instruction sets that this machine and build support, lowest first."""
    return list(torch.ops.gplq_mm._cpu_isas()) if _loaded else []


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Runs the kernels with another instruction set inside a ``with`` block, in all threads.

    Args:
        name: One of :func:`available_isas`.

    Raises:
        ValueError: If this machine or build does not have it.
    """
    previous = backend()
    torch.ops.gplq_mm._set_cpu_isa(name)
    try:
        yield
    finally:
        torch.ops.gplq_mm._set_cpu_isa(previous)


def announce(what: str, reason: str) -> None:
    """Says once that something runs in plain torch, and why."""
    if what in _announced:
        return
    _announced.add(what)
    _logger.warning('%s run in plain torch, slowly: %s.', what, reason)


def announce_reference(device: torch.device, what: str = 'int4 ops') -> None:
    """Says, once per kind of device, that ops run in plain torch."""
    if device.type == 'meta':
        return
    reason = (
        'gplq_mm was installed without its compiled kernels'
        if device.type == 'cpu' and not _loaded
        else 'there is no kernel for it'
    )
    announce(f'{what} on {device.type}', reason)
