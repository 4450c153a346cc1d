"""What the zoo knows of a run, in ``zoo.json`` of its work dir; survives a kill at any moment."""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..checkpoint import atomic_write_text
from .files import ZooError

__all__ = ['RunState', 'locked', 'next_step', 'set_aside']

RUNNING, FINISHED, FAILED = 'running', 'finished', 'failed'


@dataclass
class RunState:
    """Everything that is not in the results of a run, and these when it has finished.

    Attributes:
        name: Name of the model in the metafile.
        config: Config file, relative to the checkout.
        options: Of ``--cfg-options``.
        config_hash: Of all settings.
        code_hash: Of the code.
        commit: Of the code, when the run began.
        command: As a reader would type it.
        machine: In words, without the load.
        data: Of :func:`~gplq_mm.zoo.data.describe_data`.
        started: When the run began, seconds of the epoch.
        updated: When this was last written.
        seconds: Time that all attempts have taken.
        load: Sum and number of samples of the machine's load.
        status: ``running``, ``finished`` or ``failed``.
        error: Why it failed.
        measured: The entry of the metafile, of a finished run.
    """

    name: str
    config: str
    options: list[str]
    config_hash: str
    code_hash: str
    commit: str
    command: str
    machine: str
    data: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.time)
    updated: float = 0.0
    seconds: float = 0.0
    load: tuple[float, int] = (0.0, 0)
    status: str = RUNNING
    error: str = ''
    measured: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, work_dir: Path) -> 'RunState | None':
        """The state of a run, or None where there is none.

        Raises:
            ZooError: If the file is damaged.
        """
        path = work_dir / 'zoo.json'
        try:
            content = json.loads(path.read_text(encoding='utf-8'))
            return cls(**{item.name: content[item.name] for item in fields(cls)})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ZooError(f'{path} is damaged ({error}); give --rerun to start over.') from error

    def write(self, work_dir: Path) -> None:
        """Writes the state whole or not at all."""
        self.updated = time.time()
        atomic_write_text(work_dir / 'zoo.json', json.dumps(asdict(self), indent=2))

    def sample_load(self) -> None:
        """Notes how many processes are runnable now."""
        total, count = self.load
        self.load = (total + os.getloadavg()[0], count + 1)

    @property
    def mean_load(self) -> float | None:
        """Mean of the samples."""
        total, count = self.load
        return total / count if count else None


def next_step(state: RunState | None, new: RunState, work_dir: Path) -> tuple[str, str]:
    """What to do with a work dir.

    Args:
        state: The run that lies there.
        new: The run that is wanted.
        work_dir: Its folder.

    Returns:
        ``skip`` (it has finished), ``resume`` or ``start``, and why.

    Raises:
        ZooError: If a run lies there that the zoo did not start.
    """
    if state is None:
        if (work_dir / 'summary.json').exists() or (work_dir / 'last_checkpoint').exists():
            raise ZooError(
                f'{work_dir} holds a run that was not started here: write it down with --collect, '
                'choose another --work-dir-root, or give --rerun to start over.'
            )
        return 'start', ''
    if state.config_hash != new.config_hash:
        return 'start', f'the settings have changed since commit {state.commit}'
    if state.code_hash != new.code_hash:
        return 'start', f'the code has changed since commit {state.commit}'
    if state.status == FINISHED:
        return 'skip', f'measured at commit {state.commit}'
    if (work_dir / 'last_checkpoint').exists():
        return 'resume', f'stopped after {state.seconds:.0f} s'
    return 'start', ''


def set_aside(work_dir: Path) -> None:
    """Makes a work dir ready for a new run: neither results nor checkpoints of the old one count.

    Its results are kept under another name.
    """
    for name, kept in (('summary.json', 'earlier_summary.json'), ('console.log', 'earlier.log')):
        with suppress(FileNotFoundError):
            os.replace(work_dir / name, work_dir / kept)
    with suppress(FileNotFoundError):
        (work_dir / 'last_checkpoint').unlink()


@contextmanager
def locked(work_dir: Path, on_wait: Callable[[bool], None]) -> Iterator[int]:
    """Keeps a work dir for one run; waits for a run that an earlier call has left behind.

    Args:
        work_dir: The folder.
        on_wait: Called every second while it waits; with True the first time.

    Yields:
        A file descriptor; the lock lasts until every process that has inherited it has ended.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work_dir / 'zoo.lock', os.O_RDWR | os.O_CREAT, 0o644)
    try:
        first = True
        while not _try_lock(descriptor):
            on_wait(first)
            first = False
            time.sleep(1)
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
