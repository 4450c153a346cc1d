"""ViT, DeiT and Swin of timm."""

from functools import partial

from torch import Tensor, nn

from ..layers.attention import QuantAttention
from ..layers.family import AttentionKind, Family, MlpNames, full_name, with_mixin
from ..layers.fused import fuses_norm_linear, is_plain, norm_linear
from ..layers.int4_attention import Int4Attention, additive_mask, unsupported
from ..registry import FAMILIES
from .blocks import UNSCALED, AttentionParts, Int4PreNormBlock, MlpParts, fuse_block
from .swin import WINDOW_MSA, WindowedBlock

MLP = 'timm.layers.mlp.Mlp'
BLOCK = 'timm.models.vision_transformer.Block'
VIT, SWIN = 'timm.models.vision_transformer.', 'timm.models.swin_transformer.'


class QuantTimmAttention:
    """Mixin over timm's ``Attention``: same parameters, quantized products."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """``(B, N, C)`` to ``(B, N, D)``; the mask as in torch's attention."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = self.quant_attention(
            self.q_norm(query),
            self.k_norm(key),
            value,
            attn_mask,
            self.attn_drop.p if self.training else 0.0,
            is_causal,
            self.scale,
        )
        # Releases of timm before 1.0.20 have no norm, those before 1.0.27 no gate.
        out = getattr(self, 'norm', UNSCALED)(out.transpose(1, 2).flatten(2))
        if getattr(self, 'gate', None) is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


def quantize_attention(module: nn.Module, specs: dict, name: str) -> None:
    """Attention of all tokens."""
    module.quant_attention = QuantAttention(specs, module.num_heads, None, name)
    with_mixin(module, QuantTimmAttention)


class Int4TimmAttention:
    """Mixin over timm's ``Attention`` without what acts between its layers and its products."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """``(B, N, C)`` to ``(B, N, D)``."""
        mask = additive_mask(attn_mask, is_causal, x.shape[1], x.device)
        return self.proj_drop(self.proj(self.quant_attention(self.qkv(x), mask)))


def pack_attention(module: nn.Module) -> str | None:
    """In one op, or the reason why not."""
    between = (module.q_norm, module.k_norm, getattr(module, 'norm', UNSCALED))
    if not all(isinstance(norm, nn.Identity) for norm in between):
        return 'it normalizes queries and keys, or its output'
    if getattr(module, 'gate', None) is not None:
        return 'a gate multiplies its output'
    reason = unsupported(module.quant_attention)
    if reason is None:
        packed = Int4Attention.from_quantized(
            module.quant_attention, module.num_heads, module.scale
        )
        module.quant_attention = packed
        with_mixin(module, Int4TimmAttention)
    return reason


def mlp_parts(block: nn.Module, scale: nn.Module) -> MlpParts | None:
    """The MLP of a block, or None for a gated one."""
    mlp = block.mlp
    if full_name(type(mlp)) != MLP:
        return None
    idle = (mlp.drop1, mlp.norm, mlp.drop2, block.drop_path2)
    return MlpParts(mlp, block.norm2, mlp.fc1, mlp.act, mlp.fc2, scale, idle)


class Int4TimmBlock(Int4PreNormBlock):
    """Mixin over timm's ``Block`` of ViTs."""

    def parts(self) -> tuple[AttentionParts, MlpParts | None]:
        attn = self.attn
        idle = (attn.proj_drop, self.drop_path1)
        attention = AttentionParts(
            attn, self.norm1, (attn.qkv,), attn.quant_attention, attn.proj, self.ls1, idle
        )
        return attention, mlp_parts(self, self.ls2)

    def plain_attention(self, x: Tensor, *args, **kwargs) -> Tensor:
        return x + self.ls1(self.attn(self.norm1(x), *args, **kwargs))

    def plain_mlp(self, x: Tensor) -> Tensor:
        return x + self.ls2(self.mlp(self.norm2(x)))


def fuse_timm_block(block: nn.Module) -> bool:
    """Of a block whose attention is a known one."""
    return hasattr(block.attn, 'quant_attention') and fuse_block(Int4TimmBlock, block)


class Int4TimmSwinBlock(WindowedBlock):
    """Mixin over timm's ``SwinTransformerBlock``."""

    fuses_attention: bool
    fuses_mlp: bool

    def parts(self) -> tuple[AttentionParts, MlpParts | None]:
        """What the block is made of."""
        attn = self.attn
        idle = (attn.proj_drop, self.drop_path1)
        attention = AttentionParts(
            attn, self.norm1, (attn.qkv,), attn.quant_attention, attn.proj, UNSCALED, idle
        )
        return attention, mlp_parts(self, UNSCALED)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``."""
        x = x.contiguous()
        attention, mlp = self.parts()
        if self.fuses_attention:
            # timm shifts a map before it is padded.
            out = self.window_attention(
                x.flatten(1, 2),
                tuple(x.shape[1:3]),
                attention,
                tuple(self.window_size),
                tuple(self.shift_size),
                pads_first=False,
            )
            x = out.view(x.shape)
        else:
            x = x + self._attn(self.norm1(x))
        return mlp.add(x) if self.fuses_mlp else x + self.mlp(self.norm2(x))


class Int4TimmPatchMerging:
    """Mixin over timm's ``PatchMerging``."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, ceil(H / 2), ceil(W / 2), D)``."""
        x = nn.functional.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        return norm_linear(x.permute(0, 1, 3, 4, 2, 5).flatten(3), self.norm, self.reduction)


def fuse_patch_merging(module: nn.Module) -> bool:
    """Makes a ``PatchMerging`` compute fused."""
    fuses = fuses_norm_linear(module.norm, module.reduction)
    fuses = fuses and is_plain(module.norm, module.reduction)
    return fuses and with_mixin(module, Int4TimmPatchMerging)


def last_layer(model: nn.Module) -> nn.Module:
    """The classifier, whose input is mimicked, or the last norm where there is none."""
    linears = [module for module in model.head.modules() if isinstance(module, nn.Linear)]
    return linears[-1] if linears else model.norm


@FAMILIES.register_module()
class Timm(Family):
    """ViT, DeiT and Swin of timm."""

    attentions = {
        'timm.layers.attention.Attention': AttentionKind(quantize_attention, pack_attention),
        SWIN + 'WindowAttention': WINDOW_MSA,
    }
    blocks = {
        **dict.fromkeys([BLOCK, VIT + 'ResPostBlock', VIT + 'ParallelThingsBlock'], -1),
        SWIN + 'SwinTransformerBlock': -1,
    }
    mlps = {MLP: MlpNames('fc1', 'act', 'fc2')}
    fused = {
        BLOCK: fuse_timm_block,
        SWIN + 'SwinTransformerBlock': partial(fuse_block, Int4TimmSwinBlock),
        SWIN + 'PatchMerging': fuse_patch_merging,
    }
    same_as = {
        'timm.layers.norm.LayerNorm': nn.LayerNorm,
        'timm.layers.activations.GELU': nn.GELU,
    }
    features = dict.fromkeys([VIT + 'VisionTransformer', SWIN + 'SwinTransformer'], last_layer)
    ends = {
        VIT + 'VisionTransformer': ('patch_embed.proj', 'head', 'head_dist'),
        SWIN + 'SwinTransformer': ('patch_embed.proj', 'head.fc'),
    }
