"""Triton kernels on a GPU against bf16 cuBLAS, torch._int_mm and torch.compile, and those of
training against the same arithmetic in plain torch.

Input and output of every packed layer are bf16; training is measured in float32.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import training_reference
from .kernels import random_layer, training_calls
from .report import OURS, Bench, environment, write
from .timing import Call, bound

OURS_TRAINING = 'gplq'
# Goals: times as fast as the peer.
LINEAR_GOAL, MODEL_GOAL = 1.5, 1.3
# Images a step of training; the plain formulation keeps much for backward.
MAX_TRAINING_BATCH = 64


_WIDTHS = [('deit-base', 197, 768)]
_WIDTHS += [(f'swin-large.{stage}', 3136 // 4**stage, 192 * 2**stage) for stage in range(4)]
# Name, tokens an image, inputs, outputs of the linear layers of a block.
SHAPES = [
    (f'{model}.{name}', tokens, inputs * width, outputs * width)
    for model, tokens, width in _WIDTHS
    for name, inputs, outputs in (('qkv', 1, 3), ('proj', 1, 1), ('fc1', 1, 4), ('fc2', 4, 1))
]


def deit(arch: str, width: int) -> dict:
    """Config of a float classifier, 224 pixels, 1000 classes."""
    backbone = dict(type='mmpretrain.VisionTransformer', arch=arch, img_size=224)
    loss = dict(type='mmpretrain.CrossEntropyLoss')
    head = dict(type='mmpretrain.VisionTransformerClsHead', num_classes=1000, in_channels=width)
    return dict(type='mmpretrain.ImageClassifier', backbone=backbone, head=head | dict(loss=loss))


def linear(
    bench: Bench,
    batches: list[int],
    shapes: Iterable[tuple[str, int, int, int]] = SHAPES,
    device: torch.device | str = 'cuda',
) -> None:
    """Linear layers of DeiT-B and Swin-L.

    Args:
        bench: Takes the rows.
        batches: Images at a time.
        shapes: Name, tokens an image, inputs, outputs of each.
        device: Where.
    """
    from ..ops import triton_gemm, triton_layer, triton_quantize

    bf16, int8 = (dict(device=device, dtype=dtype) for dtype in (torch.bfloat16, torch.int8))
    for name, tokens, columns, outputs in shapes:
        operands, grid = random_layer(columns, outputs)
        layer = [tensor.to(device) for tensor in operands]
        weight, bias = torch.randn(outputs, columns, **bf16), torch.randn(outputs, **bf16)
        # As torch._int_mm is fastest: the second operand column by column.
        integers = torch.randint(-8, 8, (outputs, columns), **int8).t()
        prepared = triton_layer.prepared_layer(layer, grid, layer[0].device)
        for batch in batches:
            m = batch * tokens
            x = torch.randn(m, columns, **bf16)
            codes = torch.randint(-8, 8, (m, columns), **int8)
            packed = triton_quantize.quantize(x, prepared, m)
            product = triton_gemm.multiply, packed, prepared, torch.empty(m, outputs, **bf16)
            calls = {
                OURS: bound(torch.ops.gplq_mm.int4_linear, x, layer, grid),
                'torch_bf16': bound(F.linear, x, weight, bias),
                # From codes to int32 sums, nothing before or after.
                'torch_int_mm': bound(torch._int_mm, codes, integers),
                # From codes to bf16: what remains where the codes come from a kernel before.
                'gplq_int4_product': partial(*product, unpack_in_loop=False),
                'gplq_int4_product_in_loop': partial(*product, unpack_in_loop=True),
            }
            subject = dict(shape=f'{m}x{columns}x{outputs}', layer=name, batch=batch)
            operations = 2.0 * m * columns * outputs
            bench.compare('linear', subject, calls, operations, f'{name}, batch {batch}')
    summarize(bench, 'linear', 'torch_bf16', LINEAR_GOAL)


def stream_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts a deployed model so that what flows between its ops has ``dtype``.

    Packed layers keep their buffers. The norms of fused blocks stay float32, since they are read
    by the kernels; other norms are cast.
    """
    from ..layers.int4_weight import Int4WeightLayer

    inside = tuple(f'{name}.' for name in model.deploy_report.fused)
    for name, module in model.named_modules():
        norm_of_block = isinstance(module, nn.LayerNorm) and name.startswith(inside)
        if not (norm_of_block or isinstance(module, Int4WeightLayer)):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    return model


