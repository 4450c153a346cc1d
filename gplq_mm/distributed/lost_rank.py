"""One of several ranks: they end together, and say why."""

import atexit
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from .last_words import LastWords, LostRankError, raise_others
from .reduce import is_distributed, rank_and_world_size

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


def _is_of_communication(error: BaseException) -> bool:
    # gloo's errors have no type of their own.
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and 'gloo' in str(error)
    )


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
        words = LastWords.current
        sys.exit(
            f'LostRankError: {words.cause}'
            if words is not None and words.cause is not None
            else f'LostRankError: rank {rank} was ended from outside, because another rank was '
            f'lost or the job was cancelled. {MEND}'
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
def ranks_end_together() -> Iterator[None]:
    """Around what all ranks do together; also a decorator.

    If one rank raises, the others end within seconds instead of waiting for it until the time of
    the process group is over. The process group is not to be used after that.

    Raises:
        LostRankError: If another rank has raised; names it and its error.
    """
    if LastWords.current is not None or not is_distributed():
        yield
        return
    with _listening():
        yield


@contextmanager
def _listening() -> Iterator[None]:
    words = LastWords.current = LastWords()
    try:
        yield
    except LostRankError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        if _is_of_communication(error):
            # The words of a rank can arrive later than the end of its connection.
            words.read(seconds=2)
            raise_others()
            if LOST.search(str(error)) is not None:
                reason = str(error).strip().partition('\n')[0]
                rank, _ = rank_and_world_size()
                raise LostRankError(
                    f'rank {rank} ended, because another rank was lost or does not answer '
                    f'({reason}). {MEND}'
                ) from error
        words.leave(error)
        raise
    finally:
        LastWords.current = None
        words.close()


@contextmanager
def one_of_the_ranks() -> Iterator[None]:
    """Around a program that may be one rank of several.

    A rank that is done waits for the others, which may still write the results. If another rank
    raises, dies, hangs for longer than ``env_cfg.dist_cfg.timeout`` or is ended by its launcher,
    this one ends, too, and says so.

    Raises:
        LostRankError: If another rank raises, dies or hangs.
    """
    with _ended_by_the_launcher(), _listening():
        yield
        if is_distributed():
            dist.barrier()
    if is_distributed():
        dist.destroy_process_group()


def end_program() -> None:
    """Ends a program that is done; one of several ranks without taking the interpreter apart.

    A thread of gloo may still hold a tensor of Python's then, and lets go of it after the
    interpreter is gone, which aborts the process.
    """
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        atexit._run_exitfuncs()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
