"""A list of configs, run one after the other; every result is written down at once.

What the zoo knows of a run stands in ``zoo.json`` of its work dir: ``key`` (of code and settings),
``seconds`` of all attempts, samples of the machine's ``load``, and what goes into the metafile,
``measured``, whose ``stages`` are there when it has finished.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import fmean

from filelock import FileLock, Timeout
from mmengine.config import Config

from gplq_mm.checkpoint import atomic_write_text
from gplq_mm.engine.launch import follow, telling, train_command
from gplq_mm.evaluation.provenance import git

from .decisions import difference_text
from .facts import LOAD
from .files import ZooError
from .metafile import final_stage, load_zoo, put_entry, with_seed
from .origin import (
    ENVIRONMENT,
    clean_commit,
    describe_data,
    load_config,
    machine_text,
    run_command,
    run_key,
    shorten_paths,
)
from .pages import write_pages
from .results import read_results

__all__ = ['Job', 'collect', 'plan_jobs', 'publish', 'run_jobs']

# A setting that says where a file lies, and not what is done with it.
PATH_OPTION = re.compile(r'[^=]+=\S*(/|\.(pth|safetensors|sqlite)$)')
SECONDS_BETWEEN_STATES = 20.0
SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Job:
    """A run that is wanted.

    Attributes:
        name: In the metafile.
        config: Its file.
        work_dir: Where it writes.
        options: Of ``--cfg-options``.
        seed: Other than the config's, or None.
        varied: Whether the name says that settings are not the config's.
    """

    name: str
    config: Path
    work_dir: Path
    options: list[str]
    seed: int | None = None
    varied: bool = False


def plan_jobs(
    root: Path,
    configs: list[Path],
    options: list[str],
    variant: str | None,
    work_dirs: Path,
    seeds: Sequence[int] = (0,),
) -> list[Job]:
    """Names the runs of a list of configs, each with all seeds; 0 is that of the configs.

    Raises:
        ZooError: If a config does not lie in a folder of ``configs``, or if settings are changed
            without a name for the variant.
    """
    changed = [option for option in options if not PATH_OPTION.match(option)]
    if changed and variant is None:
        raise ZooError(
            f'{" ".join(changed)} changes what is measured: name it with --variant, so that the '
            'result does not pass for that of the config as it is.'
        )
    jobs = []
    for config in (Path(path).resolve() for path in configs):
        if not config.is_file():
            raise ZooError(f'the config {config} does not exist.')
        if config.parent.parent != root / 'configs' or config.parent.name.startswith('_'):
            raise ZooError(f'{config} does not lie in a folder of {root / "configs"}.')
        for seed in seeds:
            name, own = _model_name(config, variant), options
            if seed:
                name, own = with_seed(name, seed), [*options, f'randomness.seed={seed}']
            job = Job(name, config, work_dirs / name, own, seed or None, variant is not None)
            jobs.append(job)
    return jobs


def _model_name(config: Path, variant: str | None) -> str:
    if variant is not None and not re.fullmatch(r'[\w.-]+', variant):
        raise ZooError(f'--variant {variant} may have letters, digits and _.- only.')
    return config.stem + (f'+{variant}' if variant else '')


def publish(root: Path, *entry) -> list[Path]:
    """Writes all tables anew, and before that an entry (of :func:`put_entry`), if one is given.

    Several calls may do so at the same time. Returns the pages that have changed.
    """
    lock = root / 'work_dirs' / 'zoo.lock'
    lock.parent.mkdir(exist_ok=True)
    with FileLock(lock):
        if entry:
            put_entry(root, *entry)
        return write_pages(root)


def run_jobs(
    root: Path,
    jobs: list[Job],
    say: Callable[[str], None],
    rerun: bool = False,
    allow_dirty: bool = False,
) -> dict[str, str]:
    """Runs what has not been run, and writes metafiles and tables after each.

    Args:
        root: The checkout.
        jobs: The runs; one that fails does not keep the others from running.
        say: Prints a line.
        rerun: Whether a finished run starts again, too.
        allow_dirty: Whether files may differ from the commit.

    Returns:
        What became of each: ``measured``, ``unchanged``, or why it failed.

    Raises:
        ZooError: If a metafile, a layout or a page is not valid before the first run.
    """
    publish(root)
    start, outcomes = time.monotonic(), {}
    for number, job in enumerate(jobs):
        place = f'[{number + 1}/{len(jobs)}] {job.name}'
        elapsed = timedelta(seconds=round(time.monotonic() - start))
        say(f'{place}: {elapsed} elapsed{_remaining(root, jobs, number)}')
        try:
            how, measured = _run(root, job, say, rerun, allow_dirty)
            publish(root, job.name, job.config, measured)
            stage = final_stage(measured['stages'])
            values = f'{measured["stages"][stage]}{difference_text(measured, stage)}'
            say(f'{place}: {how}, {stage}: {values}')
        # Whatever it is, the other runs do not depend on it.
        except Exception as error:
            how = ' '.join(f'{type(error).__name__}: {error}'.split())
            say(f'{place}: failed, {how}')
        outcomes[job.name] = how
    return outcomes


def _remaining(root: Path, jobs: list[Job], number: int) -> str:
    """What the runs from this one on may take; those unknown last as long as those known."""
    models = load_zoo(root).models
    measured = {job.name: models[job.name]['Measured'] for job in jobs if job.name in models}
    known = {name: run['seconds'] for name, run in measured.items() if 'seconds' in run}
    if not known:
        return ''
    left = sum(known.get(job.name, fmean(known.values())) for job in jobs[number:])
    return f', about {timedelta(seconds=round(left))} remaining'


# -- one run ----------------------------------------------------------------------------------


def _run(
    root: Path, job: Job, say: Callable[[str], None], rerun: bool, allow_dirty: bool
) -> tuple[str, dict]:
    """Does one job, if it is to do; returns how, and what the metafile says of it."""
    cfg = load_config(job.config, job.options)
    _check_settings(job, cfg)
    commit, key = clean_commit(root, cfg, allow_dirty), run_key(root, cfg)
    job.work_dir.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(f'{job.work_dir}.lock').acquire(timeout=0)
    except Timeout as error:
        raise ZooError(f'another call runs it in {job.work_dir}, and writes it down.') from error
    with lock:
        state = None if rerun else _read_state(job.work_dir)
        if state is not None and state.get('key') != key:
            say('  starts again: code or settings have changed')
            state = None
        if state is None:
            measured = {
                'command': run_command(root, job.config, cfg, job.options),
                'commit': commit,
                'date': '',
                'machine': machine_text(),
                'data': describe_data(cfg),
            }
            if job.options:
                measured['options'] = [shorten_paths(root, option) for option in job.options]
            _set_aside(job.work_dir)
            state = {'key': key, 'seconds': 0.0, 'load': [], 'measured': measured}
        measured = state['measured']
        if 'stages' in measured:
            return 'unchanged', measured
        _train(root, job, state, say)
        results = read_results(job.work_dir, cfg)
        measured['machine'] += f'{LOAD}{fmean(state["load"]):.1f}'
        measured |= {'seconds': round(state['seconds']), **results}
        _write_state(job.work_dir, state)
        return 'measured', measured


def _check_settings(job: Job, cfg: Config) -> None:
    """Refuses what would pass for a result of the config, or of the seed, and is none."""
    values = {name: os.environ.get(name) for name in sorted(set(ENVIRONMENT.findall(cfg.text)))}
    for name, value in values.items():
        is_place = not value or os.path.isabs(value) or os.path.exists(value)
        if not is_place and not job.varied:
            raise ZooError(
                f'{name}={value} names no file or folder, so it is a setting that changes what is '
                'measured: correct it, unset it, or name the result with --variant.'
            )
    if job.seed and (cfg.get('train_cfg') or {}).get('act_qat_from'):
        raise ZooError(
            'the run goes on with Stage 1 of another run, and has the seed of that one: leave '
            '--seeds out, or set train_cfg.act_qat_from=None with a --variant.'
        )


def _train(root: Path, job: Job, state: dict, say: Callable[[str], None]) -> None:
    """Calls tools/train.py, and notes load and seconds, so that they survive a kill."""
    resume = (job.work_dir / 'last_checkpoint').exists()
    if resume:
        say(f'  resumes what has stopped after {state["seconds"]:.0f} s')
    start, before = time.monotonic(), state['seconds']
    noted = said = 0.0

    def note() -> None:
        nonlocal noted
        noted = time.monotonic()
        state['load'].append(os.getloadavg()[0])
        state['seconds'] = before + noted - start
        _write_state(job.work_dir, state)

    def on_line(line: str) -> None:
        nonlocal said
        now, message = time.monotonic(), telling(line)
        if now - noted > SECONDS_BETWEEN_STATES:
            note()
        # Lines of training come often.
        often = message is not None and message.startswith('Epoch(train)')
        if message is not None and not (often and now - said < SECONDS_BETWEEN_LINES):
            said = now
            say(f'  {message}')

    command = train_command(root, job.config, job.work_dir, job.options, resume)
    note()
    try:
        follow(command, job.work_dir / 'console.log', on_line)
    finally:
        note()


def _read_state(work_dir: Path) -> dict | None:
    """What ``zoo.json`` says of a run, or None where there is none.

    Raises:
        ZooError: If a run lies there that the zoo did not start.
    """
    if (work_dir / 'zoo.json').exists():
        return json.loads((work_dir / 'zoo.json').read_text(encoding='utf-8'))
    if (work_dir / 'summary.json').exists() or (work_dir / 'last_checkpoint').exists():
        raise ZooError(
            f'{work_dir} holds a run that was not started here: write it down with --collect, '
            'choose another --work-dir-root, or give --rerun to start over.'
        )
    return None


def _write_state(work_dir: Path, state: dict) -> None:
    atomic_write_text(work_dir / 'zoo.json', json.dumps(state, indent=2))


def _set_aside(work_dir: Path) -> None:
    """Makes a new work dir; the old one, whatever it holds, is kept until the next time."""
    if work_dir.exists():
        earlier = work_dir.with_name(f'{work_dir.name}.earlier')
        shutil.rmtree(earlier, ignore_errors=True)
        work_dir.rename(earlier)
    work_dir.mkdir()


# -- runs that were started otherwise ---------------------------------------------------------


def collect(root: Path, work_dir: Path, told: dict, variant: str | None = None) -> str:
    """Writes the results of a finished run, with what its folder does not tell, into its metafile.

    Args:
        root: The checkout.
        work_dir: Folder of the run.
        told: ``commit``, ``command`` and, where known, ``machine`` (this one by default) and
            ``seconds``.
        variant: Name of its settings, if they are not the config's.

    Returns:
        Name of the model.

    Raises:
        ZooError: If the run is not finished, something has to be told, or its config is unknown.
    """
    if missing := [f'--{key}' for key in ('commit', 'command') if key not in told]:
        raise ZooError(f'{work_dir} does not say where its results come from: give {missing}.')
    commit = git(root, 'rev-parse', '--verify', '--short=7', f'{told["commit"]}^{{commit}}')
    if commit is None:
        raise ZooError(f'there is no commit {told["commit"]}.')
    dumped = sorted(work_dir.glob('*.py'), key=os.path.getmtime)
    if not dumped:
        raise ZooError(f'{work_dir} holds no run: mmengine leaves its config there.')
    configs = list(root.glob(f'configs/[!_]*/{dumped[-1].name}'))
    if len(configs) != 1:
        raise ZooError(f'{len(configs)} configs have the name {dumped[-1].name}, not one.')
    cfg = Config.fromfile(dumped[-1])
    measured = {
        'command': told['command'],
        'commit': commit,
        'date': '',
        'machine': told.get('machine') or machine_text(),
        'data': describe_data(cfg),
        **({'seconds': round(told['seconds'])} if 'seconds' in told else {}),
        **read_results(work_dir, cfg),
    }
    name = _model_name(configs[0], variant)
    publish(root, name, configs[0], measured)
    return name
