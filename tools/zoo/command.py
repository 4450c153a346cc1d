"""The command line of the zoo.

With configs: runs them one after the other by tools/train.py; what has finished is skipped, what
was interrupted is resumed. Without: writes all tables anew.
"""

import argparse
import signal
import sys
from pathlib import Path

from rich.console import Console

from gplq_mm.errors import one_line_errors

from .metafile import load_zoo
from .pages import check_pages
from .run import collect, plan_jobs, publish, run_jobs

ROOT = Path(__file__).resolve().parents[2]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='tools/zoo.py', description=__doc__)
    parser.add_argument('configs', nargs='*', type=Path, metavar='CONFIG', help='configs to run')
    parser.add_argument(
        '--check', action='store_true', help='compare the tables with the metafiles, write nothing'
    )
    runs = parser.add_argument_group('runs')
    runs.add_argument('--work-dir-root', type=Path, default=Path('work_dirs'), metavar='FOLDER')
    runs.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='of tools/train.py'
    )
    runs.add_argument(
        '--variant', metavar='NAME', help='names a config with other settings: CONFIG+NAME'
    )
    runs.add_argument(
        '--seeds',
        nargs='+',
        type=int,
        default=[0],
        metavar='SEED',
        help='runs of each config; 0 is its own',
    )
    runs.add_argument('--rerun', action='store_true', help='start again what has finished, too')
    runs.add_argument(
        '--allow-dirty', action='store_true', help='measure code that differs from its commit'
    )
    taken = parser.add_argument_group('a finished run that was not started here')
    taken.add_argument('--collect', type=Path, metavar='WORK_DIR')
    taken.add_argument('--commit', help='of the code')
    taken.add_argument('--command', help='that repeats it')
    taken.add_argument('--machine', help='in words; defaults to this one')
    taken.add_argument('--seconds', type=float, help='that it has taken')
    args = parser.parse_args(argv)
    if sum((bool(args.configs), args.check, args.collect is not None)) > 1:
        parser.error('give configs, --collect or --check')
    return args


def _do(args: argparse.Namespace, root: Path, console: Console) -> str | None:
    """Does what is asked for; returns what makes the command fail."""

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    if args.configs:
        work_dirs = args.work_dir_root.resolve()
        jobs = plan_jobs(root, args.configs, args.cfg_options, args.variant, work_dirs, args.seeds)
        outcomes = run_jobs(root, jobs, say, args.rerun, args.allow_dirty)
        failed = [name for name in outcomes if outcomes[name] not in ('measured', 'unchanged')]
        return '\n'.join(f'{name}: {outcomes[name]}' for name in failed) or None
    if args.check:
        if messages := check_pages(root):
            say('\n'.join(messages))
            return 'Correct the metafile, or call tools/zoo.py to write the tables anew.'
        say(f'{len(load_zoo(root).models)} models: all tables are as measured')
        return None
    if args.collect:
        keys = ('commit', 'command', 'machine', 'seconds')
        told = {key: value for key in keys if (value := getattr(args, key)) is not None}
        say(f'{collect(root, args.collect, told, args.variant)}: written down')
    for page in publish(root):
        say(f'{page.relative_to(root)}: tables written')
    return None


def main(argv: list[str] | None = None, root: Path = ROOT) -> None:
    """Runs the command line ``argv`` for the checkout ``root``."""
    args = parse_args(argv)
    # As at Ctrl-C, the run in progress is ended with the zoo.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with one_line_errors():
            failure = _do(args, root, Console())
    except KeyboardInterrupt:
        sys.exit('interrupted: call again to go on')
    if failure:
        sys.exit(failure)
