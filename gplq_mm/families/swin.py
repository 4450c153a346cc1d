"""Swin of mmpretrain and mmdet.

mmdet keeps a copy of mmpretrain's classes with the same attributes, so one forward serves both.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DataError
from ..layers.attention import QuantAttention
from ..layers.family import AttentionKind, Family, with_mixin
from ..layers.fused import fuses_norm_linear, is_plain, norm_linear
from ..layers.int4_attention import Int4Attention, unsupported
from ..registry import FAMILIES
from .blocks import UNSCALED, AttentionParts, MlpParts, fuse_block
from .ffn import MLPS, ffn_parts

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
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = relative_position_bias(self)
        dropout = self.attn_drop.p if self.training else 0.0
        out = self.quant_attention.attend(query, key, value, self.scale, bias, mask, dropout)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


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
    batch: int,
    height: int,
    width: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    device: torch.device,
    pads_first: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Where the tokens of each shifted window come from, and which of them may meet.

    Padding at the right and bottom, the cyclic shift and the partition of Swin (section 3.2)
    only move rows, so they are one index.

    Args:
        batch: Images.
        height, width: Tokens of the feature map.
        window: Height and width of a window, in tokens.
        shift: Cyclic shift towards the top and the left, in tokens.
        device: Where to.
        pads_first: Whether the map is padded before it is shifted.

    Returns:
        int32 ``(windows * batch, tokens of a window)``: row of the flattened
        ``(batch, height, width)`` map, or ``batch * height * width`` for padding; and float32
        ``(windows, tokens of a window, tokens of a window)``, 0 or -100, or None without a shift.
    """
    rows = torch.arange(batch * height * width, dtype=torch.int32, device=device)
    bottom, right = -height % window[0], -width % window[1]
    rows = rows.reshape(batch, 1, height, width)
    if not pads_first:
        rows = _rolled(rows, shift)
    if right or bottom:
        # A fill value that depends on the batch would fix the batch of an exported program.
        rows = F.pad(rows, (0, right, 0, bottom), value=-1)
        rows = rows.masked_fill(rows < 0, batch * height * width)
    if pads_first:
        rows = _rolled(rows, shift)
    rows = _partition(rows, window).contiguous()
    if not any(shift):
        return rows, None
    region = 3 * _region(height + bottom, window[0], shift[0], device)[:, None] + _region(
        width + right, window[1], shift[1], device
    )
    region = _partition(region[None, None], window)
    apart = region[:, None, :] != region[:, :, None]
    return rows, torch.zeros_like(apart, dtype=torch.float32).masked_fill_(apart, MASKED)


def _rolled(rows: Tensor, shift: tuple[int, int]) -> Tensor:
    return rows.roll((-shift[0], -shift[1]), (2, 3)) if any(shift) else rows


def _partition(values: Tensor, window: tuple[int, int]) -> Tensor:
    """``(B, 1, H, W)`` to ``(B * windows, tokens of a window)``."""
    batch, _, height, width = values.shape
    rows, columns = window
    values = values.reshape(batch, height // rows, rows, width // columns, columns)
    return values.transpose(2, 3).reshape(-1, rows * columns)


def _region(extent: int, window: int, shift: int, device: torch.device) -> Tensor:
    """0, 1, 2: inside, last window, and what the shift wrapped around."""
    index = torch.arange(extent, device=device)
    return (index >= extent - window).int() + (index >= extent - shift).int()


class WindowedBlock:
    """What fused Swin blocks share: the maps of the sizes that they have seen."""

    window_maps: dict[tuple, tuple[Tensor, Tensor | None]]

    def window_attention(
        self,
        x: Tensor,
        hw_shape: tuple[int, int],
        parts: AttentionParts,
        window: tuple[int, int],
        shift: tuple[int, int],
        pads_first: bool = True,
    ) -> Tensor:
        """``x`` and its window attention, ``(B, H * W, C)``; the rest as in
        :func:`window_maps`."""
        batch, tokens, channels = x.shape
        key = (batch, *hw_shape, window, shift, x.device, pads_first)
        rows, mask = self._maps(key)
        qkv = parts.qkv(x).flatten(0, 1)
        if rows.numel() > qkv.shape[0]:
            # The model pads after the norm: a padding token is what qkv makes of zeros.
            zeros = qkv.new_zeros(1, channels)
            qkv = torch.cat((qkv, torch.cat([linear(zeros) for linear in parts.linears], -1)))
        out = parts.product(qkv, mask, rows, batch * tokens)
        return parts.close(x, out.view(batch, tokens, -1))

    def _maps(self, key: tuple) -> tuple[Tensor, Tensor | None]:
        if torch.compiler.is_compiling():
            return window_maps(*key)
        kept = self.__dict__.setdefault('window_maps', {})
        if key not in kept:
            while len(kept) >= MAX_MAPS:
                kept.pop(next(iter(kept)))
            kept[key] = window_maps(*key)
        return kept[key]


class Int4SwinBlock(WindowedBlock):
    """Mixin over ``SwinBlock``."""

    fuses_attention: bool
    fuses_mlp: bool

    def parts(self) -> tuple[AttentionParts, MlpParts | None]:
        """What the block is made of."""
        attn, msa = self.attn, self.attn.w_msa
        idle = (msa.proj_drop, attn.drop)
        product = msa.quant_attention
        attention = AttentionParts(attn, self.norm1, (msa.qkv,), product, msa.proj, UNSCALED, idle)
        return attention, ffn_parts(self.norm2, self.ffn)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """``(B, H * W, C)`` and ``(H, W)`` to ``(B, H * W, C)``."""
        x = x.contiguous()
        attention, mlp = self.parts()
        if self.fuses_attention:
            window, shift = self.attn.window_size, self._shift(*hw_shape)
            x = self.window_attention(x, hw_shape, attention, (window, window), (shift, shift))
        else:
            x = x + self.attn(self.norm1(x), hw_shape)
        return mlp.add(x) if self.fuses_mlp else self.ffn(self.norm2(x), identity=x)

    def _shift(self, height: int, width: int) -> int:
        attn = self.attn
        # mmdet's copy always pads a small map; mmpretrain's does it on request, and does not
        # shift a map of one window otherwise.
        if not getattr(attn, 'pad_small_map', True):
            if min(height, width) < attn.window_size:
                raise DataError(
                    f'the feature map of {height} x {width} tokens is smaller than a window of '
                    f'{attn.window_size}. Use larger images, or a model with pad_small_map=True.'
                )
            if min(height, width) == attn.window_size:
                return 0
        return attn.shift_size


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
        **dict.fromkeys(blocks, partial(fuse_block, Int4SwinBlock)),
        'mmcv.cnn.bricks.transformer.PatchMerging': fuse_patch_merging,
        'mmpretrain.models.utils.embed.PatchMerging': fuse_patch_merging,
        'mmdet.models.layers.transformer.utils.PatchMerging': fuse_patch_merging,
    }
