"""Progress of long steps: a bar with remaining time in a terminal, plain lines in a log."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from mmengine.dist import is_main_process
from mmengine.logging import MMLogger
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .ptq import Progress as PTQProgress

Item = TypeVar('Item')
SECONDS_BETWEEN_LINES = 10.0


def track(items: Iterable[Item], total: int | None, description: str) -> Iterator[Item]:
    """Yields ``items`` and tells how far it is; silent on all ranks but the first.

    Args:
        items: What to go through.
        total: How many there are, or None where nobody knows.
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
            text = f'{description}: {done}/{total or "?"}, {now - start:.0f} s elapsed'
            if total is not None:
                text += f', {(now - start) / done * (total - done):.0f} s remaining'
            logger.info(text)


@contextmanager
def show_steps(total: int, description: str) -> Iterator[Callable[[], None]]:
    """:func:`track` for what is no loop: gives a function to call after each of ``total`` steps."""
    ticks = track(range(total), total, description)
    next(ticks, None)
    try:
        yield lambda: next(ticks, None)
    finally:
        ticks.close()


@contextmanager
def show_weight_ptq() -> Iterator[Callable[[PTQProgress], None]]:
    """One bar (or lines in a log) over all of Stage 2, for ``quantize_weights(report=...)``.

    Its length is time, since units differ by more than a factor of ten. Silent on all ranks but
    the first.
    """
    if not is_main_process():
        yield lambda _progress: None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from _log_weight_ptq()
        return
    columns = (
        TextColumn('Weight-PTQ {task.fields[unit]}'),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn('{task.fields[times]}'),
    )
    bar = Progress(*columns, console=console)
    task = bar.add_task('', unit='', times='')

    def report(progress: PTQProgress) -> None:
        bar.update(
            task,
            completed=progress.elapsed,
            total=progress.elapsed + progress.remaining,
            unit=f'{progress.position}/{progress.units} {progress.unit or "units"}',
            times=f'{_clock(progress.elapsed)}, {_clock(progress.remaining)} remaining',
        )
        # Not before: reading the images has a bar of its own.
        bar.start()

    try:
        yield report
    finally:
        bar.stop()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f'{minutes // 60}:{minutes % 60:02}:{seconds:02}'


def _log_weight_ptq() -> Iterator[Callable[[PTQProgress], None]]:
    logger = MMLogger.get_current_instance()
    last, latest = -SECONDS_BETWEEN_LINES, None

    def report(progress: PTQProgress) -> None:
        nonlocal last, latest
        latest = progress
        if progress.elapsed - last > SECONDS_BETWEEN_LINES:
            last = progress.elapsed
            share = progress.elapsed / (progress.elapsed + progress.remaining)
            logger.info(
                f'Weight-PTQ: {share:.0%}, {progress.position}/{progress.units} '
                f'{progress.unit or "units"}, {progress.elapsed:.0f} s elapsed, '
                f'{progress.remaining:.0f} s remaining'
            )

    yield report
    if latest is not None:
        logger.info(f'Weight-PTQ: done, {latest.units} units in {latest.elapsed:.0f} s')
