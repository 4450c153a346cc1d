"""Measure packed layers and models, and training, against what a user could run instead.

All candidates take turns, on the same number of threads; a row is the median over the rounds.
`ptq` measures what Stage 2 costs.
"""

import argparse
import copy
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from gplq_mm.benchmark import (
    LINEAR_IMPLS,
    MODEL_IMPLS,
    OURS,
    count_operations,
    linear_candidates,
    model_candidates,
    show,
    show_ptq,
    show_training,
    write,
)
from gplq_mm.checkpoint import atomic_write_text
from gplq_mm.deploy.peers import PACKAGES
from gplq_mm.engine import one_line_errors
from gplq_mm.engine.ptq_cost import weight_ptq_cost
from gplq_mm.engine.train_cost import IMPLS as TRAINING_IMPLS
from gplq_mm.engine.train_cost import build_step, training_memory
from gplq_mm.evaluation.provenance import describe_machine
from gplq_mm.evaluation.timing import Timing, interleave
from gplq_mm.ops import native
from gplq_mm.registry import MODELS

# What the others are compared with.
BASES = {'linear': OURS, 'model': OURS, 'train': 'fp32'}
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

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument('--batch', type=positive, nargs='+', default=[8], help='images at a time')
    shared.add_argument(
        '--threads', type=positive, default=len(os.sched_getaffinity(0)), help='of every engine'
    )
    shared.add_argument('--rounds', type=positive, default=15, help='turns of every candidate')
    shared.add_argument(
        '--out', metavar='FILE.json', type=json_path, help='rows; a .csv and a .png come beside it'
    )

    linear = commands.add_parser('linear', parents=[shared], help='single linear layers')
    linear.add_argument(
        '--shapes',
        nargs='+',
        default=['deit-small'],
        metavar='SHAPES',
        help=f'MxKxN (rows, inputs, outputs), or the layers of {", ".join(ARCHITECTURES)} or of '
        'a config file',
    )
    linear.add_argument('--impls', nargs='+', choices=LINEAR_IMPLS, default=list(LINEAR_IMPLS))
    linear.set_defaults(run=run_linear)

    model = commands.add_parser('model', parents=[shared], help='whole models')
    model.add_argument(
        '--model',
        nargs='+',
        default=['deit-small'],
        help=f'{", ".join(ARCHITECTURES)}, or a config file',
    )
    model.add_argument('--impls', nargs='+', choices=MODEL_IMPLS, default=list(MODEL_IMPLS))
    model.add_argument(
        '--compensation',
        choices=['none', 'QwT', 'QwTv2'],
        default='none',
        help='map beside every block of our model',
    )
    model.set_defaults(run=run_model)

    train = commands.add_parser(
        'train', parents=[shared], help='training steps: memory and time, teacher included'
    )
    train.add_argument(
        '--model',
        nargs='+',
        default=['vit-tiny'],
        help=f'{", ".join(ARCHITECTURES)}, or the config file of a classifier',
    )
    train.add_argument('--impls', nargs='+', choices=TRAINING_IMPLS, default=list(TRAINING_IMPLS))
    train.set_defaults(run=run_train)
    add_ptq_command(commands)
    args = parser.parse_args(argv)
    base = BASES.get(args.command)
    if base is not None and base not in args.impls:
        args.impls.insert(0, base)
    return args


def add_ptq_command(commands) -> None:
    ptq = commands.add_parser('ptq', help='seconds and memory of Weight-PTQ')
    ptq.add_argument('--model', default='swin-tiny', help='name or config file')
    ptq.add_argument('--images', type=positive, default=512)
    ptq.add_argument('--batch', type=positive, default=16, help='images at a time')
    ptq.add_argument('--data', metavar='FOLDER', help='of images; without, they are random')
    ptq.add_argument('--weights', metavar='FILE', help='float checkpoint; without, random')
    ptq.add_argument('--method', default='GPTQ')
    ptq.add_argument('--compensation', choices=['none', 'QwT', 'QwTv2'], default='QwT')
    ptq.add_argument('--threads', type=positive, default=len(os.sched_getaffinity(0)))
    ptq.add_argument('--out', metavar='FILE.json', type=json_path)
    ptq.set_defaults(run=run_ptq)


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


