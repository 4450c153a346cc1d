"""From a float model and a policy to a quantized model, in place."""

import re
from dataclasses import dataclass

from torch import nn

from ..quant import PolicyError, QuantPolicy
from .attention import OPERANDS, QuantAttention
from .attention_adapters import attention_adapter_of, looks_like_attention
from .compensation import attach_compensation, build_compensation
from .conv import QuantConv2d
from .conv_transpose import QuantConvTranspose2d
from .linear import QuantLinear
from .mlp import find_mlps
from .reproducible import ReproducibleGELU, make_reproducible
from .weight_layer import QuantWeightLayer

__all__ = ['QuantReport', 'find_blocks', 'quant_layers', 'quant_units', 'quantize_model']

# Layers with a weight that have no quantized twin. Leaving one in float silently would break the
# promise of the policy.
UNSUPPORTED = (
    nn.Conv1d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose3d,
    nn.Bilinear,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
)
# Residual blocks with one tensor in and one tensor out, by class name.
BLOCK_CLASSES = ('TransformerEncoderLayer', 'SwinBlock', 'BasicBlock', 'Bottleneck')


@dataclass(frozen=True)
class QuantReport:
    """What was replaced: full names by kind."""

    linear: list[str]
    conv: list[str]
    attention: list[str]
    excluded: list[str]
    blocks: list[str]

    def __str__(self) -> str:
        return (
            f'{len(self.linear)} Linear, {len(self.conv)} Conv2d and {len(self.attention)} '
            f'attention layers quantized, {len(self.excluded)} sites excluded, '
            f'{len(self.blocks)} blocks'
        )


def set_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Puts ``module`` where ``name`` is, and wherever else ``root`` uses the same module."""
    old = root.get_submodule(name)
    names = [key for key, value in root.named_modules(remove_duplicate=False) if value is old]
    for alias in names:
        parent, _, child = alias.rpartition('.')
        # Containers keep their children under their names in `_modules` as every module does.
        root.get_submodule(parent)._modules[child] = module


def kind_of(module: nn.Module) -> str | None:
    """Kind of site of a policy: ``'linear'``, ``'conv'`` or None."""
    if isinstance(module, nn.Linear):
        return 'linear'
    return 'conv' if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) else None


def twin_of(module: nn.Module) -> type[QuantWeightLayer]:
    """Quantized class for a module of a known kind."""
    if isinstance(module, nn.Linear):
        return QuantLinear
    return QuantConv2d if isinstance(module, nn.Conv2d) else QuantConvTranspose2d


def _computes_something_else(module: nn.Module) -> bool:
    """Whether a subclass of Linear or Conv2d has a forward of its own (NormProduct, ConvAWS)."""
    cls = type(module)
    plain = (
        nn.Linear.forward,
        nn.Conv2d.forward,
        nn.ConvTranspose2d.forward,
        QuantWeightLayer.forward,
    )
    # mmcv's wrappers differ for empty inputs only.
    return cls.forward not in plain and cls.__module__ != 'mmcv.cnn.bricks.wrappers'


def _is_unknown_attention(module: nn.Module) -> bool:
    """Whether nothing is known of the products of an attention."""
    if not looks_like_attention(module) or attention_adapter_of(module):
        return False
    # A wrapper like ShiftWindowMSA is fine: the products are in its adapted child.
    return not any(
        attention_adapter_of(child) or isinstance(child, QuantAttention)
        for child in module.modules()
    ) and any(kind_of(child) for child in module.modules())


def _check_supported(name: str, module: nn.Module, policy: QuantPolicy) -> None:
    unsupported = isinstance(module, UNSUPPORTED)
    if isinstance(module, nn.ConvTranspose2d):
        unsupported |= not QuantConvTranspose2d.supports(module)
    unsupported |= bool(kind_of(module)) and _computes_something_else(module)
    unsupported |= _is_unknown_attention(module)
    if unsupported and policy.resolve(name, 'linear').weight is not None:
        raise PolicyError(
            f'{name}: a layer of type {type(module).__name__} cannot be quantized. Exclude it '
            f'with dict(pattern={re.escape(name)!r}, exclude=True), or, for an attention, '
            'register an adapter with gplq_mm.layers.register_attention_adapter.'
        )


def quantize_model(
    model: nn.Module, policy: QuantPolicy, compensation: dict | None = None
) -> QuantReport:
    """Swaps the layers of ``model`` for quantized twins that share their parameters.

    Names are those of ``model.named_modules()``, and parameter keys stay as they are. LayerNorm
    and GELU become reproducible to the last bit (:mod:`.reproducible`).

    Args:
        model: Float model; changed in place.
        policy: Which site gets which spec.
        compensation: Config of the compensation that blocks can take, or None.

    Returns:
        What was replaced.

    Raises:
        PolicyError: For a rule that matches nothing, a layer that cannot be quantized, or a
            model without any layer to quantize.
    """
    modules = list(model.named_modules())
    sites: list[str] = []
    for name, module in modules:
        if kind_of(module):
            sites.append(name)
        elif attention_adapter_of(module):
            sites.extend(f'{name}.{operand}' for operand in OPERANDS)
        elif isinstance(module, UNSUPPORTED):
            sites.append(name)
    if not sites:
        raise PolicyError('the model has no Linear, Conv2d or known attention layer to quantize.')
    # An attention without adapter is no site, yet a rule may exclude it. The name of one with an
    # adapter stands for nothing: its products and layers are the sites.
    attentions = [name for name, module in modules if _is_unknown_attention(module)]
    policy.check_matched(sites + attentions)
    for name, module in modules:
        _check_supported(name, module, policy)

    done: dict[str, list[str]] = {'linear': [], 'conv': [], 'attention': [], 'excluded': []}
    for name, module in modules:
        kind = kind_of(module)
        if kind:
            spec = policy.resolve(name, kind)
            if spec.weight is None:
                done['excluded'].append(name)
                continue
            twin = twin_of(module).from_float(module, spec, name)
            set_module(model, name, twin)
            done[kind].append(name)
        adapter = attention_adapter_of(module)
        if adapter:
            specs = {key: policy.resolve(f'{name}.{key}', key).activation for key in OPERANDS}
            if all(spec is None for spec in specs.values()):
                done['excluded'].append(name)
                continue
            adapter(module, specs, name)
            done['attention'].append(name)
    make_reproducible(model)
    find_mlps(model, ReproducibleGELU)
    blocks = find_blocks(model)
    if compensation is not None:
        for name in blocks:
            block = model.get_submodule(name)
            axis = 1 if type(block).__name__ in ('BasicBlock', 'Bottleneck') else -1
            attach_compensation(block, build_compensation(compensation, axis))
    return QuantReport(**done, blocks=blocks)


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the residual blocks that hold quantized layers, in definition order."""
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in BLOCK_CLASSES and quant_layers(module)
    ]


def quant_units(model: nn.Module) -> list[str]:
    """Names of the units that Stage 2 and replays go by: blocks, and quantized layers outside."""
    blocks = find_blocks(model)
    inside = tuple(f'{block}.' for block in blocks)
    return [*blocks, *(name for name in quant_layers(model) if not name.startswith(inside))]


def quant_layers(module: nn.Module) -> dict[str, QuantWeightLayer]:
    """Quantized Linear and Conv2d layers below ``module``, by name, in definition order."""
    return {
        name: layer for name, layer in module.named_modules() if isinstance(layer, QuantWeightLayer)
    }
