"""ViT and DeiT of mmpretrain."""

from functools import partial

from torch import Tensor, nn

from ..layers.attention import QuantAttention
from ..layers.family import AttentionKind, Family, with_mixin
from ..layers.int4_attention import Int4Attention, unsupported
from ..registry import FAMILIES
from .blocks import AttentionParts, Int4PreNormBlock, MlpParts, fuse_block
from .ffn import MLPS, ffn_parts


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


class Int4EncoderLayer(Int4PreNormBlock):
    """Mixin over mmpretrain's ``TransformerEncoderLayer``."""

    def parts(self) -> tuple[AttentionParts, MlpParts | None]:
        attn = self.attn
        attention = AttentionParts(
            attn,
            self.ln1,
            (attn.qkv,),
            attn.scaled_dot_product_attention,
            attn.proj,
            attn.gamma1,
            (attn.proj_drop, attn.out_drop),
        )
        return attention, ffn_parts(self.ln2, self.ffn)

    def plain_attention(self, x: Tensor) -> Tensor:
        return x + self.attn(self.ln1(x))

    def plain_mlp(self, x: Tensor) -> Tensor:
        return self.ffn(self.ln2(x), identity=x)


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
        'mmpretrain.models.backbones.vision_transformer.TransformerEncoderLayer': partial(
            fuse_block, Int4EncoderLayer
        ),
    }
