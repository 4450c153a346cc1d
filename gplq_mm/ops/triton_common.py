"""What all Triton kernels share: rounding as the reference rounds, and how they are launched.

Codes and rescaled sums equal those of the reference, ties included. What is one fused
multiply-add there (``torch.addcmul``) is one here, by name; all other multiplications and
additions are kept apart by ``enable_fp_fusion=False`` at every launch (:data:`LAUNCH`).
"""

import triton
import triton.language as tl
from torch import Tensor

# Whether the kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1).
INTERPRETED = bool(triton.knobs.runtime.interpret)
# Options of every launch. Numbers that follow the batch are not specialized on, or a kernel would
# be compiled for batches of one, of multiples of 16 and of others.
LAUNCH = dict(enable_fp_fusion=False)
# A program does more than a tile only where there are programs enough for every multiprocessor.
MANY_PROGRAMS = 512

# From this size on places are counted in 64 bits. Tiles reach past the end, so it is below 2**31.
WIDE_FROM = 1 << 30

_INTERPRETED = tl.constexpr(INTERPRETED)
# 1.5 * 2**23: adding it leaves an integer in the low bits of a float32, rounded half to even.
MAGIC = tl.constexpr(12582912.0)
_MAGIC_BITS = tl.constexpr(0x4B400000)
SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def fma(x, y, z):
    """``x * y + z`` rounded once, float32."""
    if _INTERPRETED:
        # The interpreter's own fma rounds twice. A product of two float32 is exact in float64.
        return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@triton.jit
def codes_of(x, inverse, shift, CODE_MIN: tl.constexpr, CODE_MAX: tl.constexpr):
    """Codes from 0, int32, of float32 values; NaN gives 0."""
    steps = fma(x, inverse, shift)
    # Clamping to integers and rounding commute, and within the range the magic sum is exact. NaN
    # is not above CODE_MIN.
    steps = tl.minimum(tl.where(steps > CODE_MIN, steps, CODE_MIN), CODE_MAX)
    return (steps + MAGIC).to(tl.int32, bitcast=True) - (_MAGIC_BITS + CODE_MIN)


@triton.jit
def levels_of(x, inverse, shift, CODE_MIN: tl.constexpr, CODE_MAX: tl.constexpr, table):
    """As :func:`codes_of`; what a table of levels holds at the codes, unless ``table`` is None."""
    code = codes_of(x, inverse, shift, CODE_MIN, CODE_MAX)
    if table is not None:
        # A table is one line of the cache.
        code = tl.load(table + code).to(tl.int32)
    return code


def table_or_none(table: Tensor) -> Tensor | None:
    """A table of levels, or None for one without any."""
    return table.contiguous() if table.numel() else None


def launch_options(size: int, tile: int, each: int = 16) -> dict:
    """Options that every launch has: ``size`` of the tensor, values of a tile and of a thread."""
    return dict(WIDE=size >= WIDE_FROM, num_warps=min(max(tile // (32 * each), 1), 32), **LAUNCH)


def learned_axis(scale: Tensor) -> int:
    """Axis that a scale is learned along, counted from the end; 0 for one number."""
    return next((i for i in range(1, scale.dim() + 1) if scale.shape[-i] != 1), 0)


def numbers_of(
    scale: Tensor, offset: Tensor | None, table: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, offset and table as the kernels read them."""
    scale = scale.contiguous()
    return scale, scale if offset is None else offset.contiguous(), table.contiguous()


def count_tables(table: Tensor) -> int:
    """Tables of all heads, or 1."""
    return len(table) if table.dim() > 1 else 1


def zeros_of(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of scale and offset where nothing is quantized."""
    zeros = scale.new_zeros(2, *scale.shape)
    return zeros[0], zeros[1]
