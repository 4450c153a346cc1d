"""One of several ranks: they end together, and say why."""

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from .reduce import is_distributed, rank_and_world_size

__all__ = ['one_of_the_ranks']

# What gloo, NCCL and the store say when the other end is gone, or has not answered in time.
LOST = re.compile(
    r'connection (closed|reset|refused)|(read|write) error|broken pipe|timed? ?out'
    r'|nccl(Remote|System|Internal)Error',
    re.IGNORECASE,
)
MEND = (
    'That one was killed, or has printed an error of its own. The last checkpoint is complete: '
    'start again with --resume, on this or another number of ranks.'
)


def _is_of_a_lost_rank(error: Exception) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    # gloo's errors have no type of their own.
    from_outside = isinstance(error, dist.DistError) or 'gloo' in text
    return from_outside and LOST.search(text) is not None


@contextmanager
def _ended_by_the_launcher() -> Iterator[None]:
    """Tells why when the launcher ends this rank because another one is gone."""
    own = os.getpid()

    def leave(number, _frame):
        # A loader worker is forked from here, and a program on its own has lost nobody.
        if os.getpid() != own or not is_distributed():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        rank, _ = rank_and_world_size()
        sys.exit(
            f'LostRankError: rank {rank} was ended from outside, because another rank was lost or '
            f'the job was cancelled. {MEND}'
        )

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def one_of_the_ranks() -> Iterator[None]:
    """Around a program that may be one rank of several.

    A rank that is done waits for the others, which may still write the results. If another rank
    dies, hangs for longer than ``env_cfg.dist_cfg.timeout`` or is ended by its launcher, the
    program ends with one line that says so.
    """
    with _ended_by_the_launcher():
        try:
            yield
            if is_distributed():
                dist.barrier()
                dist.destroy_process_group()
        except RuntimeError as error:
            if not _is_of_a_lost_rank(error):
                raise
            reason = str(error).strip().partition('\n')[0]
            rank, _ = rank_and_world_size()
            sys.exit(
                f'LostRankError: rank {rank} ended, because another rank was lost or does not '
                f'answer ({reason}). {MEND}'
            )
