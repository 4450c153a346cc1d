"""ViT and DeiT of mmpretrain."""

from functools import partial

from torch import Tensor, nn

from ..layers.attention import QuantAttention
from ..layers.family import AttentionKind, Family, with_mixin
from ..layers.fused import (
    fuses_norm_linear,
    is_identity_in_eval,
    is_plain,
    linear_add,
    norm_linear,
)
from ..layers.int4_attention import Int4Attention, unsupported
from ..layers.int4_linear import Int4Linear
from ..registry import FAMILIES
from .ffn import MLPS, fuses_ffn, gamma_of, is_layer_scale, run_ffn

__all__ = ['Int4EncoderLayer', 'Int4MultiheadAttention', 'QuantMultiheadAttention', 'ViT']


class QuantMultiheadAttention:
    """Mixin over mmpretrain's ``MultiheadAttention``: same parameters, quantized products."""

    def forward(self, x: Tensor) -> Tensor:
        """As the class's own forward, but q, k and v are taken apart at once.

        Taken one after the other, each would have a gradient of zeros for the other two.

        Args:
            x: ``(B, N, C)``.

        Returns:
            ``(B, N, C)``.
        """
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dims)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.attn_drop if self.training else 0.0
        out = self.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        out = self.proj(out.transpose(1, 2).reshape(batch, tokens, self.embed_dims))
        out = self.out_drop(self.gamma1(self.proj_drop(out)))
        return value.squeeze(1) + out if self.v_shortcut else out


def quantize_attention(module: nn.Module, specs: dict, name: str) -> None:
    """The product is an instance attribute."""
    attention = QuantAttention(specs, module.num_heads, None, name)
    original = module.scaled_dot_product_attention
    if isinstance(original, partial):
        # Set by qk_scale; that implementation divides by its `scale`.
        attention.register_forward_pre_hook(
            partial(_force_scale, 1.0 / original.keywords['scale']), with_kwargs=True
        )
    module.scaled_dot_product_attention = attention
    with_mixin(module, QuantMultiheadAttention)


def _force_scale(scale: float, _module: nn.Module, args: tuple, kwargs: dict) -> tuple:
    return args, {**kwargs, 'scale': scale}


class Int4MultiheadAttention:
    """Mixin over mmpretrain's ``MultiheadAttention`` without a shortcut from the values."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``."""
        out = self.proj(self.scaled_dot_product_attention(self.qkv(x)))
        return self.out_drop(self.gamma1(self.proj_drop(out)))


def pack_attention(module: nn.Module) -> str | None:
    """In one op, or the reason why not."""
    simulated = module.scaled_dot_product_attention
    reason = 'it adds the values to its output' if module.v_shortcut else unsupported(simulated)
    if reason is None:
        packed = Int4Attention.from_quantized(simulated, module.num_heads, module.head_dims**-0.5)
        module.scaled_dot_product_attention = packed
        with_mixin(module, Int4MultiheadAttention)
    return reason


class Int4EncoderLayer:
    """Mixin over mmpretrain's ``TransformerEncoderLayer``."""

    fuses_attention: bool
    fuses_mlp: bool

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``."""
        x = x.contiguous()
        attn = self.attn
        if self.fuses_attention:
            out = attn.scaled_dot_product_attention(norm_linear(x, self.ln1, attn.qkv))
            x = linear_add(out, attn.proj, x, gamma_of(attn.gamma1))
        else:
            x = x + attn(self.ln1(x))
        return run_ffn(x, self.ln2, self.ffn, self.fuses_mlp)


def fuse_encoder_layer(block: nn.Module) -> bool:
    """Makes a ``TransformerEncoderLayer`` compute fused; returns whether anything was fused."""
    attn = block.attn
    block.fuses_attention = (
        isinstance(attn, Int4MultiheadAttention)
        and isinstance(attn.proj, Int4Linear)
        and fuses_norm_linear(block.ln1, attn.qkv)
        and is_identity_in_eval(attn.proj_drop, attn.out_drop)
        and is_layer_scale(attn.gamma1)
        and is_plain(block.ln1, attn)
    )
    block.fuses_mlp = fuses_ffn(block.ln2, block.ffn)
    return (block.fuses_attention or block.fuses_mlp) and with_mixin(block, Int4EncoderLayer)


@FAMILIES.register_module()
class ViT(Family):
    """ViT and DeiT of mmpretrain."""

    attentions = {
        'mmpretrain.models.utils.attention.MultiheadAttention': AttentionKind(
            quantize_attention, pack_attention
        ),
    }
    blocks = {
        'mmpretrain.models.backbones.vision_transformer.TransformerEncoderLayer': -1,
        'mmpretrain.models.backbones.vit_sam.TransformerEncoderLayer': -1,
    }
    mlps = MLPS
    fused = {
        'mmpretrain.models.backbones.vision_transformer.TransformerEncoderLayer': (
            fuse_encoder_layer
        ),
    }
    scopes = ('mmpretrain',)