def captured(call: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    """The call as a CUDA graph: no time of the host in it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):
            call(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        call(x)
    return graph.replay


def model(bench: Bench, batches: list[int]) -> None:
    """The whole DeiT-B, 224 pixels, random weights."""
    from ..registry import MODELS
    from .model import count_operations
    from .synthetic import synthetic_model

    cfg = deit('deit-base', 768)
    torch.manual_seed(0)
    plain = MODELS.build(cfg).eval().requires_grad_(False)
    operations = count_operations(plain, torch.zeros(1, 3, 224, 224))
    sample = torch.randn(8, 3, 224, 224, device='cuda')
    deployed = synthetic_model(MODELS.build(cfg).cuda().eval(), sample)
    bench.console.print(deployed.deploy_report)
    stream_in(deployed, torch.bfloat16)
    compiled = torch.compile(plain.cuda().bfloat16())
    with_graphs = torch.compile(plain, mode='reduce-overhead')
    for batch in batches:
        x = torch.randn(batch, 3, 224, 224, device='cuda', dtype=torch.bfloat16)
        calls = {
            OURS: captured(deployed, x),
            'gplq_int4_eager': bound(deployed, x),
            'torch_compile_bf16': bound(compiled, x),
            'torch_compile_bf16_graphs': bound(with_graphs, x),
        }
        subject = dict(model='deit-base', batch=batch)
        bench.compare('model', subject, calls, operations * batch, f'DeiT-B, batch {batch}')
    for peer in ('torch_compile_bf16', 'torch_compile_bf16_graphs'):
        summarize(bench, 'model', peer, MODEL_GOAL)


def training(bench: Bench, batches: list[int], device: torch.device | str = 'cuda') -> None:
    """Ops of training, forward and backward, and whole steps of GPLQ on DeiT-S."""
    from .train import build_step

    for batch in (batch for batch in batches if batch <= MAX_TRAINING_BATCH):
        for name, call in training_calls(batch).items():
            sources = {OURS_TRAINING: torch.ops.gplq_mm, 'plain': training_reference}
            calls = {impl: bound(call(ops, device)) for impl, ops in sources.items()}
            subject, title = dict(layer=name, batch=batch), f'{name}, batch {batch}'
            bench.compare('train_op', subject, calls, None, title, OURS_TRAINING)
        # `plain` is the same arithmetic as autograd keeps it.
        steps = {
            impl: build_step(impl, deit('deit-small', 384), (3, 224, 224), batch)
            for impl in (OURS_TRAINING, 'gplq_1byte', 'plain', 'fp32')
        }
        subject, title = dict(model='deit-small', batch=batch), f'DeiT-S step, batch {batch}'
        bench.compare('train', subject, steps, None, title, OURS_TRAINING)


def summarize(bench: Bench, name: str, peer: str, goal: float) -> None:
    """Prints how many times as fast as ``peer`` ours is, over all rows of a name."""
    rows = (row for row in bench.rows if row['name'] == name and row['impl'] == peer)
    ratios = [row['times_ours'] for row in rows]
    bench.console.print(
        f'{OURS} against {peer}: {statistics.geometric_mean(ratios):.2f} times as fast (geometric '
        f'mean; {min(ratios):.2f} to {max(ratios):.2f}; goal {goal})'
    )


def save(folder: Path, rows: list[dict]) -> list[Path]:
    """Writes ``gpu_<device>.json`` and ``.csv``; replaces the rows of what was measured now."""
    where = environment()
    slug = re.sub(r'[^a-z0-9]+', '-', where['gpu'].lower()).strip('-')
    path = folder / f'gpu_{slug}.json'
    if path.exists():
        measured = {row['name'] for row in rows}
        earlier = json.loads(path.read_text(encoding='utf-8'))['rows']
        rows = [row for row in earlier if row['name'] not in measured] + rows
    return write(path, {'environment': where, 'rows': rows}, picture=False)
