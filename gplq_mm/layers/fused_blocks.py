"""Fused forwards of known transformer blocks: four to six ops a block, no copies in between.

A block is found by the full name of its class and changed in place; its children, keys and hooks
stay. A half of a block (attention or MLP) that is not exactly what the ops compute keeps the
modules' own forwards.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import library as _library  # noqa: F401  (defines the ops)
from .attention_adapters import full_name
from .int4_attention import Int4Attention, Int4MultiheadAttention, Int4WindowMSA, with_mixin
from .int4_linear import Int4Linear
from .reproducible import ReproducibleGELU, ReproducibleLayerNorm

__all__ = [
    'FUSED_BLOCKS',
    'Int4EncoderLayer',
    'Int4PatchMerging',
    'Int4SwinBlock',
    'fuse_blocks',
    'window_maps',
]

_linear_add = torch.ops.gplq_mm.int4_linear_add.default
_norm_linear = torch.ops.gplq_mm.int4_norm_linear.default
_mlp = torch.ops.gplq_mm.int4_mlp.default

# Added to the score of two tokens that the shift brought into one window (Swin, section 3.2).
MASKED = -100.0
# Input sizes whose window maps are kept.
MAX_MAPS = 16


def _plain(*modules: nn.Module) -> bool:
    """Whether no hook would be skipped by not calling these modules and their children."""
    return not any(
        child._forward_hooks or child._forward_pre_hooks
        for module in modules
        for child in module.modules()
    )


def _is_layer_norm(norm: nn.Module, channels: int) -> bool:
    return (
        type(norm) in (nn.LayerNorm, ReproducibleLayerNorm)
        and norm.normalized_shape == (channels,)
        and norm.weight is not None
        and norm.bias is not None
    )


def _is_layer_scale(module: nn.Module) -> bool:
    """Whether the module is no factor, or a factor per channel of the last axis."""
    if isinstance(module, nn.Identity):
        return True
    return type(module).__name__ == 'LayerScale' and module.data_format == 'channels_last'


def _gamma(module: nn.Module) -> Tensor | None:
    return None if isinstance(module, nn.Identity) else module.weight


def _is_identity_in_eval(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity | nn.Dropout) or type(module).__name__ == 'DropPath'


def _fusable_ffn(norm: nn.Module, ffn: nn.Module) -> bool:
    """Whether ``ffn(norm(x), identity=x)`` is what ``int4_mlp`` computes."""
    if full_name(type(ffn)) != 'mmcv.cnn.bricks.transformer.FFN':
        return False
    if ffn.num_fcs != 2 or not ffn.add_identity or not _plain(norm, ffn):
        return False
    (first, activation, drop1), second, drop2 = ffn.layers
    return (
        isinstance(first, Int4Linear)
        and isinstance(second, Int4Linear)
        and _is_layer_norm(norm, first.in_features)
        and type(activation) in (nn.GELU, ReproducibleGELU)
        and activation.approximate == 'none'
        and all(map(_is_identity_in_eval, (drop1, drop2, ffn.dropout_layer)))
        and _is_layer_scale(ffn.gamma2)
    )


def _run_mlp(x: Tensor, norm: nn.LayerNorm, ffn: nn.Module) -> Tensor:
    layers = ffn.layers
    first, second = layers[0][0], layers[1]
    return _mlp(
        x,
        norm.weight,
        norm.bias,
        norm.eps,
        first.operands(),
        first.grid,
        second.operands(),
        second.grid,
        _gamma(ffn.gamma2),
    )


def _run_norm_linear(x: Tensor, norm: nn.LayerNorm, linear: Int4Linear) -> Tensor:
    return _norm_linear(x, norm.weight, norm.bias, norm.eps, linear.operands(), linear.grid)


class Int4EncoderLayer:
    """Mixin over mmpretrain's ``TransformerEncoderLayer`` (ViT, DeiT)."""

    fuses_attention: bool
    fuses_mlp: bool

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``."""
        x = x.contiguous()
        attn = self.attn
        if self.fuses_attention:
            qkv = _run_norm_linear(x, self.ln1, attn.qkv)
            out = attn.scaled_dot_product_attention(qkv)
            proj = attn.proj
            x = _linear_add(out, proj.operands(), proj.grid, x, _gamma(attn.gamma1))
        else:
            x = x + attn(self.ln1(x))
        if self.fuses_mlp:
            return _run_mlp(x, self.ln2, self.ffn)
        return self.ffn(self.ln2(x), identity=x)


def fuse_encoder_layer(block: nn.Module) -> bool:
    """Makes a ``TransformerEncoderLayer`` compute fused; returns whether anything was fused."""
    attn = block.attn
    block.fuses_attention = (
        isinstance(attn, Int4MultiheadAttention)
        and isinstance(attn.qkv, Int4Linear)
        and isinstance(attn.proj, Int4Linear)
        and _is_layer_norm(block.ln1, attn.qkv.in_features)
        and all(map(_is_identity_in_eval, (attn.proj_drop, attn.out_drop)))
        and _is_layer_scale(attn.gamma1)
        and _plain(block.ln1, attn)
    )
    block.fuses_mlp = _fusable_ffn(block.ln2, block.ffn)
    if not (block.fuses_attention or block.fuses_mlp):
        return False
    with_mixin(block, Int4EncoderLayer)
    return True


def window_maps(
    batch: int, height: int, width: int, window: int, shift: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Where the tokens of each shifted window come from, and which of them may meet.

    Padding at the right and bottom, the cyclic shift and the partition of Swin (section 3.2)
    only move rows, so they are one index.

    Args:
        batch: Images.
        height, width: Tokens of the feature map.
        window: Side of a window, in tokens.
        shift: Cyclic shift towards the top left, in tokens.
        device: Where to.

    Returns:
        int32 ``(windows * batch, window**2)``: row of the flattened ``(batch, height, width)``
        map, or ``batch * height * width`` for padding; and float32
        ``(windows, window**2, window**2)``, 0 or -100, or None without a shift.
    """
    rows = torch.arange(batch * height * width, dtype=torch.int32, device=device)
    right, bottom = -width % window, -height % window
    rows = rows.reshape(batch, 1, height, width)
    if right or bottom:
        # A fill value that depends on the batch would fix the batch of an exported program.
        rows = F.pad(rows, (0, right, 0, bottom), value=-1)
        rows = rows.masked_fill(rows < 0, batch * height * width)
    if shift:
        rows = rows.roll((-shift, -shift), (2, 3))
    rows = _partition(rows, window).contiguous()
    if not shift:
        return rows, None
    region = 3 * _region(height + bottom, window, shift, device)[:, None] + _region(
        width + right, window, shift, device
    )
    region = _partition(region[None, None], window)
    apart = region[:, None, :] != region[:, :, None]
    return rows, torch.zeros_like(apart, dtype=torch.float32).masked_fill_(apart, MASKED)


