"""Measure the Triton kernels on a GPU against bf16 cuBLAS, torch._int_mm and torch.compile, and
those of training against the same arithmetic in plain torch.

    python benchmarks/gpu.py                      # everything
    python benchmarks/gpu.py check                # equal integers only
    python benchmarks/gpu.py linear --batch 32 256
    python benchmarks/gpu.py model --batch 128
    python benchmarks/gpu.py check train --batch 32

``check`` and ``linear`` need torch, triton and mmengine; ``model`` and ``train`` need everything.
Results are written beside this file as ``gpu_<device>.json`` and ``.csv``, rows of name, shape or
model, batch, impl, median_ms, gops. Input and output of every packed layer are bf16; training is
measured in float32. The first call of every shape compiles and tunes, which is most of the time;
Triton keeps the outcome.
"""

import argparse
import csv
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from io import StringIO
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gplq_mm.checkpoint import atomic_write
from gplq_mm.ops import reference, training_reference
from gplq_mm.quant.packing import pack_multiplier_panels, pack_panels

PARTS = ('check', 'linear', 'model', 'train')
OURS, OURS_TRAINING = 'gplq_int4', 'gplq'
# Goals: times as fast as the peer.
LINEAR_GOAL, MODEL_GOAL = 1.5, 1.3
ROUNDS = 5
# Images a step of training; the plain formulation keeps much for backward.
MAX_TRAINING_BATCH = 64
# Code range of four bits, and bits of the rounding residual beside a code.
TRAINING_GRID = [0, 15, 12]


def transformer_shapes(tokens: int, width: int, prefix: str) -> list[tuple[str, int, int, int]]:
    """Name, tokens an image, inputs, outputs of the linear layers of a block."""
    return [
        (f'{prefix}.qkv', tokens, width, 3 * width),
        (f'{prefix}.proj', tokens, width, width),
        (f'{prefix}.fc1', tokens, width, 4 * width),
        (f'{prefix}.fc2', tokens, 4 * width, width),
    ]


