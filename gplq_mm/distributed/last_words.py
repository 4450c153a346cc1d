"""The last words of a rank: what ended it, for the others to read instead of waiting for it."""

import threading
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

from ..errors import GPLQError

INTERVAL = 0.5  # seconds from one look to the next
PATIENCE = 5.0  # seconds that a rank with an error waits until the others know of it


class LostRankError(GPLQError, RuntimeError):
    """Another rank had an error or was lost, so this one cannot go on."""


class LastWords:
    """Reads what other ranks leave in the store of the process group, on a thread of its own.

    NCCL's communicators are then aborted, so that the main thread does not stay in one. Those of
    gloo cannot be: :func:`wait_for` looks here while it waits.

    Attributes:
        cause: ``rank 1 ended: ValueError: ...``, or None.
    """

    current: 'LastWords | None' = None
    # Errors that the ranks of this program have had together: each has a key of its own, since a
    # store may outlive a process group.
    number = 0

    def __init__(self):
        self.cause: str | None = None
        self._key = f'gplq_mm/last_words/{LastWords.number}'
        self._store = None
        self._lock = threading.RLock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._done.set()
        self._thread.join()
        LastWords.number += self.cause is not None

    def _listen(self) -> None:
        while not self._done.wait(INTERVAL):
            if self.read() is not None:
                for group in list(distributed_c10d._world.pg_map):
                    group.abort()
                return

    def _open(self) -> bool:
        if self._store is None and dist.is_initialized():
            # A connection of its own: one that waits for a key keeps all others waiting.
            self._store = distributed_c10d._get_default_store().clone()
            self._store.set_timeout(timedelta(seconds=PATIENCE))
        return self._store is not None

    def read(self, seconds: float = 0.0) -> str | None:
        """What ended another rank, or None if nothing is known of it after so many seconds."""
        deadline = time.monotonic() + seconds
        with self._lock:
            try:
                while self.cause is None and self._open():
                    if self._store.check([self._key]):
                        self.cause = self._store.get(self._key).decode()
                        self._store.add(f'{self._key}/read', 1)
                    elif time.monotonic() > deadline:
                        break
                    else:
                        time.sleep(INTERVAL / 10)
            except dist.DistError:
                # The store was that of a rank which is gone.
                pass
        return self.cause

    def leave(self, error: BaseException) -> None:
        """Tells the others what ends this rank, unless one was earlier, and waits for them."""
        with self._lock:
            try:
                if self.cause is not None or not self._open():
                    return
                if self._store.add(f'{self._key}/writers', 1) > 1:
                    self.read(PATIENCE)
                    return
                text = ' '.join(str(error).split())
                self.cause = f'rank {dist.get_rank()} ended: {type(error).__name__}: {text}'
                self._store.set(self._key, self.cause)
                deadline = time.monotonic() + PATIENCE
                others = dist.get_world_size() - 1
                while self._store.add(f'{self._key}/read', 0) < others:
                    if time.monotonic() > deadline:
                        return
                    time.sleep(INTERVAL / 10)
            except dist.DistError:
                pass


def raise_others() -> None:
    """Raises LostRankError if another rank has ended with an error."""
    words = LastWords.current
    if words is not None and words.cause is not None:
        raise LostRankError(f'{words.cause} (rank {dist.get_rank()} cannot go on without it)')


def wait_for(work: dist.Work) -> None:
    """Waits for a collective as ``work.wait()`` does, but not for a rank that has ended.

    Raises:
        LostRankError: If another rank has had an error meanwhile.
    """
    if dist.get_backend() != 'gloo':
        work.wait()
        return
    while True:
        try:
            work.wait(timedelta(seconds=INTERVAL))
            return
        except RuntimeError as error:
            if 'Operation timed out' not in str(error):
                raise
        raise_others()
