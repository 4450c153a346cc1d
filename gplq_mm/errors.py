"""What a user reads when something cannot go on."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class GPLQError(Exception):
    """Base of all errors whose message tells a user what is wrong and what to do.

    Whatever else is raised is a bug, or a call that breaks the documented shapes and types.
    """


class SettingError(GPLQError, ValueError):
    """A setting, or two of them together, that cannot be used."""


class DataError(GPLQError, ValueError):
    """Images, labels or statistics of them that cannot be used."""


class StateError(GPLQError, RuntimeError):
    """A step that is asked of a model in a state which does not allow it."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line, without a traceback, for errors that are the user's to mend.

    These are :class:`GPLQError` and the errors of the system, which name a file. Any other error
    keeps its traceback.
    """
    try:
        yield
    except (GPLQError, OSError) as error:
        sys.exit(f'{type(error).__name__}: {" ".join(str(error).split())}')
