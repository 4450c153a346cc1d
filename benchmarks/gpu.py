"""Measure the Triton kernels on a GPU against bf16 cuBLAS, torch._int_mm and torch.compile, and
those of training against the same arithmetic in plain torch.

    python benchmarks/gpu.py                      # everything
    python benchmarks/gpu.py check                # equal integers only
    python benchmarks/gpu.py linear --batch 32 256
    python benchmarks/gpu.py model --batch 128
    python benchmarks/gpu.py check train --batch 32

``check`` and ``linear`` need torch, triton and mmengine; ``model`` and ``train`` need everything.
Results are written beside this file as ``gpu_<device>.json`` and ``.csv``, rows of name, shape or
model, batch, impl, median_ms, gops. The first call of every shape compiles and tunes, which is
most of the time; Triton keeps the outcome.
"""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from gplq_mm.benchmark import gpu, kernels
from gplq_mm.benchmark.report import Bench
from gplq_mm.benchmark.timing import gpu_clock

MEASUREMENTS = {'linear': gpu.linear, 'model': gpu.model, 'train': gpu.training}
PARTS = ('check', *MEASUREMENTS)
ROUNDS = 5


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('parts', nargs='*', choices=[*PARTS, []], help='default: all')
    parser.add_argument('--batch', type=int, nargs='+', default=[32, 64, 128, 256])
    parser.add_argument('--out', type=Path, default=Path(__file__).parent, help='folder')
    args = parser.parse_args(argv)
    args.parts = args.parts or list(PARTS)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        sys.exit(
            'This benchmark needs an NVIDIA GPU of compute capability 8.0 or later and a torch '
            'built for CUDA. CPU figures: tools/benchmark.py.'
        )
    if 'check' in args.parts:
        shapes = [shape for _, *shape in gpu.SHAPES[:5]]
        problems = kernels.check([*shapes, (1, 33, 65), (77, 100, 130)], 'cuda')
        if problems:
            sys.exit(f'{len(problems)} results differ from the reference; nothing was timed.')
    bench = Bench(Console(), ROUNDS, gpu_clock)
    for part, measure in MEASUREMENTS.items():
        if part in args.parts:
            measure(bench, args.batch)
    if bench.rows:
        print(*gpu.save(args.out, bench.rows), sep='\n')


if __name__ == '__main__':
    main()
