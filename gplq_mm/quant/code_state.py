"""What a quantizer keeps of its input for backward: the code, and where in its cell the value lay.

The state of a value is ``(code - qmin) * 2**level_bits + level`` in one or two bytes. The code
gives the exact quantized value, which the gradient of a weight needs. The level is the rounding
residual ``code - (x - offset) / scale``, which the gradient of a scale needs (LSQ, eq. 3), in
steps of ``1 / (2**level_bits - 1)`` from ``2**(level_bits - 1)``, which stands for none. A value
outside of the grid has the lowest code and a level above the middle, or the highest code and a
level below it: these are free, since beyond the outermost codes nothing counts as inside.
"""

import torch
from torch import Tensor

from .functional import TOLERANCE, quantize, to_steps


def level_bits_of(qmin: int, qmax: int, num_bytes: int) -> int:
    """Bits that ``num_bytes`` leave for the level beside codes ``qmin..qmax``."""
    return 8 * num_bytes - (qmax - qmin).bit_length()


def state_dtype(qmin: int, qmax: int, level_bits: int) -> torch.dtype:
    """uint8 where code and level fit a byte, else int16 (of which all 16 bits are used)."""
    return torch.uint8 if (qmax - qmin + 1) << level_bits <= 256 else torch.int16


def is_inside(steps: Tensor, qmin: int, qmax: int) -> Tensor:
    """Whether values in steps, ``(x - offset) / scale``, lie between the outermost codes."""
    return (steps >= qmin - TOLERANCE) & (steps <= qmax + TOLERANCE)


def encode_state(
    x: Tensor, scale: Tensor, offset: Tensor | None, qmin: int, qmax: int, level_bits: int
) -> tuple[Tensor, Tensor]:
    """Rounds to codes, and describes what the rounding did.

    Args:
        x, scale, offset, qmin, qmax: As in :func:`.functional.quantize`; ``x`` float32.
        level_bits: Bits of the level.

    Returns:
        Codes in the dtype of ``x``; the state, uint8 or int16. Both of the shape of ``x``.
    """
    codes = quantize(x, scale, offset, qmin, qmax)
    steps = to_steps(x, scale, offset)
    middle, most = 2 ** (level_bits - 1), 2**level_bits - 1
    level = ((codes - steps) * most).round().clamp(1 - middle, middle - 1)
    level = torch.where(steps < qmin - TOLERANCE, middle - 1, level)
    level = torch.where(steps > qmax + TOLERANCE, 1 - middle, level).nan_to_num(nan=1 - middle)
    index = codes.nan_to_num(nan=qmin) - qmin
    state = (index.int() << level_bits) + level.int() + middle
    dtype = state_dtype(qmin, qmax, level_bits)
    if dtype == torch.int16:
        state = torch.where(state > 32767, state - 65536, state)
    return codes, state.to(dtype)


def decode_state(
    state: Tensor, qmin: int, qmax: int, level_bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Reads a state.

    Args:
        state: From :func:`encode_state`.
        qmin, qmax, level_bits: As there.

    Returns:
        Codes, float32; the rounding residual ``code - (x - offset) / scale`` to within half a
        level, float32; whether the value lay outside of the grid, bool. All of the state's shape.
    """
    bits = state.int() & 0xFFFF
    middle, most = 2 ** (level_bits - 1), 2**level_bits - 1
    index, level = bits >> level_bits, (bits & most) - middle
    outside = ((index == 0) & (level > 0)) | ((index == qmax - qmin) & (level < 0))
    return (index + qmin).float(), level.float() / most, outside