SHAPES = transformer_shapes(197, 768, 'deit-base')
for _stage in range(4):
    SHAPES += transformer_shapes(3136 // 4**_stage, 192 * 2**_stage, f'swin-large.{_stage}')


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


def random_layer(
    columns: int, rows: int, bits: int = 4, act_bits: int = 4
) -> tuple[list[Tensor], list[int]]:
    """Operands of a packed layer in groups of 32, on the GPU."""
    limit = min(2 ** (bits - 1), 127)
    codes = torch.randint(-limit, 2 ** (bits - 1), (rows, columns), dtype=torch.int8)
    largest = max(1, min(15, 127 // limit))
    factors = torch.randint(1, largest + 1, (rows, -(-columns // 32)), dtype=torch.uint8)
    levels = 2**act_bits
    layer = [
        torch.full((columns,), levels / 5),
        torch.full((columns,), levels / 2) + torch.rand(columns),
        pack_panels(codes, bits),
        pack_multiplier_panels(factors),
        torch.randperm(columns).int(),
        torch.rand(rows) * 1e-3,
        torch.randn(rows),
        torch.randint(-1000, 1000, (rows,), dtype=torch.int32),
    ]
    return [tensor.cuda() for tensor in layer], [0, levels - 1, 32]


# -- correctness --------------------------------------------------------------------------


@torch.inference_mode()
def check() -> list[str]:
    """Compares every op with the reference on the CPU; returns what differs."""
    problems = []

    def compare(name: str, actual: Tensor, expected: Tensor, flipped: float = 0.0) -> None:
        """Equal but for a fraction of values that rounding in front of a code moved."""
        actual, expected = actual.float().cpu(), expected.float()
        off = (actual - expected).abs() > 1e-3 * (1 + expected.abs()) * (flipped > 0)
        fraction = off.float().mean().item()
        worst = (actual - expected).abs().max().item()
        verdict = 'ok' if fraction <= flipped else 'DIFFERS'
        print(f'  {verdict:8}{name}: {fraction:.2%} differ, by {worst:.3g} at most')
        if verdict != 'ok':
            problems.append(name)

    ops = torch.ops.gplq_mm
    for _, tokens, columns, rows in [*SHAPES[:5], ('odd', 1, 33, 65), ('odd', 77, 100, 130)]:
        for bits, act_bits in ((4, 4), (8, 8), (3, 6)):
            layer, grid = random_layer(columns, rows, bits, act_bits)
            host = [tensor.cpu() for tensor in layer]
            for images in (1, 4):
                x = torch.randn(tokens * images, columns, dtype=torch.bfloat16)
                # Every other value on a tie.
                x[:, ::2] = (
                    (torch.randint(0, 16, x[:, ::2].shape) + 0.5 - host[1][::2]) / host[0][::2]
                ).bfloat16()
                label = f'{tuple(x.shape)} x {rows}, W{bits}A{act_bits}'
                compare(
                    f'accumulate {label}',
                    ops.int4_accumulate(x.cuda(), layer, grid),
                    reference.int4_accumulate(x, host, grid),
                )
                compare(
                    f'linear {label}',
                    ops.int4_linear(x.cuda(), layer, grid),
                    reference.int4_linear(x, host, grid),
                )
    x = torch.randn(2 * 197, 384)
    (layer1, grid1), (layer2, grid2) = random_layer(384, 1536), random_layer(1536, 384)
    norm = torch.rand(384) + 0.5, torch.randn(384)
    # The hidden values must meet the second grid.
    layer1[5] /= 30
    for given, name in ((x, 'float32'), (x.half(), 'float16')):
        expected = reference.int4_mlp(
            given, *norm, 1e-6, [t.cpu() for t in layer1], grid1,
            [t.cpu() for t in layer2], grid2, None,
        )  # fmt: skip
        on_device = [t.cuda() for t in norm]
        actual = ops.int4_mlp(given.cuda(), *on_device, 1e-6, layer1, grid1, layer2, grid2, None)
        compare(f'mlp {name}', actual, expected, 0.02)
    image = torch.randn(2, 3, 224, 224)
    layer, grid = random_layer(768, 768, 8, 8)
    geometry = [16, 16, 16, 16, 0, 0, 1, 1]
    compare(
        'conv2d',
        ops.int4_conv2d(image.cuda(), layer, grid, geometry),
        reference.int4_conv2d(image, [t.cpu() for t in layer], grid, geometry),
    )
    for tokens, heads, depth in ((197, 12, 64), (49, 6, 32), (144, 6, 32)):
        grids = torch.zeros(4, 2, heads)
        grids[:3, 0], grids[:3, 1], grids[3, 0] = 0.3, -2.2, 1 / 15
        qkv = torch.randn(4, tokens, 3 * heads * depth)
        rest = [0, 15] * 4, True, torch.randn(heads, tokens, tokens), None, None, 0
        on_device = [t.cuda() if isinstance(t, Tensor) else t for t in rest]
        scale = depth**-0.5
        compare(
            f'attention of {tokens} tokens',
            ops.int4_attention(qkv.cuda(), heads, scale, grids.cuda(), *on_device),
            reference.int4_attention(qkv, heads, scale, grids, *rest),
            0.02,
        )
    for name, call in training_calls(2).items():
        host = call(training_reference, torch.device('cpu'))()
        for i, actual in enumerate(call(ops, torch.device('cuda'))()):
            compare(f'{name}, result {i}', actual, host[i], 0.01)
    return problems


def training_calls(batch: int) -> dict[str, Callable]:
    """The ops of training at the shapes of DeiT-S, forward and backward.

    Returns:
        Name to a function of the ops and a device, which gives a call without arguments.
    """

    def numbers(shape: tuple[int, ...], low: float, high: float) -> tuple[Tensor, Tensor]:
        step = torch.linspace(0.9, 1.1, math.prod(shape)).view(shape) * (high - low) / 15
        return step, torch.full(shape, low)

    def input_of(shape: tuple[int, ...], scale_shape: tuple[int, ...], gelu: bool = False):
        def make(ops, device: torch.device):
            torch.manual_seed(0)
            low = -0.2 if gelu else -2.0
            tensors = torch.randn(shape), torch.randn(shape), *numbers(scale_shape, low, 2.0)
            x, grad, scale, offset = (tensor.to(device) for tensor in tensors)
            grid = (scale, offset, TRAINING_GRID)

            def call():
                if gelu:
                    x_hat = ops.gelu_fake_quant(x, *grid)
                    return x_hat, *ops.gelu_fake_quant_backward(grad, x, *grid)
                x_hat, state = ops.fake_quant(x, *grid)
                again = ops.fake_quant_values(state, *grid)
                return x_hat, again, *ops.fake_quant_backward(grad, state, *grid)

            return call

        return make

    def softmax(ops, device: torch.device):
        torch.manual_seed(0)
        scores, grad = (torch.randn(batch, 6, 197, 197) for _ in range(2))
        scores, grad = (4 * scores).to(device), grad.to(device)
        scale, offset = (tensor.to(device) for tensor in numbers((6, 1, 1), 0.0, 0.8))
        rest = (0.5, None, None, scale, offset, TRAINING_GRID, True)

        def call():
            # In place: what is timed includes these copies.
            probs, again, above = scores.clone(), scores.clone(), grad.clone()
            total = ops.softmax_fake_quant_(probs, *rest)
            sums = ops.softmax_fake_quant_backward_(above, again, *rest)
            return probs, total, above, again, *sums

        return call

    return {
        'input a channel': input_of((batch, 197, 384), (384,)),
        'q, k or v a head': input_of((batch, 6, 197, 64), (6, 1, 1)),
        'gelu a channel': input_of((batch, 197, 1536), (1536,), gelu=True),
        'softmax a head': softmax,
    }


# -- timing -------------------------------------------------------------------------------


def time_in_turns(
    candidates: dict[str, Callable[[], object]], inference: bool = True
) -> dict[str, float]:
    """Median milliseconds of each candidate over rounds in which all take turns."""
    from triton.testing import do_bench

    samples: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.inference_mode(inference):
        for call in candidates.values():
            call()
        for _ in range(ROUNDS):
            for name, call in candidates.items():
                samples[name].append(do_bench(call, warmup=10, rep=60, return_mode='median'))
    return {name: statistics.median(values) for name, values in samples.items()}


def report(
    name: str, subject: dict, batch: int, operations: float | None, times: dict, ours: str = OURS
) -> list[dict]:
    """Prints the candidates of a measurement and returns its rows."""
    rows = []
    print(f'{" ".join(map(str, subject.values()))}, batch {batch}')
    for impl, ms in times.items():
        row = dict(name=name, **subject, batch=batch, impl=impl, median_ms=ms)
        speed = ''
        if operations is not None:
            row['gops'] = operations / ms / 1e6
            speed = f'{row["gops"] / 1e3:9.1f} TOPS'
        print(f'  {impl:28}{ms:9.3f} ms{speed}{ms / times[ours]:8.2f}')
        rows.append(row)
    return rows


def linear(batches: list[int]) -> list[dict]:
    """Linear layers of DeiT-B and Swin-L."""
    from gplq_mm.ops import triton_layer, triton_ops

    rows = []
    for name, tokens, columns, outputs in SHAPES:
        layer, grid = random_layer(columns, outputs)
        weight = torch.randn(outputs, columns, device='cuda', dtype=torch.bfloat16)
        bias = torch.randn(outputs, device='cuda', dtype=torch.bfloat16)
        integers = torch.randint(-8, 8, (columns, outputs), device='cuda', dtype=torch.int8)
        # As torch._int_mm is fastest: the second operand column by column.
        integers = integers.t().contiguous().t()
        prepared = triton_layer.prepared_layer(layer, grid, torch.device('cuda', 0))
        for batch in batches:
            m = batch * tokens
            x = torch.randn(m, columns, device='cuda', dtype=torch.bfloat16)
            codes = torch.randint(-8, 8, (m, columns), device='cuda', dtype=torch.int8)
            packed = triton_ops._quantize(x, prepared, m)
            out = torch.empty(m, outputs, device='cuda', dtype=torch.bfloat16)

            def product(in_loop, packed=packed, prepared=prepared, out=out):
                return lambda: triton_ops._multiply(packed, prepared, out, unpack_in_loop=in_loop)

            times = time_in_turns(
                {
                    OURS: lambda x=x, layer=layer, grid=grid: torch.ops.gplq_mm.int4_linear(
                        x, layer, grid
                    ),
                    'torch_bf16': lambda x=x, weight=weight, bias=bias: F.linear(x, weight, bias),
                    # From codes to int32 sums, nothing before or after.
                    'torch_int_mm': lambda c=codes, i=integers: torch._int_mm(c, i),
                    # From codes to bf16: what remains where the codes come from a kernel before.
                    'gplq_int4_product': product(False),
                    'gplq_int4_product_in_loop': product(True),
                }
            )
            shape = dict(shape=f'{m}x{columns}x{outputs}', layer=name)
            rows += report('linear', shape, batch, 2.0 * m * columns * outputs, times)
    summarize(rows, 'torch_bf16', LINEAR_GOAL)
    return rows


def stream_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts a deployed model so that what flows between its ops has ``dtype``.

    Packed layers keep their buffers. The norms of fused blocks stay float32, since they are read
    by the kernels; other norms are cast.
    """
    from gplq_mm.layers.int4_weight import Int4WeightLayer

    inside = tuple(f'{name}.' for name in model.deploy_report.fused)
    for name, module in model.named_modules():
        keep = isinstance(module, Int4WeightLayer) or (
            isinstance(module, nn.LayerNorm) and name.startswith(inside)
        )
        if not keep:
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    cast = parameter.detach().to(dtype)
                    module._parameters[key] = nn.Parameter(cast, requires_grad=False)
    return model


def captured(call: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """The call as a CUDA graph: no time of the host in it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):
            call(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        out = call(x)

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def model_times(batches: list[int]) -> list[dict]:
    """The whole DeiT-B, 224 pixels, random weights."""
    import mmpretrain.models  # noqa: F401  (registers the backbone)
    from mmengine.registry import MODELS

    from gplq_mm.deploy.synthetic import synthetic_model

    cfg = dict(
        type='mmpretrain.ImageClassifier',
        backbone=dict(type='mmpretrain.VisionTransformer', arch='deit-base', img_size=224),
        head=dict(type='mmpretrain.VisionTransformerClsHead', num_classes=1000, in_channels=768),
    )
    torch.manual_seed(0)
    plain = MODELS.build(cfg).cuda().eval().requires_grad_(False)
    sample = torch.randn(8, 3, 224, 224, device='cuda')
    deployed = synthetic_model(MODELS.build(cfg).cuda().eval(), sample)
    print(f'  {deployed.deploy_report}')
    stream_in(deployed, torch.bfloat16)
    plain.bfloat16()
    compiled = torch.compile(plain)
    with_graphs = torch.compile(plain, mode='reduce-overhead')
    rows = []
    for batch in batches:
        x = torch.randn(batch, 3, 224, 224, device='cuda', dtype=torch.bfloat16)
        times = time_in_turns(
            {
                OURS: captured(deployed, x),
                'gplq_int4_eager': lambda x=x: deployed(x),
                'torch_compile_bf16': lambda x=x: compiled(x),
                'torch_compile_bf16_graphs': lambda x=x: with_graphs(x),
            }
        )
        # Multiplications and additions of the products of DeiT-B at 197 tokens.
        operations = 2.0 * 17.6e9 * batch
        rows += report('model', dict(model='deit-base'), batch, operations, times)
    for peer in ('torch_compile_bf16', 'torch_compile_bf16_graphs'):
        summarize(rows, peer, MODEL_GOAL)
    return rows


def training(batches: list[int]) -> list[dict]:
    """Ops of training, forward and backward, and whole steps of GPLQ on DeiT-S."""
    from gplq_mm.engine.train_cost import build_step

    cfg = dict(
        type='mmpretrain.ImageClassifier',
        backbone=dict(type='mmpretrain.VisionTransformer', arch='deit-small', img_size=224),
        head=dict(
            type='mmpretrain.VisionTransformerClsHead',
            num_classes=1000,
            in_channels=384,
            loss=dict(type='mmpretrain.CrossEntropyLoss'),
        ),
    )
    device, rows = torch.device('cuda'), []
    for batch in (batch for batch in batches if batch <= MAX_TRAINING_BATCH):
        for name, call in training_calls(batch).items():
            times = time_in_turns(
                {
                    OURS_TRAINING: call(torch.ops.gplq_mm, device),
                    'plain': call(training_reference, device),
                }
            )
            rows += report('train_op', dict(layer=name), batch, None, times, OURS_TRAINING)
        # `plain` is the same arithmetic as autograd keeps it.
        steps = {
            impl: build_step(impl, cfg, (3, 224, 224), batch)
            for impl in (OURS_TRAINING, 'gplq_1byte', 'plain', 'fp32')
        }
        times = time_in_turns(steps, inference=False)
        rows += report('train', dict(model='deit-small'), batch, None, times, OURS_TRAINING)
    return rows


def summarize(rows: list[dict], peer: str, goal: float) -> None:
    """Prints how many times as fast as ``peer`` ours is, over all measurements."""

    def key(row):
        return row.get('shape', row.get('model')), row['batch']

    ours = {key(row): row['median_ms'] for row in rows if row['impl'] == OURS}
    ratios = [row['median_ms'] / ours[key(row)] for row in rows if row['impl'] == peer]
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    print(
        f'{OURS} against {peer}: {mean:.2f} times as fast (geometric mean; {min(ratios):.2f} to '
        f'{max(ratios):.2f}; goal {goal})'
    )


def environment() -> dict:
    """Where the measurement was taken."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return dict(
        device=properties.name,
        capability=f'{properties.major}.{properties.minor}',
        multiprocessors=properties.multi_processor_count,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        triton=triton.__version__,
        time=datetime.now(timezone.utc).isoformat(timespec='seconds'),
    )


def write(folder: Path, rows: list[dict], environment: dict) -> Path:
    """Writes JSON and CSV and returns the path of the first; replaces the parts measured now."""
    slug = re.sub(r'[^a-z0-9]+', '-', environment['device'].lower()).strip('-')
    path = folder / f'gpu_{slug}.json'
    if path.exists():
        measured = {row['name'] for row in rows}
        earlier = json.loads(path.read_text(encoding='utf-8'))['rows']
        rows = [row for row in earlier if row['name'] not in measured] + rows
    table = StringIO()
    fields = ('name', 'shape', 'layer', 'model', 'batch', 'impl', 'median_ms', 'gops')
    writer = csv.DictWriter(table, fields)
    writer.writeheader()
    writer.writerows(rows)
    content = json.dumps(dict(environment=environment, rows=rows), indent=2)
    atomic_write(path, lambda stream: stream.write(content.encode()))
    atomic_write(path.with_suffix('.csv'), lambda stream: stream.write(table.getvalue().encode()))
    return path


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        sys.exit(
            'This benchmark needs an NVIDIA GPU of compute capability 8.0 or later and a torch '
            'built for CUDA. CPU figures: tools/benchmark.py.'
        )
    where = environment()
    print(where)
    rows = []
    if 'check' in args.parts:
        problems = check()
        if problems:
            sys.exit(f'{len(problems)} results differ from the reference; nothing was timed.')
    if 'linear' in args.parts:
        rows += linear(args.batch)
    if 'model' in args.parts:
        rows += model_times(args.batch)
    if 'train' in args.parts:
        rows += training(args.batch)
    if rows:
        print(write(args.out, rows, where))


if __name__ == '__main__':
    main()
