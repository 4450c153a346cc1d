"""Attention products in one op."""

import torch
from torch import Tensor, nn

from ..errors import SettingError
from ..ops import library as _library  # noqa: F401  (defines the ops)
from ..quant import QuantState
from .attention import OPERANDS, QuantAttention
from .int4_weight import DeployError, move_only, table_operand

# Added to a score that does not count: far below all others, and still finite.
FORBIDDEN = -1e30

_attention = torch.ops.gplq_mm.int4_attention.default


def unsupported(attention: QuantAttention) -> str | None:
    """Why the op cannot compute this attention, or None if it can."""
    reason = attention.float_reason()
    if reason is not None:
        return reason
    if attention._forward_hooks or attention._forward_pre_hooks:
        return 'it has forward hooks'
    return None


class Int4Attention(nn.Module):
    """Softmax attention on quantized operands.

    Buffers: ``grids`` float32 ``(4, 2, heads)``, scale and offset of q, k, v and probabilities;
    ``q_table`` to ``probs_table`` uint8 ``(heads, 64)``, the levels of their codes, or ``(0,)``
    where codes are the integers themselves; ``bias`` float32 ``(heads, N, N)`` added to the
    scores, or None.

    Args:
        num_heads: Heads.
        scale: Factor on ``q @ k.T``.
    """

    def __init__(self, num_heads: int, scale: float):
        super().__init__()
        self.num_heads, self.scale = num_heads, float(scale)
        self.limits: list[int] = []
        self.bits: list[int] = []
        self.row_relative = False
        self.register_buffer('grids', None)
        for operand in OPERANDS:
            self.register_buffer(f'{operand}_table', None)
        self.register_buffer('bias', None)

    @classmethod
    def from_quantized(
        cls, attention: QuantAttention, num_heads: int, scale: float, bias: Tensor | None = None
    ) -> 'Int4Attention':
        """Packed twin.

        Args:
            attention: The simulation, frozen.
            num_heads: Heads.
            scale: Factor on ``q @ k.T``.
            bias: ``(heads, N, N)`` or None.

        Raises:
            DeployError: If the op cannot compute this attention, or a quantizer is not frozen.
        """
        reason = unsupported(attention)
        if reason is not None:
            raise DeployError(f'attention cannot be packed: {reason}.')
        packed = cls(num_heads, scale)
        for operand in OPERANDS:
            quantizer = getattr(attention, operand)
            if quantizer.state != QuantState.FROZEN:
                raise DeployError(
                    f'{quantizer.site} is {quantizer.state.name}, not frozen; finish Stage 1 and '
                    'Stage 2 first.'
                )
            if not quantizer.enabled:
                raise DeployError(
                    f'{quantizer.site}: switched off; deploy the model with all quantizers on.'
                )
        packed.grids, packed.limits = attention.grids()
        packed.bits = [getattr(attention, operand).spec.bits for operand in OPERANDS]
        for operand, table in zip(OPERANDS, attention.tables(), strict=True):
            setattr(packed, f'{operand}_table', table_operand(table, packed.grids.device))
        packed.row_relative = attention.probs.row_relative
        packed.bias = None if bias is None else bias.detach().float().contiguous()
        return packed.eval()

    def forward(
        self,
        qkv: Tensor,
        mask: Tensor | None = None,
        rows: Tensor | None = None,
        out_rows: int = 0,
    ) -> Tensor:
        """Attention of all heads.

        Args:
            qkv: ``(B, N, 3C)``; with ``rows`` ``(R, 3C)``.
            mask: ``(windows, N, N)`` added to the scores of window ``i % windows``, or None.
            rows: int32 ``(W, N)``, the rows of ``qkv`` that make up each window. A row of
                ``out_rows`` or more is padding.
            out_rows: Rows of the result when ``rows`` is given.

        Returns:
            ``(B, N, C)``; with ``rows`` ``(out_rows, C)``.
        """
        return _attention(
            qkv,
            self.num_heads,
            self.scale,
            self.grids,
            self.limits,
            [self._buffers[f'{operand}_table'] for operand in OPERANDS],
            self.row_relative,
            self.bias,
            mask,
            rows,
            out_rows,
        )

    def _apply(self, fn, recurse: bool = True):
        move_only(self, fn)
        return self

    def extra_repr(self) -> str:
        return f'{self.num_heads} heads, code limits {self.limits}'


def additive_mask(
    mask: Tensor | None, is_causal: bool, tokens: int, device: torch.device
) -> Tensor | None:
    """What :class:`Int4Attention` adds, of a mask as in torch's attention.

    Args:
        mask: Boolean, True where a query may look, or added to the scores: broadcasts to
            ``(B, 1, N, N)``, the same for all heads. Or None.
        is_causal: Whether query i may look at keys 0 to i alone.
        tokens: N.
        device: Where to.

    Returns:
        float32 ``(1 or B, N, N)``, or None. A query that may look nowhere looks everywhere.

    Raises:
        SettingError: For both masks, or one that differs between heads.
    """
    if is_causal:
        if mask is not None:
            raise SettingError('is_causal=True is a mask already; give it or attn_mask.')
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, FORBIDDEN)
    if mask.dim() == 4:
        if mask.shape[1] != 1:
            raise SettingError('a packed attention takes one mask for all heads.')
        mask = mask[:, 0]
    mask = mask.float().clamp(min=FORBIDDEN)
    return mask.expand(mask.shape[0] if mask.dim() == 3 else 1, tokens, tokens).contiguous()
