"""Show where the quantization of a model loses accuracy, and suggest other widths.

Writes report.html, analysis.json, pictures and suggested_policy.py. The checkpoint may be of any
state: FP32, calibrated, W32A4 or W4A4.
"""

import argparse
import json
import os
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.dist import is_main_process
from mmengine.registry import RUNNERS
from rich.console import Console
from rich.table import Table

from gplq_mm.analysis import AnalysisSettings, analyze, policy_source, read_run
from gplq_mm.analysis.report import FIGURES, draw_figures, render_page, shorten
from gplq_mm.checkpoint import atomic_write
from gplq_mm.distributed import end_program, one_of_the_ranks
from gplq_mm.errors import SettingError, one_line_errors

WORST = 10
POLICY_FILES = ('suggested_policy.py', 'suggested_policy.json')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file of the run')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out', help='folder of the results; analysis-NAME beside the checkpoint NAME.pth'
    )
    parser.add_argument(
        '--images', type=int, help='training images; 64 for a classifier, 8 for a detector'
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        '--budget-mb',
        type=float,
        help='budget of the suggested widths: packed file without header and compensation, 10^6 '
        'bytes',
    )
    size.add_argument('--weight-bits', type=float, help='or: mean width of the weights')
    parser.add_argument('--act-bits', type=float, help='mean width of the activations')
    parser.add_argument(
        '--widths',
        type=int,
        nargs='+',
        default=list(AnalysisSettings.widths),
        help='widths to choose from (default: %(default)s)',
    )
    parser.add_argument(
        '--round-weights',
        action='store_true',
        help='round weights to nearest where the checkpoint has none that are quantized',
    )
    parser.add_argument(
        '--no-sensitivity', action='store_true', help='leave out the long part and the suggestion'
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override settings')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args(argv)
    if args.images is not None and args.images < 1:
        parser.error(f'--images {args.images} must be at least 1')
    if not all(2 <= bits <= 8 for bits in args.widths):
        parser.error(f'--widths {" ".join(map(str, args.widths))} must lie in 2 to 8')
    if args.no_sensitivity and settings_of(args).has_budget:
        parser.error('a budget needs the sensitivities: leave out --no-sensitivity')
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def settings_of(args: argparse.Namespace) -> AnalysisSettings:
    return AnalysisSettings(
        num_images=args.images,
        sensitivity=not args.no_sensitivity,
        round_weights=args.round_weights,
        budget_mb=args.budget_mb,
        weight_bits=args.weight_bits,
        activation_bits=args.act_bits,
        widths=tuple(sorted(set(args.widths))),
    )


def read_config(args: argparse.Namespace) -> Config:
    cfg = Config.fromfile(args.config)
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    missing = [key for key in ('model', 'train_dataloader', 'val_dataloader') if not cfg.get(key)]
    if missing:
        raise SettingError(
            f'{args.config} has no {", ".join(missing)}; the analysis needs the config of a whole '
            'GPLQ run, such as tools/train.py takes.'
        )
    return cfg


def build_runner(cfg: Config, args: argparse.Namespace, out: Path):
    """A runner with the data of the config and without what only training needs."""
    cfg.launcher, cfg.work_dir = args.launcher, str(out)
    cfg.load_from, cfg.resume = None, False
    cfg.runner_type = 'gplq_mm.GPLQRunner'
    if cfg.model.get('type') == 'gplq_mm.GPLQ':
        cfg.model.teacher = False
    # A float checkpoint is calibrated as the config says.
    hooks = cfg.get('custom_hooks') or []
    cfg.custom_hooks = [hook for hook in hooks if hook['type'] == 'gplq_mm.CalibrationHook']
    return RUNNERS.build(cfg)


def run(args: argparse.Namespace, out: Path) -> dict:
    """Everything that the page shows."""
    cfg = read_config(args)
    has_policy = cfg.model.get('policy') is not None
    analysis = analyze(build_runner(cfg, args, out), args.checkpoint, settings_of(args))
    files = read_run(Path(args.checkpoint).parent, analysis.pop('record'))
    analysis['notes'] += files.pop('notes')
    return {
        'name': f'{Path(args.config).stem}, {Path(args.checkpoint).name}',
        'config': args.config,
        'checkpoint': args.checkpoint,
        'policy_file': os.path.join(out, 'suggested_policy.py'),
        'has_policy': has_policy,
        **analysis,
        **files,
    }


def write(analysis: dict, args: argparse.Namespace, out: Path) -> list[Path]:
    """Writes all files; each appears complete or not at all."""
    texts = {'analysis.json': json.dumps(analysis, indent=1)}
    suggestion = analysis['suggestion']
    if suggestion:
        comments = [f'Suggested by tools/analyze.py for {analysis["name"]}.']
        for part in ('weights', 'activations'):
            chosen = suggestion[part]
            if chosen:
                comments.append(f'{part.capitalize()}: {chosen["size"]} of {chosen["budget"]}.')
        base = os.path.relpath(os.path.realpath(args.config), os.path.realpath(out))
        replaces = analysis['has_policy']
        sources = (policy_source(suggestion['policy'], base, comments, replaces),)
        sources += (json.dumps(suggestion['policy'], indent=1),)
        texts |= zip(POLICY_FILES, sources, strict=True)
    files = {name: text.encode() for name, text in texts.items()}

    def put(names) -> None:
        for name in names:
            atomic_write(out / name, lambda file, name=name: file.write(files[name]))

    # The numbers first: they have taken the time.
    put(list(files))
    pictures = draw_figures(analysis)
    files |= {f'{name}.png': data for name, data in pictures.items()}
    files['report.html'] = render_page(analysis, pictures).encode()
    put([name for name in files if name not in texts])
    # Of an earlier analysis nothing is left that does not belong to this one.
    for name in {*POLICY_FILES, *(f'{name}.png' for name in FIGURES)} - set(files):
        (out / name).unlink(missing_ok=True)
    return [out / name for name in files]


def print_analysis(analysis: dict, console: Console) -> None:
    for note in analysis['notes']:
        console.print(f'[yellow]{note}[/]', soft_wrap=True)
    sensitivity, layers = analysis['sensitivity'], analysis['layers']
    if sensitivity:
        order = sorted(layers, key=lambda name: -sum(sensitivity['cost'][name].values()))
        title = 'the most sensitive layers'
    else:
        order = sorted(layers, key=lambda name: _worst(layers[name]))
        title = 'the layers of the smallest SQNR'
    table = Table(title=title)
    table.add_column('layer', no_wrap=True)
    # W: weights, A: activations. Longer headings do not fit beside the names of layers.
    for column in ('W', 'A', 'W+A'):
        table.add_column(f'SQNR (dB) {column}', justify='right')
    parts = ('weights', 'activations') if sensitivity else ()
    for part in parts:
        table.add_column(f'{sensitivity["metric"]} {part[0].upper()}', justify='right')
    for name in order[:WORST]:
        errors = layers[name]['errors']
        cells = [
            _cell((errors.get(case) or {}).get('sqnr_db'), '.1f')
            for case in ('weights', 'activations', 'both')
        ]
        cells += [_cell(sensitivity['cost'][name].get(part), '.3g') for part in parts]
        table.add_row(shorten(name), *cells)
    console.print(table)
    for part in parts:
        chosen = (analysis['suggestion'] or {}).get(part)
        if chosen:
            console.print(
                f'{part}: {chosen["size"]} (budget {chosen["budget"]}, now {chosen["size_now"]}); '
                f'{sensitivity["metric"]} predicted {chosen["cost"]:.3g}, '
                f'now {chosen["cost_now"]:.3g}',
                soft_wrap=True,
            )


def _worst(layer: dict) -> float:
    values = [error['sqnr_db'] for error in layer['errors'].values()]
    return min((value for value in values if value is not None), default=float('inf'))


def _cell(value: float | None, form: str) -> str:
    return '' if value is None else format(value, form)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    checkpoint = Path(args.checkpoint)
    folder = checkpoint.parent
    if '://' in args.checkpoint:
        # There is nothing beside an address.
        folder = Path('work_dirs', Path(args.config).stem)
    out = Path(args.out or folder / f'analysis-{checkpoint.stem}')
    console = Console()
    with one_line_errors(), one_of_the_ranks():
        analysis = run(args, out)
        if is_main_process():
            print_analysis(analysis, console)
            files = write(analysis, args, out)
            console.print(f'wrote {len(files)} files, open {out / "report.html"}', soft_wrap=True)


if __name__ == '__main__':
    main()
    end_program()