# -- what is measured ---------------------------------------------------------------------


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


def load_architecture(name: str) -> tuple[dict, tuple[int, int, int]]:
    """Config of a float model, and the shape of its images."""
    cfg = load_config(name)
    architecture = copy.deepcopy(cfg.model.get('architecture', cfg.model))
    # Training only, and it says so in the log.
    architecture.pop('train_cfg', None)
    size = architecture.backbone.get('img_size', 224)
    height, width = (size, size) if isinstance(size, int) else size
    return architecture, (architecture.backbone.get('in_channels', 3), height, width)


def build_float(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """Float model with random weights, and the shape of its images."""
    architecture, image = load_architecture(name)
    torch.manual_seed(0)
    return MODELS.build(architecture).eval().requires_grad_(False), image


@torch.no_grad()
def layer_shapes(name: str, batch: int) -> list[tuple[int, int, int]]:
    """Rows, inputs and outputs of every different Linear of a model, in order."""
    model, image = build_float(name)
    found: dict[tuple[int, int, int], None] = {}

    def note(layer: nn.Linear, args: tuple[Tensor]) -> None:
        rows = args[0].numel() // layer.in_features
        found.setdefault((rows * batch, layer.in_features, layer.out_features))

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(note)
    model(torch.zeros(1, *image))
    return list(found)


def parse_shapes(texts: list[str], batches: list[int]) -> list[tuple[int, int, int]]:
    """Shapes of ``--shapes``; a shape given in numbers has its rows and takes no batch."""
    found: dict[tuple[int, int, int], None] = {}
    for text in texts:
        if re.fullmatch(r'\d+x\d+x\d+', text):
            shape = tuple(map(int, text.split('x')))
            if min(shape) < 1:
                sys.exit(f'shape {text} has an empty side.')
            found.setdefault(shape)
        elif re.fullmatch(r'[\dx]+', text):
            sys.exit(f'shape {text!r} is not of the form MxKxN, such as 1576x384x1536.')
        else:
            for batch in batches:
                found.update(dict.fromkeys(layer_shapes(text, batch)))
    return list(found)


# -- running and reporting ----------------------------------------------------------------


def measure(
    candidates: dict[str, Callable[[], Any]], rounds: int, label: str, console: Console
) -> dict[str, Timing]:
    """Times candidates with a progress bar."""
    with Progress(console=console, transient=True) as progress:

        def track(items: Iterable) -> Iterator:
            return progress.track(items, description=label)

        return interleave(candidates, rounds, track=track)


def rows_of(
    name: str, subject: dict, args: argparse.Namespace, timings: dict[str, Timing], operations: int
) -> list[dict]:
    """Rows of the result file; ``times_ours`` is the duration in multiples of ours."""
    ours = timings[OURS].median_ms
    return [
        {
            'name': name,
            **subject,
            'threads': args.threads,
            'impl': impl,
            'median_ms': timing.median_ms,
            'gops': operations / timing.median_ms / 1e6,
            'times_ours': timing.median_ms / ours,
            'quartile1_ms': timing.quartiles_ms[0],
            'quartile3_ms': timing.quartiles_ms[1],
            'rounds': len(timing.samples),
        }
        for impl, timing in timings.items()
    ]


def run_linear(args: argparse.Namespace, console: Console) -> tuple[list[dict], dict]:
    rows = []
    shapes = parse_shapes(args.shapes, args.batch)
    for index, shape in enumerate(shapes, start=1):
        label = 'x'.join(map(str, shape))
        candidates = linear_candidates(shape, args.impls)
        timings = measure(candidates, args.rounds, f'{label} ({index} of {len(shapes)})', console)
        operations = 2 * shape[0] * shape[1] * shape[2]
        subject = {'shape': label}
        rows += rows_of('linear', subject, args, timings, operations)
        show(rows[-len(timings) :], f'{label} (rows x inputs x outputs)', console)
    return rows, {}


def run_model(args: argparse.Namespace, console: Console) -> tuple[list[dict], dict]:
    rows, skipped = [], {}
    compensation = None if args.compensation == 'none' else args.compensation
    for name in args.model:
        model, image = build_float(name)
        for batch in args.batch:
            label = f'{Path(name).stem if name not in ARCHITECTURES else name}, batch {batch}'
            images = torch.randn(batch, *image)
            candidates, left_out = model_candidates(
                model, images, args.impls, compensation, args.threads, console
            )
            skipped.update(left_out)
            timings = measure(candidates, args.rounds, label, console)
            subject = {
                'model': label.partition(',')[0],
                'batch': batch,
                'compensation': args.compensation,
            }
            rows += rows_of('model', subject, args, timings, count_operations(model, images))
            show(
                rows[-len(timings) :],
                f'{label}, {args.threads} threads, our compensation: {args.compensation}',
                console,
            )
    return rows, skipped


def run_train(args: argparse.Namespace, console: Console) -> tuple[list[dict], dict]:
    rows = []
    for name in args.model:
        # Plain data: it goes to other processes.
        architecture, image = load_architecture(name)
        architecture = architecture.to_dict()
        for batch in args.batch:
            label = f'{name if name in ARCHITECTURES else Path(name).stem}, batch {batch}'
            memory = {}
            for impl in args.impls:
                with console.status(f'{label}: memory of {impl}'):
                    memory[impl] = training_memory(impl, architecture, image, batch, args.threads)
            steps = {impl: build_step(impl, architecture, image, batch) for impl in args.impls}
            timings = measure(steps, args.rounds, label, console)
            base = BASES['train']
            new = [
                {
                    'name': 'train',
                    'model': label.partition(',')[0],
                    'batch': batch,
                    'threads': args.threads,
                    'impl': impl,
                    **memory[impl],
                    'step_ms': timing.median_ms,
                    **{
                        f'{key}_ratio': memory[impl][f'{key}_mb'] / memory[base][f'{key}_mb']
                        for key in ('saved', 'peak')
                    },
                    'step_ratio': timing.median_ms / timings[base].median_ms,
                    'quartile1_ms': timing.quartiles_ms[0],
                    'quartile3_ms': timing.quartiles_ms[1],
                    'rounds': len(timing.samples),
                }
                for impl, timing in timings.items()
            ]
            show_training(new, f'{label}, {args.threads} threads, in multiples of FP32', console)
            rows += new
    return rows, {}


def run_ptq(args: argparse.Namespace, console: Console) -> dict:
    cfg = load_config(args.model)
    compensation = None if args.compensation == 'none' else args.compensation
    result = weight_ptq_cost(
        cfg, args.images, args.batch, args.data, args.weights, args.method, compensation
    )
    show_ptq(result, args.model, console)
    return {'model': args.model, **result}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logging.getLogger('mmengine').setLevel(logging.WARNING)
    console = Console()
    with one_line_errors():
        environment = describe_machine(('gplq_mm', *PACKAGES))
        environment['kernels'] = native.backend()
        if environment['load'] > QUIET_LOAD:
            console.print(
                f'Something else uses this machine (load {environment["load"]:.1f}): medians of '
                'turns still compare, absolute times do not.',
                style='yellow',
            )
        if args.threads > environment['cores']:
            sys.exit(
                f'--threads {args.threads}: this process may use {environment["cores"]} cores.'
            )
        torch.set_num_threads(args.threads)
        if args.command == 'ptq':
            result = {'environment': environment, **args.run(args, console)}
            result['environment']['load_at_end'] = os.getloadavg()[0]
            if args.out is not None:
                atomic_write_text(args.out, json.dumps(result, indent=2))
            return
        rows, skipped = args.run(args, console)
        if args.out is not None:
            write(args.out, rows, skipped, environment)
            for suffix in ('.json', '.csv', '.png'):
                console.print(f'{args.out.with_suffix(suffix)}', soft_wrap=True, highlight=False)


if __name__ == '__main__':
    main()
