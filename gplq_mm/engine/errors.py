"""What a user reads when a run cannot go on."""

import linecache
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ['one_line_errors']


# mmengine's registries and configs say which name they do not know.
EXPLAINING = ('gplq_mm.', 'mmengine.registry.', 'mmengine.config.')


def _explains_itself(error: Exception) -> bool:
    """Whether a ``raise`` statement made the error on purpose, and no accident."""
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    if not frame.f_globals.get('__name__', '').startswith(EXPLAINING):
        return False
    return linecache.getline(frame.f_code.co_filename, line).lstrip().startswith('raise ')


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line, without a traceback, for errors that explain themselves.

    These are the errors that gplq_mm raises on purpose, whose messages name cause and mend, and
    those of the file system. Any other error is a bug, and keeps its traceback.
    """
    try:
        yield
    except Exception as error:
        if not (isinstance(error, OSError) or _explains_itself(error)):
            raise
        # Not chained: the message says it all.
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        message = ' '.join(str(text).split())
        sys.exit(f'{type(error).__name__}: {message}')
