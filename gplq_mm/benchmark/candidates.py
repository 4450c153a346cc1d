"""What takes turns: our packed layers and models, and what a user could run instead."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..deploy.peers import PEERS, PeerUnavailable, build_peer
from ..deploy.synthetic import synthetic_linear, synthetic_model

__all__ = [
    'LINEAR_IMPLS',
    'MODEL_IMPLS',
    'OURS',
    'PeerUnavailable',
    'count_operations',
    'linear_candidates',
    'model_candidates',
]

OURS = 'gplq_int4'
LINEAR_IMPLS = (OURS, 'torch_fp32', 'torch_bf16', 'torch_int8')
MODEL_IMPLS = (OURS, *PEERS)


def linear_candidates(
    shape: tuple[int, int, int], impls: Iterable[str]
) -> dict[str, Callable[[], Any]]:
    """Calls of a single linear layer.

    Args:
        shape: Rows, inputs, outputs.
        impls: Which of :data:`LINEAR_IMPLS`.

    Returns:
        Implementation -> a call without arguments, all on random data.
    """
    rows, inputs, outputs = shape
    torch.manual_seed(0)
    x, layer = torch.randn(rows, inputs), nn.Linear(inputs, outputs)
    layer.requires_grad_(False)
    build = {
        OURS: lambda: _bound(synthetic_linear(layer, x), x),
        'torch_fp32': lambda: _bound(F.linear, x, layer.weight, layer.bias),
        'torch_bf16': lambda: _bound(
            F.linear, *(t.bfloat16() for t in (x, layer.weight, layer.bias))
        ),
        # Codes in, int32 sums out: no quantization, no scale, no bias.
        'torch_int8': lambda: _bound(
            torch._int_mm,
            torch.randint(-8, 8, (rows, inputs), dtype=torch.int8),
            torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8).t(),
        ),
    }
    return {name: build[name]() for name in impls}


def _bound(function: Callable, *args) -> Callable[[], Any]:
    @torch.inference_mode()
    def call():
        return function(*args)

    return call


def model_candidates(
    model: nn.Module,
    images: Tensor,
    impls: Iterable[str],
    compensation: str | None,
    threads: int,
    console: Console,
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Calls of a whole model.

    Args:
        model: Float model in eval mode.
        images: ``(N, C, H, W)``.
        impls: Which of :data:`MODEL_IMPLS`.
        compensation: ``'QwT'`` or ``'QwTv2'`` beside every block of ours, or None.
        threads: Threads of every engine.
        console: Where progress and what is left out are shown.

    Returns:
        Implementation -> a call without arguments; and why others are left out.

    Raises:
        RuntimeError: If an engine gives an output of another shape.
    """
    candidates, skipped = {}, {}
    with torch.no_grad():
        expected = model(images).shape
    for name in impls:
        with console.status(f'preparing {name}'):
            try:
                if name == OURS:
                    deployed = synthetic_model(copy.deepcopy(model), images, compensation)
                    candidates[name] = _bound(deployed, images)
                else:
                    candidates[name] = build_peer(name, model, images, threads)
            except PeerUnavailable as error:
                skipped[name] = str(error)
                console.print(f'skipped {name}: {error}', style='yellow', markup=False)
                continue
        if tuple(candidates[name]().shape) != tuple(expected):
            raise RuntimeError(f'{name} does not compute the model: its output has another shape.')
    return candidates, skipped


@torch.no_grad()
def count_operations(model: nn.Module, images: Tensor) -> int:
    """Multiplications and additions of all matrix products and convolutions."""

    def attention(query, key, value, *_args, **_kwargs) -> int:
        return sdpa_flop_count(query, key, value)

    # torch counts attention on GPUs only.
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={fused: attention}) as counter:
        model(images)
    return counter.get_total_flops()