def _partition(values: Tensor, window: int) -> Tensor:
    """``(B, 1, H, W)`` to ``(B * windows, window**2)``."""
    batch, _, height, width = values.shape
    values = values.reshape(batch, height // window, window, width // window, window)
    return values.transpose(2, 3).reshape(-1, window * window)


def _region(extent: int, window: int, shift: int, device: torch.device) -> Tensor:
    """0, 1, 2: inside, last window, and what the shift wrapped around."""
    index = torch.arange(extent, device=device)
    return (index >= extent - window).int() + (index >= extent - shift).int()


class Int4SwinBlock:
    """Mixin over mmpretrain's or mmdet's ``SwinBlock``."""

    fuses_attention: bool
    fuses_mlp: bool

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """``(B, H * W, C)`` and ``(H, W)`` to ``(B, H * W, C)``."""
        x = x.contiguous()
        if self.fuses_attention:
            x = self._window_attention(x, hw_shape)
        else:
            x = x + self.attn(self.norm1(x), hw_shape)
        if self.fuses_mlp:
            return _run_mlp(x, self.norm2, self.ffn)
        return self.ffn(self.norm2(x), identity=x)

    def _window_attention(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        batch, tokens, channels = x.shape
        rows, mask = self._maps(batch, *hw_shape, x.device)
        msa = self.attn.w_msa
        qkv = _run_norm_linear(x, self.norm1, msa.qkv).flatten(0, 1)
        if rows.numel() > qkv.shape[0]:
            # The model pads after the norm: a padding token is what qkv makes of zeros.
            qkv = torch.cat((qkv, msa.qkv(qkv.new_zeros(1, channels))))
        out = msa.quant_attention(qkv, mask, rows, batch * tokens)
        proj = msa.proj
        return _linear_add(out.view(x.shape), proj.operands(), proj.grid, x, None)

    def _maps(
        self, batch: int, height: int, width: int, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        attn = self.attn
        window, shift = attn.window_size, attn.shift_size
        # mmdet's copy always pads a small map; mmpretrain's does it on request, and does not
        # shift a map of one window otherwise.
        if not getattr(attn, 'pad_small_map', True):
            if min(height, width) < window:
                raise ValueError(
                    f'the feature map of {height} x {width} tokens is smaller than a window of '
                    f'{window}. Use larger images, or a model with pad_small_map=True.'
                )
            if min(height, width) == window:
                shift = 0
        if torch.compiler.is_compiling():
            return window_maps(batch, height, width, window, shift, device)
        key = (batch, height, width, shift, device)
        maps = self.window_maps.get(key)
        if maps is None:
            while len(self.window_maps) >= MAX_MAPS:
                self.window_maps.pop(next(iter(self.window_maps)))
            maps = window_maps(batch, height, width, window, shift, device)
            self.window_maps[key] = maps
        return maps


def fuse_swin_block(block: nn.Module) -> bool:
    """Makes a ``SwinBlock`` compute fused; returns whether anything was fused."""
    msa = block.attn.w_msa
    block.fuses_attention = (
        isinstance(msa, Int4WindowMSA)
        and isinstance(msa.quant_attention, Int4Attention)
        and isinstance(msa.qkv, Int4Linear)
        and isinstance(msa.proj, Int4Linear)
        and _is_layer_norm(block.norm1, msa.qkv.in_features)
        and all(map(_is_identity_in_eval, (msa.proj_drop, block.attn.drop)))
        and _plain(block.norm1, block.attn)
    )
    block.fuses_mlp = _fusable_ffn(block.norm2, block.ffn)
    if not (block.fuses_attention or block.fuses_mlp):
        return False
    block.window_maps = {}
    with_mixin(block, Int4SwinBlock)
    return True


class Int4PatchMerging:
    """Mixin over the ``PatchMerging`` of mmpretrain, mmdet or mmcv whose LayerNorm comes first."""

    def forward(self, x: Tensor, input_size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """``(B, H * W, C)`` and ``(H, W)`` to ``(B, h * w, D)`` and ``(h, w)``."""
        batch, _, channels = x.shape
        rows, columns = self.sampler.kernel_size
        x = x.view(batch, *input_size, channels)
        # mmdet's copy calls it otherwise.
        padding = self.adap_padding if hasattr(self, 'adap_padding') else self.adaptive_padding
        if padding is not None:
            x = padding(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        size = (x.shape[1] // rows, x.shape[2] // columns)
        # The order of nn.Unfold, which is several times slower: the pixels of a channel are
        # neighbours.
        x = x[:, : size[0] * rows, : size[1] * columns]
        pixels = [x[:, i::rows, j::columns] for i in range(rows) for j in range(columns)]
        x = torch.stack(pixels, -1).view(batch, size[0] * size[1], -1)
        return _run_norm_linear(x, self.norm, self.reduction), size


def fuse_patch_merging(block: nn.Module) -> bool:
    """Makes a ``PatchMerging`` compute fused; returns whether anything was fused."""
    sampler, reduction = block.sampler, block.reduction
    if not (
        isinstance(reduction, Int4Linear)
        and not getattr(block, 'use_post_norm', False)
        and block.norm is not None
        and _is_layer_norm(block.norm, reduction.in_features)
        and sampler.kernel_size == sampler.stride
        and (sampler.padding, sampler.dilation) == ((0, 0), (1, 1))
        and _plain(sampler, block.norm, reduction)
    ):
        return False
    with_mixin(block, Int4PatchMerging)
    return True


# class name in full -> fuse(block)
FUSED_BLOCKS = {
    'mmpretrain.models.backbones.vision_transformer.TransformerEncoderLayer': fuse_encoder_layer,
    'mmpretrain.models.backbones.swin_transformer.SwinBlock': fuse_swin_block,
    'mmdet.models.backbones.swin.SwinBlock': fuse_swin_block,
    'mmcv.cnn.bricks.transformer.PatchMerging': fuse_patch_merging,
    'mmpretrain.models.utils.embed.PatchMerging': fuse_patch_merging,
    'mmdet.models.layers.transformer.utils.PatchMerging': fuse_patch_merging,
}


def fuse_blocks(model: nn.Module) -> list[str]:
    """Gives every known block of packed layers its fused forward, in place.

    Returns:
        Names of the blocks.
    """
    return [
        name
        for name, module in model.named_modules()
        if (fuse := FUSED_BLOCKS.get(full_name(type(module)))) is not None and fuse(module)
    ]
