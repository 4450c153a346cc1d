"""ViT, DINOv2 and Swin of Hugging Face's transformers, from release 5.20 on.

Those before have other classes, which :func:`.quantize_model` names as unknown.
"""

from functools import partial

import torch
from torch import Tensor, nn

from ..layers.attention import QuantAttention
from ..layers.family import AttentionKind, Family, MlpNames, full_name, with_mixin
from ..layers.fused import fuses_norm_linear, is_plain, norm_linear
from ..layers.int4_attention import Int4Attention, additive_mask, unsupported
from ..layers.int4_conv import Int4Conv2d
from ..registry import FAMILIES
from .blocks import UNSCALED, AttentionParts, Int4PreNormBlock, MlpParts, fuse_block
from .swin import WindowedBlock

VIT = 'transformers.models.vit.modeling_vit.ViT'
DINO = 'transformers.models.dinov2.modeling_dinov2.Dinov2'
SWIN = 'transformers.models.swin.modeling_swin.Swin'


def linears_of(attention: nn.Module) -> tuple[nn.Module, ...]:
    """The layers to query, key and value."""
    return attention.q_proj, attention.k_proj, attention.v_proj


def bias_of(attention: nn.Module) -> Tensor | None:
    """Relative position bias ``(heads, N, N)`` of a window, or None."""
    bias = getattr(attention, 'relative_position_bias', None)
    return None if bias is None else bias()[0]


