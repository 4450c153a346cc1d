"""What residual blocks of transformers are made of, and packed blocks that add it in few ops."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..layers.family import full_name, with_mixin
from ..layers.fused import (
    fuses_mlp,
    fuses_norm_linear,
    is_identity_in_eval,
    is_plain,
    linear_add,
    mlp_add,
    norm_linear,
)
from ..layers.int4_attention import Int4Attention
from ..layers.int4_linear import Int4Linear

UNSCALED = nn.Identity()
# LayerScale: a factor per channel of the last axis, under one of several names.
SCALES = {
    'mmcv.cnn.bricks.scale.LayerScale': 'weight',
    'mmpretrain.models.utils.layer_scale.LayerScale': 'weight',
    'timm.layers.layer_scale.LayerScale': 'gamma',
    'transformers.models.dinov2.modeling_dinov2.Dinov2LayerScale': 'lambda1',
}


def _is_scale(module: nn.Module) -> bool:
    """Whether the module is no factor, or a factor per channel of the last axis."""
    if isinstance(module, nn.Identity):
        return True
    known = full_name(type(module)) in SCALES
    return known and getattr(module, 'data_format', 'channels_last') == 'channels_last'


def _factors(module: nn.Module) -> Tensor | None:
    """Factors of what :func:`_is_scale` has accepted."""
    if isinstance(module, nn.Identity):
        return None
    return getattr(module, SCALES[full_name(type(module))])


class AttentionParts(NamedTuple):
    """``x + scale(proj(product(linears(norm(x)))))``.

    Attributes:
        module: Class of the attention's own.
        norm: LayerNorm in front of it.
        linears: One Linear to query, key and value, or one each.
        product: What multiplies.
        proj: The Linear behind it.
        scale: LayerScale or Identity.
        idle: What else a fused forward leaves out.
    """

    module: nn.Module
    norm: nn.Module
    linears: tuple[nn.Module, ...]
    product: nn.Module
    proj: nn.Module
    scale: nn.Module
    idle: tuple[nn.Module, ...]

    def fuses(self) -> bool:
        """Whether :meth:`add` is what the modules compute."""
        return (
            isinstance(self.product, Int4Attention)
            and isinstance(self.proj, Int4Linear)
            and all(fuses_norm_linear(self.norm, linear) for linear in self.linears)
            and is_identity_in_eval(*self.idle)
            and _is_scale(self.scale)
            and is_plain(self.norm, self.module)
        )

    def qkv(self, x: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., 3C)``."""
        parts = [norm_linear(x, self.norm, linear) for linear in self.linears]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def add(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``."""
        return self.close(x, self.product(self.qkv(x)))

    def close(self, x: Tensor, out: Tensor) -> Tensor:
        """``x + scale(proj(out))``, all of the shape of ``x``."""
        return linear_add(out, self.proj, x, _factors(self.scale))


class MlpParts(NamedTuple):
    """``x + scale(second(gelu(first(norm(x)))))``; ``module`` holds the MLP."""

    module: nn.Module
    norm: nn.Module
    first: nn.Module
    gelu: nn.Module
    second: nn.Module
    scale: nn.Module
    idle: tuple[nn.Module, ...]

    def fuses(self) -> bool:
        """Whether :meth:`add` is what the modules compute."""
        return (
            fuses_mlp(self.norm, self.first, self.gelu, self.second)
            and is_identity_in_eval(*self.idle)
            and _is_scale(self.scale)
            and is_plain(self.norm, self.module)
        )

    def add(self, x: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., C)``."""
        return mlp_add(x, self.norm, self.first, self.second, _factors(self.scale))


class Int4PreNormBlock:
    """Mixin over a block that adds its attention, then its MLP, each behind a LayerNorm."""

    fuses_attention: bool
    fuses_mlp: bool

    def parts(self) -> tuple[AttentionParts, MlpParts | None]:
        """What the block is made of; no MLP if it is of another kind."""
        raise NotImplementedError

    def plain_attention(self, x: Tensor, *args, **kwargs) -> Tensor:
        """``x`` and its attention, by the modules' own forwards."""
        raise NotImplementedError

    def plain_mlp(self, x: Tensor) -> Tensor:
        """``x`` and its MLP, likewise."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``; the rest is for the attention, a mask for example."""
        x = x.contiguous()
        attention, mlp = self.parts()
        options = (*args, *kwargs.values())
        if self.fuses_attention and all(value is None or value is False for value in options):
            x = attention.add(x)
        else:
            x = self.plain_attention(x, *args, **kwargs)
        return mlp.add(x) if self.fuses_mlp else self.plain_mlp(x)


def fuse_block(mixin: type, block: nn.Module) -> bool:
    """Makes a block compute fused; returns whether anything was fused.

    Args:
        mixin: Class with the ``parts`` of the block, and a forward that heeds its
            ``fuses_attention`` and ``fuses_mlp``.
        block: The block, of packed layers.
    """
    attention, mlp = mixin.parts(block)
    block.fuses_attention = attention.fuses()
    block.fuses_mlp = mlp is not None and mlp.fuses()
    return (block.fuses_attention or block.fuses_mlp) and with_mixin(block, mixin)
