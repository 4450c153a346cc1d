"""One line of output and one log file for each step of an installation.

Only the standard library, in a syntax that old Pythons read too: see ``install.py``.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / '.venv'
PYTHON = VENV / 'bin' / 'python'

NO_VENV = (
    'Python cannot create virtual environments: run `apt-get install python3-venv`, '
    'then make again.'
)
NO_HEADERS = 'The Python headers are missing: run `apt-get install python3-dev`, then make again.'
NO_COMPILER = 'There is no C++ compiler: run `apt-get install build-essential`, then make again.'

# What a failing step prints last: the first pattern found at the end of its log decides.
HINTS = (
    (r'No space left on device', 'The disk is full: free about 10 GB, then run make again.'),
    (r'ensurepip is not\s+available|No module named .?(venv|ensurepip)', NO_VENV),
    (r'Python\.h: No such file', NO_HEADERS),
    (r"[cg]\+\+: .*not found|No such file or directory: '[cg]\+\+'", NO_COMPILER),
    (
        r'cc1plus.*[Kk]illed|Killed signal',
        'The compiler ran out of memory: run make again with MAX_JOBS=1.',
    ),
    (
        r'Temporary failure in name resolution|Connection(Error| refused| reset|.*timed out)'
        r'|(Connect|Read)Timeout|Read timed out|Network is unreachable|ProxyError|SSLError'
        r'|Could not fetch URL|IncompleteRead',
        "The package index cannot be reached: check the network and pip's settings, "
        'then run make again.',
    ),
    (
        r'No matching distribution found|ResolutionImpossible',
        'pip found no release that fits constraints.txt: check that the package index can be '
        'reached and serves this Python and this machine.',
    ),
)


class StepError(Exception):
    """A step that cannot go on; the message is the one sentence that says what to do."""


def hint(output):
    """Returns the sentence that says what to do about a failed command's output."""
    tail = '\n'.join(output.splitlines()[-200:])
    for pattern, sentence in HINTS:
        if re.search(pattern, tail):
            return sentence
    return 'The lines above say why; run make again once that is solved.'


class Step:
    """A step's line, ``[2/5] torch 2.12.1 ... ok (65 s)``, its log and its commands.

    On a terminal the line counts the seconds. Elsewhere it appears when the step ends, and
    a step that takes longer says once a minute that it is alive.

    Args:
        head: the number of the step, such as ``[2/5]``.
        title: what the line names; may change until the step ends.
        log: path of the log file.
    """

    def __init__(self, head, title, log):
        self.head = head
        self.title = title
        self.log = log
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_text('')
        self._start = time.monotonic()
        self._live = sys.stdout.isatty()
        self._minutes = 0
        self._alive('')

    def say(self, text):
        """Prints a line for good."""
        print('{}{} {}'.format('\r\033[K' if self._live else '', self.head, text), flush=True)

    def end(self, result):
        """Prints how the step ended; ``{seconds}`` in the text becomes its duration."""
        self.say(f'{self.title} ... ' + result.format(seconds=self._seconds()))

    def fail(self, sentence):
        """Prints the end of the log and the sentence that says what to do."""
        self.end('failed')
        tail = self._output().splitlines()[-8:]
        if tail:
            print('\n'.join('      ' + line[:200] for line in tail))
            print(f'      The whole log: {self.log.relative_to(ROOT)}')
        print(sentence, flush=True)

    def run(self, *command, **options):
        """Runs a command in the project root, its output in the log.

        Args:
            command: the program and its arguments.
            env: environment variables to add.
            progress: function from the log's text to a few words about how far it is.

        Raises:
            StepError: If the command fails.
        """
        progress = options.get('progress') or (lambda output: '')
        with self.log.open('ab') as log:
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=str(ROOT),
                env=environment(options.get('env') or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            while process.poll() is None:
                self._alive(f'{progress(self._output())}{self._seconds()} s')
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise
        if process.returncode:
            raise StepError(hint(self._output()))

    def pip(self, *arguments, **options):
        """Runs the environment's pip."""
        self.run(PYTHON, '-m', 'pip', *arguments, **options)

    def pip_install(self, *arguments, **options):
        """Installs packages; Python compiles a module when it is imported, which few are."""
        self.pip('install', '--no-compile', *arguments, **options)

    def _alive(self, progress):
        if self._live:
            text = f'{self.head} {self.title} ... {progress}'
            width = shutil.get_terminal_size().columns - 1
            print('\r\033[K' + text[:width], end='', flush=True)
        elif self._seconds() // 60 > self._minutes:
            self._minutes = self._seconds() // 60
            print(f'      {self.title} ... {progress} so far', flush=True)

    def _output(self):
        return self.log.read_text(errors='replace')

    def _seconds(self):
        return int(time.monotonic() - self._start)


def environment(extra):
    """Returns the variables that a step's commands see; those of pip's index stay as they are."""
    result = dict(os.environ)
    for name in ('PYTHONPATH', 'PYTHONHOME', 'PYTHONWARNINGS'):
        result.pop(name, None)
    result.update(
        PATH=os.pathsep.join([str(PYTHON.parent), result.get('PATH', os.defpath)]),
        PIP_DISABLE_PIP_VERSION_CHECK='1',
        PIP_NO_INPUT='1',
        PIP_PROGRESS_BAR='off',
        PIP_ROOT_USER_ACTION='ignore',
        PIP_USER='0',
        PYTHONUNBUFFERED='1',
    )
    result.update(extra)
    return result
