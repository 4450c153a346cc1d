"""Seconds and peak memory of each stage of a run."""

import logging
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch
from mmengine.logging import print_log

MEGABYTE = 2**20


@cache
def _warn_of_earlier_stages() -> None:
    print_log(
        'This system does not let a process reset its peak memory: the peak of a stage includes '
        'the stages before it',
        logger='current',
        level=logging.WARNING,
    )


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    # Linux: 5 resets the high-water mark of resident memory, where the process may.
    try:
        Path('/proc/self/clear_refs').write_text('5')
    except OSError:
        _warn_of_earlier_stages()


def _from_status(field: str) -> float | None:
    """Megabytes of a line of Linux's description of the process, None where there is none."""
    with suppress(OSError):
        for line in Path('/proc/self/status').read_text().splitlines():
            if line.startswith(f'{field}:'):
                return int(line.split()[1]) / 1024
    return None


def _peak_megabytes() -> float:
    """Peak of the device's allocations on CUDA, of resident memory otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / MEGABYTE
    unit = 1 if sys.platform == 'darwin' else 1024
    return _from_status('VmHWM') or (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MEGABYTE
    )


def resident_megabytes() -> float:
    """Memory that the process holds now: on CUDA that of the device, otherwise resident memory.

    Where the system does not tell, its peak so far.
    """
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / MEGABYTE
    return _from_status('VmRSS') or _peak_megabytes()


class StageClock:
    """Adds up seconds and keeps the peak memory (MB) of named stages, over resumes too."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_memory_mb: dict[str, float] = {}
        self._start: float | None = None
        self._stage: str | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures what happens inside as part of stage ``name``."""
        _reset_peak()
        self._stage, self._start = name, time.monotonic()
        try:
            yield
        finally:
            self.flush()
            self._stage = self._start = None

    def flush(self) -> None:
        """Books the time of the running stage up to now (before a checkpoint is written)."""
        if self._stage is None:
            return
        now = time.monotonic()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._start
        self._start = now
        peak = max(self.peak_memory_mb.get(self._stage, 0.0), _peak_megabytes())
        self.peak_memory_mb[self._stage] = peak

    def state_dict(self) -> dict:
        """Plain data, time of the running stage included."""
        self.flush()
        return {'seconds': dict(self.seconds), 'peak_memory_mb': dict(self.peak_memory_mb)}

    def load_state_dict(self, state: dict) -> None:
        """Continues from :meth:`state_dict`."""
        self.seconds = dict(state['seconds'])
        self.peak_memory_mb = dict(state['peak_memory_mb'])
