"""Calls of tools/train.py: the whole log is kept, and its telling lines are shown."""

import ctypes
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ..errors import GPLQError

# Lines of the log that tell a reader how far it is.
TELLING = re.compile(
    r'Epoch\((train|val)\)|calibrat|PCA|Weight-PTQ|evaluation of|Error|resumed|compensation'
)
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


class RunFailedError(GPLQError, RuntimeError):
    """A run that ended with an error."""


def telling(line: str) -> str | None:
    """The message of a line of the log, shortened, if it tells how far the run is."""
    if not TELLING.search(line) or ' - INFO - ' not in line:
        return None
    message = line.split(' - INFO - ', 1)[1].strip()
    return re.sub(r'base_lr.*?(eta: \S+).* (loss: \S+).*', r'\1  \2', message)


def train_command(
    root: Path, config: Path, work_dir: Path, options: list[str], resume: bool
) -> list[str]:
    """Command line of tools/train.py.

    Args:
        root: Folder of ``tools``.
        config: Config file.
        work_dir: Folder of the run.
        options: Of ``--cfg-options``.
        resume: Whether to go on with a run that was interrupted.
    """
    tool = root / 'tools' / 'train.py'
    command = [sys.executable, str(tool), str(config), '--work-dir', str(work_dir)]
    command += ['--resume'] if resume else []
    return command + (['--cfg-options', *options] if options else [])


def shown(command: list[str], root: Path) -> str:
    """A command as a reader would type it in the checkout."""
    return shlex.join(['python', *(part.removeprefix(f'{root}/') for part in command[1:])])


def follow(
    command: list[str], log: Path, on_line: Callable[[str], None], cwd: Path | None = None
) -> None:
    """Runs a command until it ends. It does not outlive its starter, however that ends.

    Args:
        command: The command line.
        log: File that receives the output behind what it holds.
        on_line: Called with every line.
        cwd: Working directory of the command.

    Raises:
        RunFailedError: If the command fails; the message has its last line.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    last = ''
    with (
        log.open('a', encoding='utf-8') as file,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding='utf-8',
            errors='replace',
            cwd=cwd,
            # Linux ends it if this process is killed and cannot do it any more.
            preexec_fn=lambda: LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
        ) as process,
    ):
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                last = line.strip() or last
                on_line(line.rstrip('\n'))
        except BaseException:
            process.kill()
            raise
    code = process.returncode
    if code:
        how = f'was ended by signal {-code}' if code < 0 else 'failed'
        raise RunFailedError(f'the run {how}: {last} (the whole log is in {log})')
