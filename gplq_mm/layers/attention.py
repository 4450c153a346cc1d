"""Attention products with quantized operands."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SettingError
from ..quant import ActQuantizer, ActSpec, PolicyError, QuantState, arithmetic
from .saved_codes import coded_attention

OPERANDS = ('q', 'k', 'v', 'probs')


class QuantAttention(nn.Module):
    """Softmax attention whose four operands pass through quantizers.

    Args:
        specs: Spec of each of ``q``, ``k``, ``v``, ``probs``; None leaves an operand alone.
        num_heads: Heads, the size of a per-head scale.
        tokens: Tokens, where the layer knows them; else ``spec.tokens`` counts.
        name: Full name of the attention layer.
    """

    # Whether training keeps codes for backward (:mod:`.saved_codes`), see QuantWeightLayer.
    saves_codes: bool = True

    def __init__(
        self, specs: dict[str, ActSpec | None], num_heads: int, tokens: int | None, name: str
    ):
        super().__init__()
        self.num_heads = num_heads
        for operand in OPERANDS:
            spec = specs[operand]
            if spec is None:
                self.add_module(operand, nn.Identity())
                continue
            site = f'{name}.{operand}'
            shapes = {'tensor': (1,), 'head': (num_heads, 1, 1)}
            if spec.granularity == 'token':
                count = tokens or spec.tokens
                if count is None:
                    raise PolicyError(
                        f'{site}: granularity "token" needs the number of tokens; set '
                        f'{operand}=dict(granularity="token", tokens=N) in the policy.'
                    )
                shapes['token'] = (count, 1)
            self.add_module(operand, ActQuantizer(spec, shapes[spec.granularity], site))

    def float_reason(self) -> str | None:
        """Why the products are not those of integer codes with a grid per head, or None."""
        for operand in OPERANDS:
            quantizer = getattr(self, operand)
            if not isinstance(quantizer, ActQuantizer):
                return f'{operand} is not quantized'
            if not quantizer.format.is_integer_product:
                return f'{operand} is {quantizer.spec.format}'
            if quantizer.spec.granularity not in ('tensor', 'head'):
                return f'{operand} has a scale per {quantizer.spec.granularity}'
        return None

    def grids(self) -> tuple[Tensor, list[int]]:
        """Grids of the four operands, where :meth:`float_reason` is None.

        Returns:
            float32 ``(4, 2, heads)``, scale and offset of q, k, v and probabilities; and their
            smallest and largest codes.
        """
        grids, limits = [], []
        for operand in OPERANDS:
            quantizer = getattr(self, operand)
            scales, offsets = quantizer.grid()
            offsets = torch.zeros_like(scales) if offsets is None else offsets
            parts = [part.detach().flatten().expand(self.num_heads) for part in (scales, offsets)]
            grids.append(torch.stack(parts))
            limits += [quantizer.qmin, quantizer.qmax]
        return torch.stack(grids).float(), limits

    def tables(self) -> list[Tensor | None]:
        """Levels of the four operands, uint8 ``(heads, 64)`` each, or None
        (:meth:`.ActQuantizer.table`)."""
        tables = (getattr(self, operand).table() for operand in OPERANDS)
        return [None if table is None else table.expand(self.num_heads, -1) for table in tables]

    def computes_on_codes(self, query: Tensor) -> bool:
        """Whether to compute exactly what the deployed model computes: all grids are final and no
        gradient is asked for. For self-attention only."""
        if torch.is_grad_enabled() and query.requires_grad:
            return False
        return self.float_reason() is None and all(
            getattr(self, operand).enabled and getattr(self, operand).state == QuantState.FROZEN
            for operand in OPERANDS
        )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """Attention of quantized operands.

        Once all four grids are frozen, and without gradients, self-attention is computed on the
        codes (:func:`gplq_mm.quant.arithmetic.attention`), as in the deployed model.

        Args:
            query: ``(B, heads, N, d)``.
            key: ``(B, heads, M, d)``; M and N differ where queries look at other tokens.
            value: ``(B, heads, M, e)``.
            scale: Factor on the scores.
            bias: ``(heads, N, M)`` added to the scores, or None.
            mask: ``(W, N, M)`` added to the scores of item ``i % W`` of the batch, or None.
            dropout_p: Dropout of probabilities.

        Returns:
            ``(B, heads, N, e)``.
        """
        if not query.shape == key.shape == value.shape:
            return self._attend_plainly(query, key, value, scale, bias, mask, dropout_p)
        if dropout_p == 0 and self.computes_on_codes(query):
            with torch.autocast(query.device.type, enabled=False):
                out = arithmetic.attention(
                    *(x.float() for x in (query, key, value)),
                    scale,
                    *self.grids(),
                    self.probs.row_relative,
                    None if bias is None else bias.float(),
                    None if mask is None else mask.float(),
                    self.tables(),
                )
            return out.to(value.dtype)
        if dropout_p == 0 and self._keeps_codes(query, key, value):
            quantizers = [getattr(self, operand) for operand in OPERANDS]
            if any(quantizer.is_watched for quantizer in quantizers):
                with torch.no_grad():
                    self._attend_plainly(query, key, value, scale, bias, mask, dropout_p)
            for quantizer, x in zip(quantizers, (query, key, value), strict=False):
                quantizer.check_shape(x)
            return coded_attention(query, key, value, scale, quantizers, bias, mask)
        return self._attend_plainly(query, key, value, scale, bias, mask, dropout_p)

    def _keeps_codes(self, *operands: Tensor) -> bool:
        """Whether all four operands are quantized such that backward needs their codes alone."""
        return (
            self.saves_codes
            and torch.is_grad_enabled()
            and all(isinstance(getattr(self, operand), ActQuantizer) for operand in OPERANDS)
            and all(
                getattr(self, name).keeps_codes(x)
                for name, x in zip(OPERANDS, (*operands, operands[0]), strict=True)
            )
        )

    def _attend_plainly(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        bias: Tensor | None,
        mask: Tensor | None,
        dropout_p: float,
    ) -> Tensor:
        scores = self.scores(query, key, scale)
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            shape = scores.shape
            scores = scores.reshape(-1, len(mask), *shape[1:]) + mask[:, None]
            scores = scores.reshape(shape)
        return self.mix(scores, value, dropout_p)

    def scores(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """``scale * q_hat @ k_hat.T``: ``(..., heads, Nq, d), (..., heads, Nk, d)`` to
        ``(..., heads, Nq, Nk)``."""
        return (self.q(query) @ self.k(key).transpose(-2, -1)) * scale

    def mix(self, scores: Tensor, value: Tensor, dropout_p: float = 0.0) -> Tensor:
        """``softmax(scores)_hat @ v_hat``.

        With ``row_relative`` probabilities what is quantized is the softmax's numerator
        ``exp(score - row maximum)``, in (0, 1]; the row's denominator divides the product. The
        grid of a row then ends at its own maximum, flat rows keep their resolution, and the
        scale is still static: the product stays one of integers.

        Args:
            scores: ``(..., heads, Nq, Nk)``, bias and mask added.
            value: ``(..., heads, Nk, d)``.
            dropout_p: Dropout of probabilities.

        Returns:
            ``(..., heads, Nq, d)``.
        """
        if not getattr(self.probs, 'row_relative', False):
            probs = F.dropout(scores.softmax(dim=-1), dropout_p, training=dropout_p > 0)
            return self.probs(probs) @ self.v(value)
        # float32 as F.softmax has it under autocast.
        shifted = (scores - scores.detach().amax(-1, keepdim=True)).float()
        numerator = shifted.exp()
        denominator = numerator.sum(-1, keepdim=True)
        numerator = F.dropout(self.probs(numerator), dropout_p, training=dropout_p > 0)
        product = numerator.to(value.dtype) @ self.v(value)
        return (product / denominator).to(value.dtype)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Takes the place of ``torch.nn.functional.scaled_dot_product_attention``.

        Args:
            query: ``(..., heads, N, d)``.
            key: ``(..., heads, M, d)``; with ``enable_gqa`` of fewer heads.
            value: ``(..., heads, M, e)``; likewise.
            attn_mask: Broadcast to ``(..., heads, N, M)``: a boolean one is True where a query may
                look, any other is added to the scores. A query that may look nowhere gives zeros.
            dropout_p: Dropout of probabilities.
            is_causal: Whether query i may look at keys 0 to i alone.
            scale: Factor on the scores. Defaults to ``1 / sqrt(d)``.
            enable_gqa: Whether several heads of the queries share one of keys and values.

        Returns:
            ``(..., heads, N, e)``.

        Raises:
            SettingError: For a mask together with ``is_causal``.
        """
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if enable_gqa:
            heads = query.shape[-3]
            key, value = (x.repeat_interleave(heads // x.shape[-3], -3) for x in (key, value))
        if is_causal:
            if attn_mask is not None:
                raise SettingError('is_causal=True is a mask already; give it or attn_mask.')
            shape = (query.shape[-2], key.shape[-2])
            attn_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
        if attn_mask is None:
            return self.attend(query, key, value, scale, dropout_p=dropout_p)
        scores = self.scores(query, key, scale)
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        else:
            scores = scores + attn_mask
        nowhere = (scores == -torch.inf).all(-1, keepdim=True)
        out = self.mix(scores.masked_fill(nowhere, 0), value, dropout_p)
        return out.masked_fill(nowhere, 0)
