"""What fused forwards of blocks are made of: packed layers in few ops, no copies in between.

A family says which classes have one (:attr:`.Family.fused`). A part of a block that is not exactly
what an op computes keeps its modules' own forwards.
"""

import torch
from torch import Tensor, nn

from ..ops import library as _library  # noqa: F401  (defines the ops)
from .family import entry_of
from .int4_linear import Int4Linear
from .reproducible import ReproducibleGELU, ReproducibleLayerNorm

_linear_add = torch.ops.gplq_mm.int4_linear_add.default
_norm_linear = torch.ops.gplq_mm.int4_norm_linear.default
_mlp = torch.ops.gplq_mm.int4_mlp.default


def is_plain(*modules: nn.Module) -> bool:
    """Whether no hook would be skipped by not calling these modules and their children. Those
    with which transformers captures outputs on request do not count."""
    return not any(
        getattr(hook, '__module__', None) != 'transformers.utils.output_capturing'
        for module in modules
        for child in module.modules()
        for hook in (*child._forward_hooks.values(), *child._forward_pre_hooks.values())
    )


def is_identity_in_eval(*modules: nn.Module) -> bool:
    """Whether the modules pass their input through in eval mode."""
    return all(
        isinstance(module, nn.Identity | nn.Dropout) or type(module).__name__.endswith('DropPath')
        for module in modules
    )


def fuses_norm_linear(norm: nn.Module, linear: nn.Module) -> bool:
    """Whether ``linear(norm(x))`` is what :func:`norm_linear` computes."""
    return (
        isinstance(linear, Int4Linear)
        and type(norm) in (nn.LayerNorm, ReproducibleLayerNorm)
        and norm.normalized_shape == (linear.in_features,)
        and norm.weight is not None
        and norm.bias is not None
    )


def fuses_mlp(norm: nn.Module, first: nn.Module, gelu: nn.Module, second: nn.Module) -> bool:
    """Whether ``second(gelu(first(norm(x))))`` is what :func:`mlp_add` computes."""
    return (
        fuses_norm_linear(norm, first)
        and isinstance(second, Int4Linear)
        and type(gelu) in (nn.GELU, ReproducibleGELU)
        and gelu.approximate == 'none'
    )


def norm_linear(x: Tensor, norm: nn.LayerNorm, linear: Int4Linear) -> Tensor:
    """``linear(norm(x))``, ``(..., in)`` to ``(..., out)``."""
    return _norm_linear(x, norm.weight, norm.bias, norm.eps, linear.operands(), linear.grid)


def linear_add(x: Tensor, linear: Int4Linear, identity: Tensor, gamma: Tensor | None) -> Tensor:
    """``identity + gamma * linear(x)``; gamma ``(out,)`` or None."""
    return _linear_add(x, linear.operands(), linear.grid, identity, gamma)


def mlp_add(
    x: Tensor, norm: nn.LayerNorm, first: Int4Linear, second: Int4Linear, gamma: Tensor | None
) -> Tensor:
    """``x + gamma * second(gelu(first(norm(x))))``; gamma ``(C,)`` or None."""
    return _mlp(
        x,
        norm.weight,
        norm.bias,
        norm.eps,
        first.operands(),
        first.grid,
        second.operands(),
        second.grid,
        gamma,
    )


def fuse_blocks(model: nn.Module) -> list[str]:
    """Gives every known block of packed layers its fused forward, in place.

    Returns:
        Names of the blocks.
    """
    return [
        name
        for name, module in model.named_modules()
        if (fuse := entry_of(module, 'fused')) is not None and fuse(module)
    ]
