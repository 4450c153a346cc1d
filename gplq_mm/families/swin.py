"""Swin of mmpretrain and mmdet.

mmdet keeps a copy of mmpretrain's classes with the same attributes, so one forward serves both.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DataError
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
from .ffn import MLPS, fuses_ffn, run_ffn

__all__ = [
    'Int4PatchMerging',
    'Int4SwinBlock',
    'Int4WindowMSA',
    'QuantWindowMSA',
    'Swin',
    'window_maps',
]

# Added to the score of two tokens that the shift brought into one window (Swin, section 3.2).
MASKED = -100.0
# Input sizes whose window maps are kept.
MAX_MAPS = 16


def relative_position_bias(window_msa: nn.Module) -> Tensor:
    """``(heads, N, N)`` of a window of N tokens."""
    index = window_msa.relative_position_index
    bias = window_msa.relative_position_bias_table[index.flatten()]
    return bias.reshape(*index.shape, -1).permute(2, 0, 1)


class QuantWindowMSA:
    """Mixin over ``WindowMSA``: same parameters, quantized products."""

    quant_attention: QuantAttention

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Window attention with relative position bias.

        Args:
            x: ``(windows * B, N, C)``.
            mask: ``(windows, N, N)``, 0 or a large negative number, or None.

        Returns:
            ``(windows * B, N, C)``.
        """
        batch, tokens, channels = x.shape
        heads = self.num_heads
        qkv = self.qkv(x).reshape(batch, tokens, 3, heads, channels // heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = relative_position_bias(self)
        dropout = self.attn_drop.p if self.training else 0.0
        out = self.quant_attention.attend(query, key, value, self.scale, bias, mask, dropout)
        out = self.proj(out.transpose(1, 2).reshape(batch, tokens, channels))
        return self.proj_drop(out)


def quantize_window_msa(module: nn.Module, specs: dict, name: str) -> None:
    """Window attention, shifted or not."""
    height, width = module.window_size
    module.quant_attention = QuantAttention(specs, module.num_heads, height * width, name)
    with_mixin(module, QuantWindowMSA)


class Int4WindowMSA:
    """Mixin over ``WindowMSA``."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(windows * B, N, C)``, mask ``(windows, N, N)`` or None, to ``(windows * B, N, C)``."""
        return self.proj_drop(self.proj(self.quant_attention(self.qkv(x), mask)))


def pack_window_msa(module: nn.Module) -> str | None:
    """In one op, or the reason why not."""
    reason = unsupported(module.quant_attention)
    if reason is None:
        module.quant_attention = Int4Attention.from_quantized(
            module.quant_attention, module.num_heads, module.scale, relative_position_bias(module)
        )
        with_mixin(module, Int4WindowMSA)
    return reason


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
    """Mixin over ``SwinBlock``."""

    fuses_attention: bool
    fuses_mlp: bool

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """``(B, H * W, C)`` and ``(H, W)`` to ``(B, H * W, C)``."""
        x = x.contiguous()
        if self.fuses_attention:
            x = self._window_attention(x, hw_shape)
        else:
            x = x + self.attn(self.norm1(x), hw_shape)
        return run_ffn(x, self.norm2, self.ffn, self.fuses_mlp)

    def _window_attention(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        batch, tokens, channels = x.shape
        rows, mask = self._maps(batch, *hw_shape, x.device)
        msa = self.attn.w_msa
        qkv = norm_linear(x, self.norm1, msa.qkv).flatten(0, 1)
        if rows.numel() > qkv.shape[0]:
            # The model pads after the norm: a padding token is what qkv makes of zeros.
            qkv = torch.cat((qkv, msa.qkv(qkv.new_zeros(1, channels))))
        out = msa.quant_attention(qkv, mask, rows, batch * tokens)
        return linear_add(out.view(x.shape), msa.proj, x, None)

    def _maps(
        self, batch: int, height: int, width: int, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        attn = self.attn
        window, shift = attn.window_size, attn.shift_size
        # mmdet's copy always pads a small map; mmpretrain's does it on request, and does not
        # shift a map of one window otherwise.
        if not getattr(attn, 'pad_small_map', True):
            if min(height, width) < window:
                raise DataError(
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
        and isinstance(msa.proj, Int4Linear)
        and fuses_norm_linear(block.norm1, msa.qkv)
        and is_identity_in_eval(msa.proj_drop, block.attn.drop)
        and is_plain(block.norm1, block.attn)
    )
    block.fuses_mlp = fuses_ffn(block.norm2, block.ffn)
    block.window_maps = {}
    return (block.fuses_attention or block.fuses_mlp) and with_mixin(block, Int4SwinBlock)


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
        return norm_linear(x, self.norm, self.reduction), size


def fuse_patch_merging(block: nn.Module) -> bool:
    """Makes a ``PatchMerging`` compute fused; returns whether anything was fused."""
    sampler, reduction = block.sampler, block.reduction
    return (
        not getattr(block, 'use_post_norm', False)
        and fuses_norm_linear(block.norm, reduction)
        and sampler.kernel_size == sampler.stride
        and (sampler.padding, sampler.dilation) == ((0, 0), (1, 1))
        and is_plain(sampler, block.norm, reduction)
        and with_mixin(block, Int4PatchMerging)
    )


WINDOW_MSA = AttentionKind(quantize_window_msa, pack_window_msa)


@FAMILIES.register_module()
class Swin(Family):
    """Swin of mmpretrain and mmdet."""

    attentions = {
        'mmpretrain.models.utils.attention.WindowMSA': WINDOW_MSA,
        'mmdet.models.backbones.swin.WindowMSA': WINDOW_MSA,
    }
    blocks = {
        'mmpretrain.models.backbones.swin_transformer.SwinBlock': -1,
        'mmdet.models.backbones.swin.SwinBlock': -1,
    }
    mlps = MLPS
    fused = {
        **dict.fromkeys(blocks, fuse_swin_block),
        'mmcv.cnn.bricks.transformer.PatchMerging': fuse_patch_merging,
        'mmpretrain.models.utils.embed.PatchMerging': fuse_patch_merging,
        'mmdet.models.layers.transformer.utils.PatchMerging': fuse_patch_merging,
    }
    scopes = ('mmpretrain', 'mmdet')
