"""Measure packed layers and models, and training, against what a user could run instead.

All candidates take turns, on the same number of threads; a row is the median over the rounds.
`ptq` measures what Stage 2 costs.
"""

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from rich.console import Console

from gplq_mm.benchmark import linear, model, ptq, train
from gplq_mm.benchmark.report import Bench, environment, write
from gplq_mm.benchmark.synthetic import architecture_of, float_model
from gplq_mm.errors import one_line_errors

CONFIGS = Path(__file__).resolve().parent.parent / 'configs'
ARCHITECTURES = {
    'vit-tiny': '_base_/models/vit-tiny_p16_224.py',
    'deit-tiny': 'gplq/gplq_deit-tiny_w4a4_8xb16-1e_in1k.py',
    'deit-small': 'gplq/gplq_deit-small_w4a4_8xb16-1e_in1k.py',
    'deit-base': 'gplq/gplq_deit-base_w4a4_8xb16-1e_in1k.py',
    'swin-tiny': 'gplq/gplq_swin-tiny_w4a4_8xb16-1e_in1k.py',
}
# Above this something else is using the machine.
QUIET_LOAD = 0.5


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)

    machine = argparse.ArgumentParser(add_help=False)
    cores = len(os.sched_getaffinity(0))
    machine.add_argument('--threads', type=positive, default=cores, help='of every engine')
    machine.add_argument(
        '--out', metavar='FILE.json', type=json_path, help='rows; a .csv and a .png come beside it'
    )
    turns = argparse.ArgumentParser(add_help=False)
    turns.add_argument('--batch', type=positive, nargs='+', default=[8], help='images at a time')
    turns.add_argument('--rounds', type=positive, default=15, help='turns of every candidate')
    names = f'{", ".join(ARCHITECTURES)}, or a config file'
    maps = dict(choices=['none', 'QwT', 'QwTv2'], help='map beside every block of our model')

    def add(run: Callable, impls: Iterable[str], text: str) -> argparse.ArgumentParser:
        name, impls = run.__name__.removeprefix('run_'), list(impls)
        command = commands.add_parser(name, parents=[machine, turns], help=text)
        command.add_argument('--impls', nargs='+', choices=impls, default=impls)
        # The first is what the others are compared with.
        command.set_defaults(run=run, base=impls[:1])
        return command

    command = add(run_linear, linear.IMPLS, 'single linear layers')
    text = f'MxKxN (rows, inputs, outputs), or the layers of {names}'
    command.add_argument('--shapes', nargs='+', default=['deit-small'], metavar='SHAPES', help=text)
    command = add(run_model, model.IMPLS, 'whole models')
    command.add_argument('--model', nargs='+', default=['deit-small'], help=names)
    command.add_argument('--compensation', default='none', **maps)
    text = 'training steps of classifiers: memory and time, teacher included'
    command = add(run_train, train.IMPLS, text)
    command.add_argument('--model', nargs='+', default=['vit-tiny'], help=names)

    command = commands.add_parser('ptq', parents=[machine], help='cost of Weight-PTQ')
    command.add_argument('--model', default='swin-tiny', help=names)
    command.add_argument('--images', type=positive, default=512)
    command.add_argument('--batch', type=positive, default=16, help='images at a time')
    command.add_argument('--data', metavar='FOLDER', help='of images; without, they are random')
    command.add_argument('--weights', metavar='FILE', help='float checkpoint; without, random')
    command.add_argument('--method', default='GPTQ')
    command.add_argument('--compensation', default='QwT', **maps)
    command.set_defaults(run=run_ptq, impls=[], base=[], rounds=1)
    args = parser.parse_args(argv)
    args.impls = list(dict.fromkeys(args.base + args.impls))
    return args


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{text} must be at least 1')
    return value


def json_path(text: str) -> Path:
    path = Path(text)
    if path.suffix != '.json':
        raise argparse.ArgumentTypeError(f'{text} must end in .json')
    return path


def load_config(name: str) -> Config:
    """Config of a named model or a file."""
    path = CONFIGS / ARCHITECTURES[name] if name in ARCHITECTURES else Path(name)
    if name not in ARCHITECTURES and path.suffix != '.py':
        sys.exit(
            f'unknown model {name!r}: give one of {", ".join(ARCHITECTURES)}, or a config file.'
        )
    cfg = Config.fromfile(path)
    if 'model' not in cfg:
        sys.exit(f'{path} has no "model".')
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    return cfg


def title_of(name: str) -> str:
    return name if name in ARCHITECTURES else Path(name).stem


def parse_shapes(texts: list[str], batches: list[int]) -> list[linear.Shape]:
    """Shapes of ``--shapes``; a shape given in numbers has its rows and takes no batch."""
    found: dict[linear.Shape, None] = {}
    for text in texts:
        if re.fullmatch(r'\d+x\d+x\d+', text):
            shape = tuple(map(int, text.split('x')))
            if min(shape) < 1:
                sys.exit(f'shape {text} has an empty side.')
            found.setdefault(shape)
        elif re.fullmatch(r'[\dx]+', text):
            sys.exit(f'shape {text!r} is not of the form MxKxN, such as 1576x384x1536.')
        else:
            layers = linear.layer_shapes(*float_model(load_config(text)))
            found.update(dict.fromkeys((n * m, *rest) for n in batches for m, *rest in layers))
    return list(found)


def run_linear(args: argparse.Namespace, bench: Bench) -> None:
    for shape in parse_shapes(args.shapes, args.batch):
        linear.measure(bench, shape, args.impls)


def run_model(args: argparse.Namespace, bench: Bench) -> None:
    for name in args.model:
        plain, image = float_model(load_config(name))
        for batch in args.batch:
            images = torch.randn(batch, *image)
            model.measure(bench, title_of(name), plain, images, args.impls, args.compensation)


def run_train(args: argparse.Namespace, bench: Bench) -> None:
    for name in args.model:
        architecture, image = architecture_of(load_config(name))
        # Plain data: it goes to other processes.
        plain = architecture.to_dict()
        for batch in args.batch:
            train.measure(bench, title_of(name), plain, image, batch, args.impls)


def run_ptq(args: argparse.Namespace, bench: Bench) -> dict:
    cfg = load_config(args.model)
    compensation = None if args.compensation == 'none' else args.compensation
    result = ptq.weight_ptq_cost(
        cfg, args.images, args.batch, args.data, args.weights, args.method, compensation
    )
    ptq.show_cost(result, args.model, bench.console)
    return {'model': args.model, **result}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logging.getLogger('mmengine').setLevel(logging.WARNING)
    bench = Bench(Console(), args.rounds)
    with one_line_errors():
        where = environment()
        if where['load'] > QUIET_LOAD:
            bench.console.print(
                f'Something else uses this machine (load {where["load"]:.1f}): medians of turns '
                'still compare, absolute times do not.',
                style='yellow',
            )
        if args.threads > where['cores']:
            sys.exit(f'--threads {args.threads}: this process may use {where["cores"]} cores.')
        torch.set_num_threads(args.threads)
        found = args.run(args, bench) or {'rows': bench.rows, 'skipped': bench.skipped}
        where['load_at_end'] = os.getloadavg()[0]
        if args.out is not None:
            for path in write(args.out, {'environment': where, **found}):
                bench.console.print(str(path), soft_wrap=True, highlight=False)


if __name__ == '__main__':
    main()
