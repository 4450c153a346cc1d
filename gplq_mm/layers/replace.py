"""From a float model and a policy to a quantized model, in place."""

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..quant import PolicyError, QuantPolicy
from .attention import OPERANDS
from .compensation import attach_compensation, build_compensation
from .conv import QuantConv2d
from .conv_transpose import QuantConvTranspose2d
from .family import entry_of
from .linear import QuantLinear
from .mlp import make_mlps_explicit
from .reproducible import make_reproducible
from .weight_layer import QuantWeightLayer

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
# How attentions are called, and what is called so and multiplies with weights or elementwise alone.
ATTENTION_NAMES = r'(Attention(Pool\w*|With\w+)?|Attn|Mixer|MSA|MSAV2)$'
GATE_NAMES = r'((Channel|Spatial|Split|Kernel|Coord|Strip)Attn|(Mlp|Conv|Rep)Mixer)$'


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
    plain = (nn.Linear.forward, nn.Conv2d.forward, nn.ConvTranspose2d.forward)
    # mmcv's wrappers differ for empty inputs only.
    return cls.forward not in plain and cls.__module__ != 'mmcv.cnn.bricks.wrappers'


def _is_unknown_attention(module: nn.Module) -> bool:
    """Whether a module, by its class name, multiplies activations, and no family knows how."""
    # timm marks what multiplies: pooling by attention, blocks with attention of their own.
    cls = type(module).__name__
    named = re.search(ATTENTION_NAMES, cls) and not re.search(GATE_NAMES, cls)
    if not (named or hasattr(module, 'fused_attn')):
        return False
    # A wrapper like ShiftWindowMSA is fine: the products are in a child that is known.
    inside = list(module.modules())
    return any(map(kind_of, inside)) and not any(entry_of(child, 'attentions') for child in inside)


def _is_unsupported(module: nn.Module) -> bool:
    """Whether a module computes with weights or products in a way that has no quantized form."""
    if isinstance(module, UNSUPPORTED) or _is_unknown_attention(module):
        return True
    if kind_of(module) == 'conv' and not twin_of(module).supports(module):
        return True
    return bool(kind_of(module)) and _computes_something_else(module)


