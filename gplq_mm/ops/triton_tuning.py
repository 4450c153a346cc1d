"""Which blocks the product on CUDA is tuned among."""

from collections.abc import Callable

import torch
import triton

# Blocks of gemm_kernel that autotuning chooses from: rows, columns, packed bytes a step; warps;
# pipeline stages. 64 rows and more feed a warpgroup instruction (wgmma) on Hopper.
GEMM_CONFIGS = tuple(
    triton.Config(dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k), num_warps=warps, num_stages=stages)
    for m, n, k, warps, stages in (
        (128, 256, 64, 8, 3),
        (128, 128, 128, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 128, 64, 8, 3),
        (64, 128, 64, 4, 4),
        (64, 64, 64, 4, 4),
        (16, 64, 64, 4, 4),
        # Weights unpacked in the loop in groups of 32 take steps of 32.
        (128, 128, 32, 8, 4),
        (64, 128, 32, 4, 4),
        (64, 64, 32, 4, 5),
        (16, 64, 32, 4, 5),
    )
)


def shared_bytes(config: triton.Config, a_packed: bool, w_packed: bool) -> int:
    """Shared memory that the pipelined loads of :func:`.triton_gemm.gemm_kernel` take, in bytes."""
    block = config.kwargs
    rows = block['BLOCK_M'] * (2 if w_packed and not a_packed else 1)
    rows += block['BLOCK_N'] * (2 if a_packed and not w_packed else 1)
    return rows * block['BLOCK_K'] * config.num_stages


def eligible_configs(
    configs: list,
    half: int,
    group_size: int,
    rows: int,
    a_packed: bool,
    w_packed: bool,
    shared: int,
) -> list:
    """Configs of the product that can run, and that are not plainly too large for it.

    Args:
        configs: Triton configs.
        half: Packed bytes of a row.
        group_size: Stored columns that share a multiplier (read with ``w_packed``).
        rows: Rows of activations, rounded up to a power of two.
        a_packed, w_packed: Whether the operands are unpacked within the product.
        shared: Shared memory that a block can have, in bytes.

    Returns:
        At least one config.
    """

    def runs(config):
        step = config.kwargs['BLOCK_K']
        fits = shared_bytes(config, a_packed, w_packed) <= shared
        return fits and half % step == 0 and (not w_packed or group_size % step == 0)

    runnable = [config for config in configs if runs(config)]
    sensible = [
        config
        for config in runnable
        if config.kwargs['BLOCK_M'] <= max(rows, 16)
        # Sixteen rows feed a tensor core badly, steps of 32 feed it slowly.
        and (config.kwargs['BLOCK_M'] >= 64 or rows <= 64)
        and (config.kwargs['BLOCK_K'] >= 64 or (w_packed and group_size % 64))
    ]
    return sensible or runnable


def _prune(configs, named, **kwargs):
    given = {**named, **kwargs}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return eligible_configs(
        configs,
        given['half'],
        given['GROUP_SIZE'],
        given['M_BUCKET'],
        given['A_PACKED'],
        given['W_PACKED'],
        properties.shared_memory_per_block_optin,
    )


def tuned(kernel: Callable) -> Callable:
    """The product with the fastest blocks for its sizes, found when they first occur."""
    return triton.autotune(
        configs=list(GEMM_CONFIGS),
        key=['M_BUCKET', 'N', 'half', 'GROUP_SIZE', 'A_PACKED', 'W_PACKED', 'GELU', 'ADD', 'OUT'],
        prune_configs_by=dict(early_config_prune=_prune),
        cache_results=True,
    )(kernel)
