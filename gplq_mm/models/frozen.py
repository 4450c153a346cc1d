"""How a frozen network computes: without a graph, in a precision of its own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..errors import SettingError

DTYPES = ('auto', 'float32', 'bfloat16')


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices natively.

    CUDA from sm_80 (Ampere) on; x86 processors with AMX or AVX512_BF16, as torch reports them.
    On others torch converts every operand, and bfloat16 is slower than float32.
    """
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == 'cpu':
        # Private, and the only place where torch tells.
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False


def resolve_dtype(setting: str, device: torch.device) -> torch.dtype:
    """``'float32'`` and ``'bfloat16'`` by name, ``'auto'`` by :func:`has_fast_bf16`.

    Raises:
        SettingError: For another setting.
    """
    if setting not in DTYPES:
        raise SettingError(f'teacher_dtype={setting!r} must be one of {", ".join(DTYPES)}.')
    if setting == 'auto':
        setting = 'bfloat16' if has_fast_bf16(device) else 'float32'
    return getattr(torch, setting)


def frozen_outputs(
    compute: Callable[[], Any], kind: str, dtype: torch.dtype = torch.float32
) -> Any:
    """Outputs of a network that nobody trains, as constants that any loss may use.

    Args:
        compute: Runs the network.
        kind: Type of the device that it is on.
        dtype: float32 computes as the parameters are, whatever autocast region this is in; a
            shorter type computes under autocast in it.

    Returns:
        What ``compute`` gives, nested tensors.
    """
    if dtype == torch.float32:
        precision = torch.autocast(kind, enabled=False)
    else:
        precision = torch.autocast(kind, dtype=dtype)
    with torch.inference_mode(), precision:
        outputs = compute()
    # Autograd refuses to save an inference tensor, a copy made outside is an ordinary one.
    return tree_map_only(Tensor, Tensor.clone, outputs)
