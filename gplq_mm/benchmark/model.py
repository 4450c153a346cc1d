"""Whole models: ours, and what a user could run instead."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..quant import PolicyError
from .peers import PEERS, PeerUnavailable, build_peer
from .report import OURS, Bench
from .synthetic import synthetic_model
from .timing import bound

# Ours with chosen levels instead of equidistant integers.
OURS_WITH_LEVELS = 'gplq_levels'
IMPLS = (OURS, OURS_WITH_LEVELS, *PEERS)


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


def measure(
    bench: Bench,
    name: str,
    model: nn.Module,
    images: Tensor,
    impls: Iterable[str],
    compensation: str = 'none',
) -> None:
    """Times a model; an engine that cannot run here is noted in ``bench.skipped``.

    Args:
        bench: Takes the rows.
        name: Of the model, for the report.
        model: Float model in eval mode.
        images: ``(N, C, H, W)``.
        impls: Which of :data:`IMPLS`, ours among them.
        compensation: ``'QwT'`` or ``'QwTv2'`` beside every block of ours, or ``'none'``.

    Raises:
        RuntimeError: If an engine gives an output of another shape.
    """
    calls = {}
    with torch.no_grad():
        expected = model(images).shape
    for impl in impls:
        with bench.console.status(f'preparing {impl}'):
            try:
                if impl in (OURS, OURS_WITH_LEVELS):
                    deployed = synthetic_model(
                        copy.deepcopy(model), images, compensation, impl == OURS_WITH_LEVELS
                    )
                    call = bound(deployed, images)
                else:
                    call = build_peer(impl, model, images)
            # Levels are not for convolutions.
            except (PeerUnavailable, PolicyError) as error:
                bench.skipped[impl] = str(error)
                bench.console.print(f'skipped {impl}: {error}', style='yellow', markup=False)
                continue
        if tuple(call().shape) != tuple(expected):
            raise RuntimeError(f'{impl} does not compute the model: its output has another shape.')
        calls[impl] = call
    subject = {'model': name, 'batch': len(images), 'compensation': compensation}
    title = f'{name}, batch {len(images)}, {torch.get_num_threads()} threads, '
    title += f'our compensation: {compensation}'
    bench.compare('model', subject, calls, count_operations(model, images), title)
