"""The compiled CPU kernels in place of the simulation, for a while.

The simulation is written down in plain torch, so that kernels can be tested against it. Where
many images pass through a frozen model it lends its products to the kernels, which compute the
same numbers in a fraction of the time (:mod:`gplq_mm.quant.arithmetic`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..ops import library as _library  # noqa: F401  (defines the ops)
from ..ops import native
from .attention import QuantAttention
from .conv import QuantConv2d
from .conv_transpose import QuantConvTranspose2d
from .int4_conv import Int4Conv2d
from .int4_conv_transpose import Int4ConvTranspose2d
from .int4_linear import Int4Linear
from .int4_weight import DeployError, Int4WeightLayer, table_operand
from .linear import QuantLinear

# Simulated layer -> packed layer.
PACKED: dict[type, type[Int4WeightLayer]] = {
    QuantLinear: Int4Linear,
    QuantConv2d: Int4Conv2d,
    QuantConvTranspose2d: Int4ConvTranspose2d,
}
_attention = torch.ops.gplq_mm.int4_attention.default


@contextmanager
def compiled_products(model: nn.Module) -> Iterator[None]:
    """Context in which quantized products of ``model`` run in the compiled CPU kernels.

    These are the attentions whose four grids are frozen, and the layers that Stage 2 has
    quantized. All else computes as before, and so does everything on another device or in an
    install without kernels. Quantizers must not change inside.

    Args:
        model: Model or part of one.
    """
    replaced: list[tuple[nn.Module, str]] = []
    try:
        if native.is_loaded():
            for module in model.modules():
                key, function = _compiled(module)
                if function is not None:
                    # An instance attribute hides the class's method.
                    module.__dict__[key] = function
                    replaced.append((module, key))
        yield
    finally:
        for module, key in replaced:
            del module.__dict__[key]


def _compiled(module: nn.Module) -> tuple[str, Callable | None]:
    """Name of a method and what takes its place, or None."""
    if type(module) is QuantAttention:
        return 'attend', partial(_attend, module)
    packed = PACKED.get(type(module))
    if packed is None or not module.weight_is_quantized or module.weight.device.type != 'cpu':
        return '', None
    try:
        return 'forward', packed.from_quantized(module).forward
    except DeployError:
        return '', None


def _attend(
    attention: QuantAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """:meth:`QuantAttention.attend`."""
    same = query.shape == key.shape == value.shape and query.device.type == 'cpu'
    if not same or dropout_p or not attention.computes_on_codes(query):
        return QuantAttention.attend(attention, query, key, value, scale, bias, mask, dropout_p)
    qkv = torch.stack([x.transpose(1, 2) for x in (query, key, value)], 2).flatten(2)
    tables = [table_operand(table, query.device) for table in attention.tables()]
    added = (None if x is None else x.float().contiguous() for x in (bias, mask))
    out = _attention(
        qkv.float(),
        attention.num_heads,
        scale,
        *attention.grids(),
        tables,
        attention.probs.row_relative,
        *added,
        None,
        0,
    )
    return out.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2).to(value.dtype)
