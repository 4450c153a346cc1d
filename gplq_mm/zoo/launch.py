"""Calls of tools/train.py: the whole log is kept, and its telling lines are shown."""

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from .files import ZooError

__all__ = ['Line', 'RunFailedError', 'Tail', 'follow', 'shown', 'train_command']

# Lines of the log that tell a reader how far it is.
TELLING = re.compile(
    r'Epoch\((train|val)\)|calibrat|PCA|Weight-PTQ|evaluation of|Error|resumed|compensation'
)
SECONDS_BETWEEN_LOOKS = 0.2
# What a run may take to end after SIGTERM.
GRACE = 20.0


class RunFailedError(ZooError):
    """A run that ended with an error."""


class Line(str):
    """A line of a log, as it stands there."""

    @property
    def telling(self) -> str | None:
        """Its message, shortened, if it tells how far the run is."""
        if not TELLING.search(self) or ' - INFO - ' not in self:
            return None
        message = self.split(' - INFO - ', 1)[1].strip()
        return re.sub(r'base_lr.*?(eta: \S+).* (loss: \S+).*', r'\1  \2', message)


class Tail:
    """The lines that are written to a log from now on.

    Args:
        log: The file; made if it does not exist.
    """

    def __init__(self, log: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        # A look may end amid a character.
        self.file = log.open(encoding='utf-8', errors='replace')
        self.file.seek(0, 2)
        self.pending = ''

    def __enter__(self) -> 'Tail':
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def lines(self, ended: bool = False) -> list[Line]:
        """What has been written since the last look.

        Args:
            ended: Whether nothing more will come, so that a line without an end counts, too.
        """
        *lines, self.pending = (self.pending + self.file.read()).split('\n')
        return [Line(line) for line in lines + ([self.pending] if ended else [])]


def train_command(
    tool: Path, config: Path, work_dir: Path, options: list[str], resume: bool
) -> list[str]:
    """Command line of tools/train.py.

    Args:
        tool: ``tools/train.py``.
        config: Config file.
        work_dir: Folder of the run.
        options: Of ``--cfg-options``.
        resume: Whether to go on with a run that was interrupted.
    """
    command = [sys.executable, str(tool), str(config), '--work-dir', str(work_dir)]
    command += ['--resume'] if resume else []
    return command + (['--cfg-options', *options] if options else [])


def shown(command: list[str], root: Path) -> str:
    """A command as a reader would type it in the checkout."""
    return shlex.join(['python', *(part.removeprefix(f'{root}/') for part in command[1:])])


def follow(
    command: list[str],
    log: Path,
    on_line: Callable[[Line, float], None],
    on_tick: Callable[[], None] = lambda: None,
    keep_open: tuple[int, ...] = (),
    cwd: Path | None = None,
) -> None:
    """Runs a command until it ends; its output goes straight into ``log``.

    So a run whose starter is killed goes on, and loses no line. If the starter ends otherwise, by
    an error or a signal that it handles, it ends the run, too.

    Args:
        command: The command line.
        log: File that receives the output behind what it holds.
        on_line: Called with every line and the seconds since the start.
        on_tick: Called several times a second.
        keep_open: File descriptors that the run inherits.
        cwd: Its working directory.

    Raises:
        RunFailedError: If the command fails; the message has its last line.
    """
    start = time.monotonic()
    last = ''
    with Tail(log) as tail, log.open('ab') as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, pass_fds=keep_open, cwd=cwd
        )
        try:
            ended = False
            while not ended:
                ended = process.poll() is not None
                if not ended:
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                for line in tail.lines(ended):
                    last = line.strip() or last
                    on_line(line, time.monotonic() - start)
                on_tick()
        finally:
            _end(process)
    code = process.returncode
    if code:
        how = f'was ended by signal {-code}' if code < 0 else 'failed'
        raise RunFailedError(f'the run {how}: {last} (the whole log is in {log})')


def _end(process: subprocess.Popen) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