def by_pattern(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of modules by regular expressions in which their numbers are left open."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = (r'\d+' if part.isdigit() else re.escape(part) for part in name.split('.'))
        groups.setdefault(r'\.'.join(parts), []).append(name)
    return {
        f'^{pattern if found[1:] else re.escape(found[0])}$': found
        for pattern, found in groups.items()
    }


def _refuse(unsupported: dict[str, nn.Module]) -> None:
    """Raises one PolicyError for all modules that a policy would have to exclude."""
    rules = [
        f"    dict(pattern=r'{pattern}', exclude=True),"
        f'  # {len(names)} x {type(unsupported[names[0]]).__name__}, such as {names[0]}'
        for pattern, names in by_pattern(unsupported).items()
    ]
    raise PolicyError(
        f'{len(unsupported)} layer(s) cannot be quantized. Exclude them with these rules of the '
        'policy, or write a family for the attentions among them (docs/extending.md):\n'
        + '\n'.join(rules)
    )


def _plan(model: nn.Module, policy: QuantPolicy, may_stay_float: bool) -> list[tuple]:
    """All sites of a model as ``(name, kind, module, spec)``, ``spec`` None where it is excluded;
    kind and spec of an attention are ``'attention'`` and a spec by operand. Changes nothing.

    Raises:
        PolicyError: See :func:`quantize_model`.
    """
    if quant_layers(model):
        raise PolicyError('the model is quantized already; quantize a float model.')
    plan, names, unsupported, ends, hidden = [], [], {}, set(), set()
    for name, module in model.named_modules():
        prefix = f'{name}.' if name else ''
        ends |= {prefix + end for end in entry_of(module, 'ends') or ()}
        if mlp := entry_of(module, 'mlps'):
            hidden.add(prefix + mlp.hidden)
        # An attention that is unknown is no site, yet a rule may exclude it. The name of a known
        # one stands for nothing: its products and layers are the sites.
        if _is_unsupported(module):
            names.append(name)
            if policy.resolve(name, 'linear').weight is not None:
                unsupported[name] = module
        elif kind := kind_of(module):
            names.append(name)
            part = 'hidden' if kind == 'linear' and name in hidden else kind
            spec = policy.resolve(name, part, name in ends)
            plan.append((name, kind, module, spec if spec.weight else None))
        elif entry_of(module, 'attentions'):
            names += [f'{name}.{operand}' for operand in OPERANDS]
            specs = {key: policy.resolve(f'{name}.{key}', key).activation for key in OPERANDS}
            plan.append((name, 'attention', module, specs if any(specs.values()) else None))
    if not names:
        raise PolicyError('the model has no Linear, Conv2d or known attention layer to quantize.')
    policy.check_matched(names)
    if unsupported:
        _refuse(unsupported)
    if not (may_stay_float or any(spec for *_, spec in plan)):
        raise PolicyError(
            f'the policy excludes all {len(names)} layers of the model, so that there is nothing '
            'to quantize; take back a rule with exclude=True.'
        )
    return plan


@contextmanager
def unchanged_on_error(model: nn.Module, values: bool = False) -> Iterator[None]:
    """Context that leaves every module as it was, class and children, if it ends in an error.

    Args:
        model: What is changed inside.
        values: Whether parameters and buffers are changed, too. Costs a copy of them.
    """
    before = [
        (module, type(module), {key: copy.copy(value) if isinstance(value, dict) else value
                                for key, value in module.__dict__.items()})
        for module in model.modules()
    ]  # fmt: skip
    tensors = [*model.parameters(), *model.buffers()] if values else []
    kept = [(t, t.detach().clone(), t.requires_grad, t.grad) for t in tensors]
    try:
        yield
    except BaseException:
        for module, cls, state in before:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(state)
        with torch.no_grad():
            for tensor, value, learns, grad in kept:
                tensor.requires_grad_(learns).copy_(value)
                tensor.grad = grad
        raise


def quantize_model(
    model: nn.Module,
    policy: QuantPolicy,
    compensation: dict | None = None,
    may_stay_float: bool = False,
) -> QuantReport:
    """Swaps the layers of ``model`` for quantized twins that share their parameters.

    Names are those of ``model.named_modules()``, and parameter keys stay as they are. LayerNorm
    and GELU become reproducible to the last bit (:mod:`.reproducible`), and the MLPs of known
    families explicit (:mod:`.mlp`). After an error the model is what it was.

    Args:
        model: Float model; changed in place.
        policy: Which site gets which spec.
        compensation: Config of the compensation that blocks can take, or None.
        may_stay_float: Whether the policy may exclude everything.

    Returns:
        What was replaced.

    Raises:
        PolicyError: For a rule that matches nothing, layers that cannot be quantized (all of them
            in one message), a policy that excludes everything, or a model without any layer to
            quantize.
    """
    plan = _plan(model, policy, may_stay_float)
    done: dict[str, list[str]] = {'linear': [], 'conv': [], 'attention': [], 'excluded': []}
    with unchanged_on_error(model):
        for name, kind, module, spec in plan:
            done[kind if spec else 'excluded'].append(name)
            if not spec:
                continue
            if kind == 'attention':
                entry_of(module, 'attentions').quantize(module, spec, name)
            else:
                set_module(model, name, twin_of(module).from_float(module, spec, name))
        make_reproducible(model)
        make_mlps_explicit(model)
        blocks = find_blocks(model)
        for name in blocks if compensation is not None else ():
            block = model.get_submodule(name)
            axis = entry_of(block, 'blocks')
            attach_compensation(block, build_compensation(compensation, axis))
    return QuantReport(**done, blocks=blocks)


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the residual blocks that hold quantized layers, in definition order."""
    return [
        name
        for name, module in model.named_modules()
        if entry_of(module, 'blocks') is not None and quant_layers(module)
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
