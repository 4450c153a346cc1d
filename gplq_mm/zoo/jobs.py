"""A list of runs that are wanted, and where the list is."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from .files import ZooError
from .metafile import Zoo

__all__ = ['Clock', 'Job', 'Outcome', 'Report', 'plan_jobs']

# A setting that says where a file lies, and not what is done with it.
PATH_OPTION = re.compile(r'[^=]+=\S*(/|\.(pth|safetensors|sqlite)$)')


@dataclass(frozen=True)
class Job:
    """A run that is wanted.

    Attributes:
        name: Of the model in the metafile.
        config: Config file.
        work_dir: Folder of the run.
        options: Of ``--cfg-options``.
    """

    name: str
    config: Path
    work_dir: Path
    options: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        name: Of the model.
        how: ``measured``, ``unchanged`` or ``failed``.
        measured: Content of the metafile.
        error: Why it failed.
    """

    name: str
    how: str
    measured: dict[str, Any] = field(default_factory=dict)
    error: str = ''


class Report:
    """Says how far a list of runs is, on a console and in a file.

    Args:
        print_line: Prints a line.
        log: File that receives the lines, with the time (UTC) in front.
    """

    def __init__(self, print_line: Callable[[str], None], log: Path):
        self.print_line = print_line
        self.log = log

    def say(self, text: str) -> None:
        """Prints a line and writes it down."""
        self.print_line(text)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open('a', encoding='utf-8') as file:
            file.write(f'{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} {text}\n')


def plan_jobs(
    root: Path, configs: list[Path], options: list[str], variant: str | None, work_dirs: Path
) -> list[Job]:
    """Names the runs of a list of configs.

    Args:
        root: The checkout.
        configs: Config files.
        options: Of ``--cfg-options``, for all of them.
        variant: What stands behind ``+`` in the name of a config with other settings.
        work_dirs: Folder of the work dirs.

    Raises:
        ZooError: If a config does not lie in a folder of ``configs`` or is given twice, or if
            settings are changed without a name for the variant.
    """
    changed = [option for option in options if not PATH_OPTION.match(option)]
    if changed and variant is None:
        raise ZooError(
            f'{" ".join(changed)} changes what is measured: name it with --variant, so that the '
            'result does not pass for that of the config as it is.'
        )
    if variant is not None and not re.fullmatch(r'[\w.-]+', variant):
        raise ZooError(f'--variant {variant} may have letters, digits and _.- only.')
    jobs: dict[str, Job] = {}
    for config in (Path(path).resolve() for path in configs):
        if not config.is_file():
            raise ZooError(f'the config {config} does not exist.')
        if config.parent.parent != root / 'configs' or config.parent.name.startswith('_'):
            raise ZooError(f'{config} does not lie in a folder of {root / "configs"}.')
        name = config.stem + (f'+{variant}' if variant else '')
        if name in jobs:
            raise ZooError(f'{name} is given twice.')
        jobs[name] = Job(name, config, work_dirs / name, options)
    return list(jobs.values())


class Clock:
    """Expects the time of a list of runs from what the same or the other runs have taken.

    Args:
        zoo: What was measured so far.
        names: The runs.
    """

    def __init__(self, zoo: Zoo, names: list[str]):
        self.start = time.monotonic()
        self.left = list(names)
        self.known: dict[str, float] = {}
        for name in names:
            seconds = zoo.models.get(name, {}).get('Measured', {}).get('seconds')
            if seconds:
                self.known[name] = seconds

    def done(self, name: str, seconds: float | None) -> None:
        """A run has ended, and took so many seconds, if it took any."""
        self.left.remove(name)
        if seconds:
            self.known[name] = seconds

    def text(self) -> str:
        """Time since the start, and what is expected to remain."""
        elapsed = timedelta(seconds=round(time.monotonic() - self.start))
        if not self.known:
            return f'{elapsed} elapsed'
        mean = sum(self.known.values()) / len(self.known)
        left = sum(self.known.get(name, mean) for name in self.left)
        return f'{elapsed} elapsed, about {timedelta(seconds=round(left))} remaining'
