"""Progress of long steps: a bar with remaining time in a terminal, plain lines in a log."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from mmengine.dist import is_main_process
from mmengine.logging import MMLogger
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ['track']

Item = TypeVar('Item')
SECONDS_BETWEEN_LINES = 10.0


def track(items: Iterable[Item], total: int, description: str) -> Iterator[Item]:
    """Yields ``items`` and tells how far it is; silent on all ranks but the first.

    Args:
        items: What to go through.
        total: How many there are.
        description: What is being done.
    """
    if not is_main_process():
        yield from items
        return
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn('{task.description}'),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            yield from progress.track(items, total=total, description=description)
        return
    logger = MMLogger.get_current_instance()
    start = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if done == total or now - last > SECONDS_BETWEEN_LINES:
            last = now
            remaining = (now - start) / done * (total - done)
            logger.info(
                f'{description}: {done}/{total}, {now - start:.0f} s elapsed, '
                f'{remaining:.0f} s remaining'
            )
