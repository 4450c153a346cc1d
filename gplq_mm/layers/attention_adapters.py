"""Adapters that put quantized attention products into models.

An adapter knows one attention class of mmpretrain or mmdet. Classes are found by their full
name, so neither package is imported here, and a model is never traced.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from .attention import QuantAttention

__all__ = [
    'ATTENTION_ADAPTERS',
    'attention_adapter_of',
    'looks_like_attention',
    'register_attention_adapter',
]

# class name in full -> adapter(module, specs, name), which quantizes the module in place
ATTENTION_ADAPTERS: dict[str, Callable] = {}


def full_name(cls: type) -> str:
    """Module and name of a class."""
    return f'{cls.__module__}.{cls.__qualname__}'


def register_attention_adapter(*classes: type | str):
    """Registers ``adapter(module, specs, name)`` for attention classes.

    The adapter changes ``module`` in place so that it computes with a :class:`QuantAttention`,
    which ``specs`` (operand -> spec or None) and ``name`` are handed to.

    Args:
        classes: Attention classes, or their names in full (``'package.module.Class'``) where
            their package is not to be imported. A subclass needs an adapter of its own, since it
            may compute something else.
    """

    def register(adapter: Callable) -> Callable:
        for cls in classes:
            ATTENTION_ADAPTERS[cls if isinstance(cls, str) else full_name(cls)] = adapter
        return adapter

    return register


def attention_adapter_of(module: nn.Module) -> Callable | None:
    """Adapter of exactly this class (a subclass may compute something else), or None."""
    return ATTENTION_ADAPTERS.get(full_name(type(module)))


def looks_like_attention(module: nn.Module) -> bool:
    """Whether a module, by its class name, multiplies activations with each other."""
    name = type(module).__name__
    return name.endswith(('Attention', 'MSA', 'MSAV2')) and not isinstance(module, QuantAttention)


class QuantMultiheadAttention:
    """Mixin over mmpretrain's ``MultiheadAttention``: same parameters, quantized products.

    The class it is mixed into keeps its name: what looks for mmpretrain's attention finds it.
    """

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


_quant_classes: dict[type, type] = {}


@register_attention_adapter('mmpretrain.models.utils.attention.MultiheadAttention')
def adapt_multihead_attention(module: nn.Module, specs: dict, name: str) -> None:
    """mmpretrain's VisionTransformer/DeiT attention: its product is an instance attribute."""
    attention = QuantAttention(specs, module.num_heads, None, name)
    original = module.scaled_dot_product_attention
    if isinstance(original, partial):
        # Set by qk_scale; that implementation divides by its `scale`.
        attention.register_forward_pre_hook(
            partial(_force_scale, 1.0 / original.keywords['scale']), with_kwargs=True
        )
    module.scaled_dot_product_attention = attention
    cls = type(module)
    if cls not in _quant_classes:
        space = {'__module__': cls.__module__, '__qualname__': cls.__qualname__}
        _quant_classes[cls] = type(cls.__name__, (QuantMultiheadAttention, cls), space)
    module.__class__ = _quant_classes[cls]


def _force_scale(scale: float, _module: nn.Module, args: tuple, kwargs: dict) -> tuple:
    return args, {**kwargs, 'scale': scale}


class QuantWindowMSA:
    """Mixin over mmpretrain's or mmdet's ``WindowMSA``: same parameters, quantized products.

    mmdet keeps a copy of mmpretrain's class with the same attributes, so one forward serves both.
    """

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
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias = bias.reshape(tokens, tokens, heads).permute(2, 0, 1)
        dropout = self.attn_drop.p if self.training else 0.0
        out = self.quant_attention.attend(query, key, value, self.scale, bias, mask, dropout)
        out = self.proj(out.transpose(1, 2).reshape(batch, tokens, channels))
        return self.proj_drop(out)


@register_attention_adapter(
    'mmpretrain.models.utils.attention.WindowMSA', 'mmdet.models.backbones.swin.WindowMSA'
)
def adapt_window_msa(module: nn.Module, specs: dict, name: str) -> None:
    """Swin's window attention, shifted or not."""
    cls = type(module)
    if cls not in _quant_classes:
        _quant_classes[cls] = type(f'Quant{cls.__name__}', (QuantWindowMSA, cls), {})
    height, width = module.window_size
    module.quant_attention = QuantAttention(specs, module.num_heads, height * width, name)
    module.__class__ = _quant_classes[cls]
