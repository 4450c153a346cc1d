"""LayerNorm and GELU that compute the arithmetic of the deployed model (`quant/arithmetic.py`).

They differ from torch's by a rounding error, and by that decide the same codes as the kernels.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..ops import library as _library  # noqa: F401  (defines the ops)
from .linear import QuantLinear

__all__ = ['ReproducibleGELU', 'ReproducibleLayerNorm', 'fuse_gelu', 'make_reproducible']


_layer_norm = torch.ops.gplq_mm.layer_norm.default
_gelu = torch.ops.gplq_mm.gelu.default


def _torch_computes(*tensors: Tensor) -> bool:
    """Whether gradients, another precision or a compiler ask for torch's own function."""
    if torch.compiler.is_compiling() or any(t.dtype != torch.float32 for t in tensors):
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


class ReproducibleLayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the last axis, reproducible to the last bit where no gradient flows."""

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., C)``."""
        if _torch_computes(x, self.weight, self.bias):
            return super().forward(x)
        return _layer_norm(x, self.weight, self.bias, self.eps)


class ReproducibleGELU(nn.GELU):
    """``nn.GELU``, reproducible to the last bit where no gradient flows.

    A quantized Linear that follows can compute it in one op with its rounding, and then keeps
    one tensor for backward instead of two (:func:`fuse_gelu`). The module gives it the input as
    it is then.
    """

    # The layer that follows, if it may take the work over. Not a child: it has its own place.
    consumer: QuantLinear | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        if self.consumer is not None and self.consumer.keeps_codes(x):
            return x
        return super().forward(x) if _torch_computes(x) else _gelu(x)


def make_reproducible(model: nn.Module) -> None:
    """Gives the LayerNorms and GELUs of a model their reproducible class, in place.

    A LayerNorm over several axes or without parameters, the tanh approximation of GELU and
    subclasses stay what they are.
    """
    for module in model.modules():
        if type(module) is nn.LayerNorm:
            if len(module.normalized_shape) == 1 and module.bias is not None:
                module.__class__ = ReproducibleLayerNorm
        elif type(module) is nn.GELU and module.approximate == 'none':
            module.__class__ = ReproducibleGELU


def _is_sequence(module: nn.Module) -> bool:
    """Whether a module runs its children one after the other (mmengine has a Sequential too)."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _steps(module: nn.Module) -> Iterator[nn.Module]:
    """What a Sequential of Sequentials runs, in order."""
    for child in module:
        if _is_sequence(child):
            yield from _steps(child)
        elif not (isinstance(child, nn.Dropout) and child.p == 0):
            yield child


def fuse_gelu(model: nn.Module) -> None:
    """Lets every quantized Linear that follows a GELU in an ``nn.Sequential`` take it over while
    it trains, in place. A Dropout that drops nothing may lie between them.
    """
    for module in model.modules():
        if not _is_sequence(module):
            continue
        steps = list(_steps(module))
        for gelu, layer in pairwise(steps):
            if type(gelu) is ReproducibleGELU and isinstance(layer, QuantLinear):
                gelu.__dict__['consumer'] = layer
                layer.takes_gelu = True
