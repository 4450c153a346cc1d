"""Single linear layers: ours, and what a user could run instead."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .report import OURS, Bench
from .synthetic import synthetic_model
from .timing import bound

IMPLS = (OURS, 'torch_fp32', 'torch_bf16', 'torch_int8')
# Rows, inputs, outputs.
Shape = tuple[int, int, int]


@torch.no_grad()
def layer_shapes(model: nn.Module, image: tuple[int, ...]) -> list[Shape]:
    """Shapes of every different Linear of a model for one image of shape ``image``, in order."""
    found: dict[Shape, None] = {}

    def note(layer: nn.Linear, args: tuple[Tensor]) -> None:
        rows = args[0].numel() // layer.in_features
        found.setdefault((rows, layer.in_features, layer.out_features))

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(note)
    model(torch.zeros(1, *image))
    return list(found)


def measure(bench: Bench, shape: Shape, impls: Iterable[str]) -> None:
    """Times a layer on random data.

    Args:
        bench: Takes the rows.
        shape: Rows, inputs, outputs.
        impls: Which of :data:`IMPLS`, ours among them.
    """
    rows, inputs, outputs = shape
    torch.manual_seed(0)
    x, layer = torch.randn(rows, inputs), nn.Linear(inputs, outputs)
    layer.requires_grad_(False)
    build = {
        OURS: lambda: bound(synthetic_model(nn.Sequential(layer), x)[0], x),
        'torch_fp32': lambda: bound(F.linear, x, layer.weight, layer.bias),
        'torch_bf16': lambda: bound(
            F.linear, *(t.bfloat16() for t in (x, layer.weight, layer.bias))
        ),
        # Codes in, int32 sums out: no quantization, no scale, no bias.
        'torch_int8': lambda: bound(
            torch._int_mm,
            torch.randint(-8, 8, (rows, inputs), dtype=torch.int8),
            torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8).t(),
        ),
    }
    label, operations = 'x'.join(map(str, shape)), 2 * rows * inputs * outputs
    calls, title = {impl: build[impl]() for impl in impls}, f'{label} (rows x inputs x outputs)'
    bench.compare('linear', {'shape': label}, calls, operations, title)
