"""LayerNorm and GELU that compute the arithmetic of the deployed model (`quant/arithmetic.py`).

They differ from torch's by a rounding error, and by that decide the same codes as the kernels.
"""

import torch
from torch import Tensor, nn

from ..ops import library as _library  # noqa: F401  (defines the ops)
from .family import entry_of

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
    """``nn.GELU``, reproducible to the last bit where no gradient flows."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return super().forward(x) if _torch_computes(x) else _gelu(x)


def make_reproducible(model: nn.Module) -> None:
    """Gives the LayerNorms and GELUs of a model their reproducible class, in place.

    So are classes that the families name as the same (:attr:`.Family.same_as`). A LayerNorm over
    several axes or without parameters, the tanh approximation of GELU and other subclasses stay
    what they are.
    """
    for module in model.modules():
        kind = entry_of(module, 'same_as') or type(module)
        if kind is nn.LayerNorm:
            if len(module.normalized_shape) == 1 and module.bias is not None:
                module.__class__ = ReproducibleLayerNorm
        elif kind is nn.GELU and getattr(module, 'approximate', 'none') == 'none':
            module.__class__, module.approximate = ReproducibleGELU, 'none'
