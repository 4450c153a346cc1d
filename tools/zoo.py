"""The model zoo: run configs, write what they measure into metafiles, make the tables from these.

With configs: runs them one after the other by tools/train.py; what has finished is skipped, what
was interrupted is resumed. Without: writes all tables anew.
"""

import argparse
import signal
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gplq_mm.engine import one_line_errors
from gplq_mm.zoo import (
    Outcome,
    Report,
    Told,
    check_pages,
    collect,
    final_stage,
    load_zoo,
    plan_jobs,
    run_jobs,
    write_pages,
)

ROOT = Path(__file__).resolve().parent.parent


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
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
    runs.add_argument('--rerun', action='store_true', help='start again what has finished, too')
    runs.add_argument(
        '--allow-dirty', action='store_true', help='measure code that differs from its commit'
    )
    taken = parser.add_argument_group('finished runs')
    taken.add_argument('--collect', nargs='+', type=Path, metavar='WORK_DIR')
    taken.add_argument('--commit', help='of the code, of a run that was not started here')
    taken.add_argument('--command', help='that repeats it')
    taken.add_argument('--machine', help='in words; defaults to this one')
    taken.add_argument('--seconds', type=float, help='that it has taken')
    taken.add_argument('--config', type=Path, help='where its name tells too little')
    args = parser.parse_args(argv)
    if sum((bool(args.configs), args.check, args.collect is not None)) > 1:
        parser.error('give configs, --collect or --check')
    return args


def show(outcomes: list[Outcome], console: Console) -> None:
    """Prints the last stage of every run."""
    table = Table(title='runs')
    for title in ('run', '', 'stage', 'metrics', 'feature distance', 'seconds'):
        table.add_column(title)
    for outcome in outcomes:
        cells = ['', '', '', '']
        if outcome.measured:
            stages = outcome.measured['stages']
            stage = final_stage(stages)
            values = stages[stage]
            metrics = [
                f'{key} {values[key]:.2f}'
                for key in ('top1', 'bbox_mAP', 'segm_mAP')
                if key in values
            ]
            distance = values.get('relative_l2')
            cells = [stage, ', '.join(metrics), '' if distance is None else f'{distance:.3f}']
            cells.append(str(outcome.measured.get('seconds', '')))
        table.add_row(outcome.name, outcome.how, *cells)
    console.print(table)


def run(args: argparse.Namespace, console: Console, root: Path) -> int:
    """Runs the configs; returns the exit status."""
    work_dirs = args.work_dir_root.resolve()
    jobs = plan_jobs(root, args.configs, args.cfg_options, args.variant, work_dirs)
    report = Report(
        lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True),
        work_dirs / 'zoo.log',
    )
    # Both ways end the run as well, and leave everything to be resumed.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        outcomes = run_jobs(root, jobs, report, args.rerun, args.allow_dirty)
    except KeyboardInterrupt:
        sys.exit('interrupted: call again to go on')
    finally:
        signal.signal(signal.SIGTERM, before)
    show(outcomes, console)
    failed = [outcome for outcome in outcomes if outcome.how == 'failed']
    for outcome in failed:
        console.print(f'{outcome.name}: {outcome.error}', style='red', markup=False, soft_wrap=True)
    return 1 if failed else 0


def main(argv: list[str] | None = None, root: Path = ROOT) -> None:
    args = parse_args(argv)
    console = Console()
    with one_line_errors():
        if args.configs:
            sys.exit(run(args, console, root))
        if args.check:
            messages = check_pages(root)
            for message in messages:
                console.print(message, markup=False, highlight=False, soft_wrap=True)
            if messages:
                sys.exit('Correct the metafile, or call tools/zoo.py to write the tables anew.')
            console.print(f'{len(load_zoo(root).models)} models: all tables are as measured')
            return
        told = Told(
            args.commit, args.command, args.machine, args.seconds, args.config, args.variant
        )
        for work_dir in args.collect or []:
            console.print(f'{collect(root, work_dir, told)}: written down', highlight=False)
        for page in write_pages(root):
            console.print(f'{page.relative_to(root)}: tables written', highlight=False)


if __name__ == '__main__':
    main()
