"""A list of configs, run one after the other; every result is written down at once."""

import time
from contextlib import suppress
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from mmengine.config import Config

from .caption import LOAD
from .checkout import (
    clean_commit,
    code_hash,
    config_hash,
    load_config,
    machine_text,
    run_command,
    shorten_paths,
)
from .data import describe_data
from .files import ZooError
from .jobs import Clock, Job, Outcome, Report
from .launch import Line, RunFailedError, Tail, follow, train_command
from .metafile import load_zoo, put_entry
from .pages import write_pages
from .results import read_results, result_time
from .state import FAILED, FINISHED, RUNNING, RunState, locked, next_step, set_aside

__all__ = ['run_jobs']

SECONDS_BETWEEN_STATES = 20.0
SECONDS_BETWEEN_LINES = 10.0


def run_jobs(
    root: Path,
    jobs: list[Job],
    report: Report,
    rerun: bool = False,
    allow_dirty: bool = False,
) -> list[Outcome]:
    """Runs what has not been run, and writes metafiles and tables after each.

    Args:
        root: The checkout.
        jobs: The runs.
        report: Where it says how far it is.
        rerun: Whether a finished run starts again, too.
        allow_dirty: Whether files may differ from the commit.

    Returns:
        What became of each; a run that fails does not keep the others from running.

    Raises:
        ZooError: If a metafile, a layout or a page is not valid before the first run.
    """
    write_pages(root)
    clock = Clock(load_zoo(root), [job.name for job in jobs])
    outcomes = []
    for number, job in enumerate(jobs, start=1):
        place = f'[{number}/{len(jobs)}] {job.name}'
        report.say(f'{place}: {clock.text()}')
        try:
            outcome = _Run(root, job, report).do(rerun, allow_dirty)
            put_entry(root, job.name, job.config, outcome.measured)
            write_pages(root)
        # Whatever it is, the other runs do not depend on it.
        except Exception as error:
            message = ' '.join(f'{type(error).__name__}: {error}'.split())
            outcome = Outcome(job.name, 'failed', error=message)
        clock.done(job.name, outcome.measured.get('seconds'))
        report.say(f'{place}: {outcome.how} {outcome.error}'.rstrip())
        outcomes.append(outcome)
    return outcomes


class _Run:
    """One job, from its config to what the metafile says of it."""

    def __init__(self, root: Path, job: Job, report: Report):
        self.root, self.job, self.report = root, job, report
        self.last_line = 0.0

    def do(self, rerun: bool, allow_dirty: bool) -> Outcome:
        job = self.job
        cfg = load_config(job.config, job.options)
        with (
            Tail(job.work_dir / 'console.log') as tail,
            locked(job.work_dir, partial(self._wait, tail)) as lock,
        ):
            # Not before: while it waited, files may have changed.
            new = self._describe(cfg, allow_dirty)
            state = None if rerun else RunState.read(job.work_dir)
            step, why = ('start', '') if rerun else next_step(state, new, job.work_dir)
            if step == 'resume' and self._has_ended(state, cfg):
                # The zoo was killed before it could write it down.
                return Outcome(job.name, 'measured', state.measured)
            if why:
                self.report.say(f'  {step}: {why}')
            if step == 'skip':
                return Outcome(job.name, 'unchanged', state.measured)
            if step == 'start':
                state = new
                state.data = describe_data(cfg)
                set_aside(job.work_dir)
                # Logs of an earlier run are older.
                state.started = time.time()
            self._train(state, step == 'resume', lock)
            self._write_down(state, cfg)
            return Outcome(job.name, 'measured', state.measured)

    def _wait(self, tail: Tail, first: bool) -> None:
        if first:
            self.report.say(f'  waits for the run in {self.job.work_dir} that goes on already')
        for line in tail.lines():
            self._show(line)

    def _show(self, line: Line, _seconds: float = 0.0) -> None:
        """Says how far the run is; lines of training come often, so not each of them."""
        message, now = line.telling, time.monotonic()
        often = message is not None and message.startswith('Epoch(train)')
        if message is None or (often and now - self.last_line < SECONDS_BETWEEN_LINES):
            return
        self.last_line = now
        self.report.say(f'  {message}')

    def _describe(self, cfg: Config, allow_dirty: bool) -> RunState:
        job, root = self.job, self.root
        return RunState(
            name=job.name,
            config=job.config.relative_to(root).as_posix(),
            options=[shorten_paths(root, option) for option in job.options],
            config_hash=config_hash(cfg),
            code_hash=code_hash(root),
            commit=clean_commit(root, cfg, allow_dirty),
            command=run_command(root, job.config, cfg, job.options),
            machine=machine_text(),
        )

    def _train(self, state: RunState, resume: bool, lock: int) -> None:
        work_dir = self.job.work_dir
        state.status, state.error = RUNNING, ''
        state.write(work_dir)
        start, before = time.monotonic(), state.seconds
        last_state = start

        def on_tick() -> None:
            nonlocal last_state
            if time.monotonic() - last_state > SECONDS_BETWEEN_STATES:
                last_state = time.monotonic()
                state.sample_load()
                state.seconds = before + last_state - start
                state.write(work_dir)

        tool = self.root / 'tools' / 'train.py'
        command = train_command(tool, self.job.config, work_dir, self.job.options, resume)
        try:
            log = work_dir / 'console.log'
            follow(command, log, self._show, on_tick, keep_open=(lock,))
        except RunFailedError as error:
            state.status, state.error = FAILED, str(error)
            raise
        finally:
            state.sample_load()
            state.seconds = before + time.monotonic() - start
            state.write(work_dir)

    def _has_ended(self, state: RunState, cfg: Config) -> bool:
        """Whether the results are complete though nobody has waited for them."""
        with suppress(ZooError):
            read_results(self.job.work_dir, cfg, state.started)
            end = result_time(self.job.work_dir)
            state.seconds += max(0.0, end - state.updated)
            self._write_down(state, cfg)
            return True
        return False

    def _write_down(self, state: RunState, cfg: Config) -> None:
        results = read_results(self.job.work_dir, cfg, state.started)
        end = datetime.fromtimestamp(result_time(self.job.work_dir), timezone.utc)
        load = state.mean_load
        state.measured = {
            'command': state.command,
            'commit': state.commit,
            'date': f'{end:%Y-%m-%d}',
            'machine': state.machine + ('' if load is None else f'{LOAD}{load:.1f}'),
            'data': state.data,
            **({'options': state.options} if state.options else {}),
            'seconds': round(state.seconds),
            **results,
        }
        state.status = FINISHED
        state.write(self.job.work_dir)
