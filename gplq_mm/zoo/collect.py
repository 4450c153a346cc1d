"""Finished runs that were started otherwise, written down with what is told about them."""

from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from mmengine.config import Config

from ..evaluation.provenance import git
from .checkout import machine_text
from .data import describe_data
from .files import ZooError
from .metafile import put_entry
from .results import read_results, result_time
from .state import FINISHED, RunState

__all__ = ['Told', 'collect']


@dataclass(frozen=True)
class Told:
    """What a work dir does not tell of a run that the zoo did not start.

    Attributes:
        commit: Of the code.
        command: That repeats it.
        machine: In words. Defaults to this machine.
        seconds: That it has taken, where known.
        config: Config file. Defaults to the one of the name that the work dir holds.
        variant: As in :func:`~gplq_mm.zoo.jobs.plan_jobs`.
    """

    commit: str | None = None
    command: str | None = None
    machine: str | None = None
    seconds: float | None = None
    config: Path | None = None
    variant: str | None = None


def collect(root: Path, work_dir: Path, told: Told) -> str:
    """Writes the results of a finished run into its metafile.

    Args:
        root: The checkout.
        work_dir: Folder of the run.
        told: What the folder itself does not hold; not for a run of the zoo, which knows it all.

    Returns:
        Name of the model.

    Raises:
        ZooError: If the run is not finished, something has to be told, or its config is unknown.
    """
    state = RunState.read(work_dir)
    if state is not None:
        if told != Told():
            raise ZooError(f'{work_dir} is a run of the zoo and knows its own commit and command.')
        if state.status != FINISHED:
            raise ZooError(f'the run in {work_dir} is not finished; call the zoo with its config.')
        put_entry(root, state.name, root / state.config, state.measured)
        return state.name
    missing = [f'--{key}' for key in ('commit', 'command') if getattr(told, key) is None]
    if missing:
        raise ZooError(f'{work_dir} does not say where its results come from: give {missing}.')
    commit = git(root, 'rev-parse', '--verify', '--short=7', f'{told.commit}^{{commit}}')
    if commit is None:
        raise ZooError(f'there is no commit {told.commit}.')
    config, cfg = _config(root, work_dir, told.config)
    results = read_results(work_dir, cfg)
    date = datetime.fromtimestamp(result_time(work_dir), timezone.utc)
    measured = {
        'command': told.command,
        'commit': commit,
        'date': f'{date:%Y-%m-%d}',
        'machine': told.machine or machine_text(),
        'data': describe_data(cfg),
        **({} if told.seconds is None else {'seconds': round(told.seconds)}),
        **results,
    }
    name = config.stem + (f'+{told.variant}' if told.variant else '')
    put_entry(root, name, config, measured)
    return name


def _config(root: Path, work_dir: Path, config: Path | None) -> tuple[Path, Config]:
    """The config file, and all settings of the run as mmengine has written them down."""
    dumped = sorted(work_dir.glob('*.py'), key=lambda path: path.stat().st_mtime)
    if not dumped:
        raise ZooError(f'{work_dir} holds no run: mmengine leaves its config there.')
    if config is None:
        found = [
            path for path in root.glob(f'configs/*/{dumped[-1].name}') if path.parent.name[0] != '_'
        ]
        if len(found) != 1:
            raise ZooError(
                f'{len(found)} configs have the name {dumped[-1].name}; give the right --config.'
            )
        config = found[0]
    return config.resolve(), Config.fromfile(dumped[-1])