class QuantHuggingFaceAttention:
    """Mixin over an attention, of windows or of all tokens: same parameters, quantized products.

    It replaces all implementations that transformers has (eager, sdpa, ...), and gives no
    probabilities.
    """

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_options
    ) -> tuple[Tensor, None]:
        """``(B, N, C)`` to ``(B, N, C)``; the mask of windows is ``(windows, N, N)``."""
        query, key, value = (
            linear(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for linear in linears_of(self)
        )
        dropout = self.attention_dropout if self.training else 0.0
        bias, product = bias_of(self), self.quant_attention
        if bias is None:
            out = product(query, key, value, attention_mask, dropout, scale=self.scaling)
        else:
            out = product.attend(query, key, value, self.scaling, bias, attention_mask, dropout)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


def quantize_attention(module: nn.Module, specs: dict, name: str) -> None:
    """Attention of all tokens or of a window."""
    bias = getattr(module, 'relative_position_bias', None)
    tokens = None if bias is None else bias.window_area
    module.quant_attention = QuantAttention(specs, module.num_attention_heads, tokens, name)
    with_mixin(module, QuantHuggingFaceAttention)


class Int4HuggingFaceAttention:
    """Mixin over the same attentions."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_options
    ) -> tuple[Tensor, None]:
        """``(B, N, C)`` to ``(B, N, C)``."""
        qkv = torch.cat([linear(hidden_states) for linear in linears_of(self)], -1)
        mask = additive_mask(attention_mask, False, qkv.shape[1], qkv.device)
        return self.o_proj(self.quant_attention(qkv, mask)), None


def pack_attention(module: nn.Module) -> str | None:
    """In one op, or the reason why not."""
    reason = unsupported(module.quant_attention)
    if reason is None:
        module.quant_attention = Int4Attention.from_quantized(
            module.quant_attention, module.num_attention_heads, module.scaling, bias_of(module)
        )
        with_mixin(module, Int4HuggingFaceAttention)
    return reason


def attention_parts(block: nn.Module, norm: str, scale: nn.Module, drop: str) -> AttentionParts:
    """The attention of a layer."""
    attn = block.attention
    return AttentionParts(
        attn,
        block.get_submodule(norm),
        linears_of(attn),
        attn.quant_attention,
        attn.o_proj,
        scale,
        (block.get_submodule(drop),),
    )


def mlp_parts(block: nn.Module, norm: str, scale: nn.Module, drop: str) -> MlpParts | None:
    """The MLP of a layer, or None for a gated one."""
    mlp = block.mlp
    if full_name(type(mlp)) not in MLPS:
        return None
    idle = (block.get_submodule(drop),)
    norm = block.get_submodule(norm)
    return MlpParts(mlp, norm, mlp.fc1, mlp.activation_fn, mlp.fc2, scale, idle)


class Int4ViTLayer(Int4PreNormBlock):
    """Mixin over ``ViTLayer``."""

    def parts(self) -> tuple[AttentionParts, MlpParts | None]:
        return (
            attention_parts(self, 'layernorm_before', UNSCALED, 'dropout'),
            mlp_parts(self, 'layernorm_after', UNSCALED, 'dropout'),
        )

    def plain_attention(self, x: Tensor, *args, **kwargs) -> Tensor:
        return x + self.attention(self.layernorm_before(x), *args, **kwargs)[0]

    def plain_mlp(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.layernorm_after(x))


class Int4Dinov2Layer(Int4PreNormBlock):
    """Mixin over ``Dinov2Layer``."""

    def parts(self) -> tuple[AttentionParts, MlpParts | None]:
        return (
            attention_parts(self, 'norm1', self.layer_scale1, 'drop_path'),
            mlp_parts(self, 'norm2', self.layer_scale2, 'drop_path'),
        )

    def plain_attention(self, x: Tensor, *args, **kwargs) -> Tensor:
        return x + self.layer_scale1(self.attention(self.norm1(x), *args, **kwargs)[0])

    def plain_mlp(self, x: Tensor) -> Tensor:
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class Int4SwinLayer(WindowedBlock):
    """Mixin over ``SwinLayer`` whose attention is fused; its MLP may stay."""

    fuses_attention: bool
    fuses_mlp: bool

    def parts(self) -> tuple[AttentionParts, MlpParts | None]:
        """What the layer is made of."""
        attention = attention_parts(self, 'layernorm_before', UNSCALED, 'dropout')
        attention = attention._replace(idle=(*attention.idle, self.drop_path))
        return attention, mlp_parts(self, 'layernorm_after', UNSCALED, 'dropout')

    def forward(
        self,
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        always_partition: bool = False,
        **options,
    ) -> tuple[Tensor, None]:
        """``(B, H * W, C)`` and ``(H, W)`` to ``(B, H * W, C)``."""
        attention, mlp = self.parts()
        if not self.fuses_attention:
            return super().forward(hidden_states, input_dimensions, always_partition, **options)
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        window, shift = (int(size) for size in (self.window_size, self.shift_size))
        x = self.window_attention(
            hidden_states.contiguous(),
            tuple(input_dimensions),
            attention,
            (window, window),
            (shift, shift),
        )
        x = mlp.add(x) if self.fuses_mlp else x + self.mlp(self.layernorm_after(x))
        return x, None


class Int4SwinPatchMerging:
    """Mixin over ``SwinPatchMerging``."""

    def forward(self, input_feature: Tensor, input_dimensions: tuple[int, int]) -> Tensor:
        """``(B, H * W, C)`` to ``(B, ceil(H / 2) * ceil(W / 2), 2C)``."""
        height, width = input_dimensions
        x = self.maybe_pad(input_feature.unflatten(1, input_dimensions), height, width)
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5)
        return norm_linear(x.flatten(3).flatten(1, 2), self.norm, self.reduction)


class ImageDtype:
    """Mixin over a packed first layer: transformers casts images to the type of its weight."""

    @property
    def weight(self) -> Tensor:
        """A tensor of the type that the model computes in."""
        return self.like


def keep_images(embeddings: nn.Module) -> bool:
    """Lets images in as they are; nothing is fused by that."""
    projection = embeddings.patch_embeddings.projection
    if isinstance(projection, Int4Conv2d):
        # No parameter of the layer's own.
        projection.__dict__['like'] = embeddings.cls_token
        with_mixin(projection, ImageDtype)
    return False


def fuse_patch_merging(module: nn.Module) -> bool:
    """Makes a ``SwinPatchMerging`` compute fused."""
    fuses = fuses_norm_linear(module.norm, module.reduction)
    fuses = fuses and is_plain(module.norm, module.reduction)
    return fuses and with_mixin(module, Int4SwinPatchMerging)


ATTENTION = AttentionKind(quantize_attention, pack_attention)
MLPS = dict.fromkeys(
    [VIT + 'MLP', DINO + 'MLP', SWIN + 'MLP'], MlpNames('fc1', 'activation_fn', 'fc2')
)
FIRST = ('embeddings.patch_embeddings.projection',)


@FAMILIES.register_module()
class HuggingFace(Family):
    """ViT, DINOv2 and Swin of transformers, bare or with a classifier.

    A layer of Swin gives a tuple, so it is no residual block: its weights are rounded layer by
    layer, and no compensation lies beside it.
    """

    attentions = dict.fromkeys([f'{name}Attention' for name in (VIT, DINO, SWIN)], ATTENTION)
    blocks = {VIT + 'Layer': -1, DINO + 'Layer': -1}
    mlps = MLPS
    fused = {
        VIT + 'Layer': partial(fuse_block, Int4ViTLayer),
        DINO + 'Layer': partial(fuse_block, Int4Dinov2Layer),
        SWIN + 'Layer': partial(fuse_block, Int4SwinLayer),
        SWIN + 'PatchMerging': fuse_patch_merging,
        **dict.fromkeys([VIT + 'Embeddings', DINO + 'Embeddings'], keep_images),
    }
    same_as = {'transformers.activations.GELUActivation': nn.GELU}
    features = {
        VIT + 'Model': lambda model: model.pooler.dense if model.pooler else model.layernorm,
        **dict.fromkeys([DINO + 'Model', SWIN + 'Model'], lambda model: model.layernorm),
        **dict.fromkeys(
            [f'{name}ForImageClassification' for name in (VIT, DINO, SWIN)],
            lambda model: model.classifier,
        ),
    }
    ends = {
        **dict.fromkeys([f'{name}Model' for name in (DINO, SWIN)], FIRST),
        VIT + 'Model': (*FIRST, 'pooler.dense'),
        **dict.fromkeys(
            [f'{name}ForImageClassification' for name in (VIT, DINO, SWIN)], ('classifier',)
        ),
    }
