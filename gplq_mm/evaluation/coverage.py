"""What share of a model's multiply-adds runs at which width, and what is in float, by module.

Every matrix product and convolution of a forward is seen where torch dispatches it, so that one
between known layers counts as much as theirs; what cannot be attributed to quantized operands is
in float.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from ..layers import (
    Compensation,
    Int4Attention,
    Int4WeightLayer,
    QuantAttention,
    QuantWeightLayer,
)
from ..layers.family import entry_of
from ..layers.replace import by_pattern, kind_of
from ..ops.reference import LAYER_FIELDS
from ..quant import QuantPolicy

FLOAT = 'float'
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass
class Coverage:
    """Multiply-adds of a forward.

    Attributes:
        modules: Module -> its width (``'w4a4'``; of an attention ``'a4'``; ``'float'``) ->
            multiply-adds.
    """

    modules: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def widths(self) -> dict[str, int]:
        """Width -> multiply-adds, the largest first."""
        total: dict[str, int] = {}
        for counts in self.modules.values():
            for width, count in counts.items():
                total[width] = total.get(width, 0) + count
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    @property
    def shares(self) -> dict[str, float]:
        """Width -> share of all multiply-adds."""
        total = sum(self.widths.values())
        return {width: count / total for width, count in self.widths.items()}

    @property
    def in_float(self) -> dict[str, int]:
        """Modules with products in float -> multiply-adds, the largest first."""
        found = {name: counts.get(FLOAT, 0) for name, counts in self.modules.items()}
        return dict(sorted(((k, v) for k, v in found.items() if v), key=lambda item: -item[1]))

    def unknown(self, model: nn.Module, policy: QuantPolicy) -> dict[str, float]:
        """Modules whose own code multiplies in float though no rule says so: no layer and no family
        knows of these products. Module -> share of all multiply-adds, the largest first.

        Args:
            model: What was counted, calibrated.
            policy: What it was quantized by.
        """
        total = sum(self.widths.values())
        found = {name: (model.get_submodule(name), n) for name, n in self.in_float.items()}
        return {
            name: count / total
            for name, (module, count) in found.items()
            if not (kind_of(module) or isinstance(module, QuantAttention | Compensation))
            and not entry_of(module, 'attentions')
            and policy.resolve(name, 'linear').weight is not None
        }

    def to_dict(self) -> dict:
        """Plain data."""
        return {'shares': self.shares, 'in_float': self.in_float, 'modules': self.modules}

    def __rich__(self) -> Table:
        table = Table(title='multiply-adds')
        for column in ('width', 'multiply-adds', 'share'):
            table.add_column(column, justify='left' if column == 'width' else 'right')
        total = sum(self.widths.values())
        for width, count in self.widths.items():
            table.add_row(width, f'{count:,}', f'{count / total:.2%}')
        table.add_section()
        for name, count in self.in_float.items():
            title = f'float: {name or "the model itself"}'
            table.add_row(title, f'{count:,}', f'{count / total:.2%}')
        return table

    def __str__(self) -> str:
        console = Console(width=100)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def warning_of(unknown: dict[str, float], model: nn.Module) -> str:
    """What a user is told of :meth:`Coverage.unknown`."""
    groups = [
        f'{len(names)} x {type(model.get_submodule(names[0])).__name__}, '
        f'such as {names[0] or "the model itself"} ({sum(map(unknown.get, names)):.1%})'
        for names in by_pattern(unknown).values()
    ]
    return (
        f'{sum(unknown.values()):.1%} of the multiply-adds are products in float that no family '
        f'knows: {"; ".join(groups)}. An attention is quantized once a family describes it '
        '(docs/extending.md); a rule with exclude=True, optional=True leaves it in float silently.'
    )


def _width(module: nn.Module) -> str:
    """Width that a quantized module multiplies at now."""
    if isinstance(module, Int4WeightLayer):
        weight, act = module.bits
        return f'w{weight}a{act}'
    if isinstance(module, Int4Attention):
        return _operand_width(module.bits)
    if isinstance(module, QuantAttention):
        quantizers = [getattr(module, operand) for operand in ('q', 'k', 'v', 'probs')]
        bits = [q.spec.bits if getattr(q, 'enabled', False) else 32 for q in quantizers]
        return FLOAT if 32 in bits else _operand_width(bits)
    weight, act = module.weight_quantizer, module.act_quantizer
    bits = weight.spec.bits if weight.is_quantized and weight.enabled else 32
    return f'w{bits}a{act.spec.bits}' if act.enabled else FLOAT


def _operand_width(bits: list[int]) -> str:
    return f'a{max(bits)}' if len(set(bits)) == 1 else 'a' + '/'.join(map(str, bits))


class _Counter(TorchDispatchMode):
    """Sees all products of a forward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.coverage = Coverage()
        self.names = {module: name for name, module in model.named_modules()}
        # The model itself is innermost where its parts are called without it.
        self.stack: list[nn.Module] = [model]
        self.packed = {
            id(module._buffers['grids' if isinstance(module, Int4Attention) else 'weight']): module
            for module in self.names
            if isinstance(module, Int4WeightLayer | Int4Attention)
        }

    def add(self, module: nn.Module, width: str, count: int) -> None:
        counts = self.coverage.modules.setdefault(self.names[module], {})
        counts[width] = counts.get(width, 0) + count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == 'gplq_mm':
            self._count_op(func, args, out)
        elif func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
            self._attribute(flops // 2)
        elif func._overloadpacket is CPU_ATTENTION:
            self._attribute(sdpa_flop_count(*(x.shape for x in args[:3])) // 2)
        return out

    def _attribute(self, count: int) -> None:
        """Books a product of torch's on the innermost module with quantized operands."""
        innermost = self.stack[-1]
        for module in reversed(self.stack):
            if isinstance(module, QuantWeightLayer | QuantAttention):
                self.add(module, _width(module), count)
                return
        # Children that multiply without being called as modules.
        for child in innermost.children():
            # A compensation that is not there yet has no products: they are the block's own.
            if isinstance(child, QuantAttention) or (
                isinstance(child, Compensation) and child.is_fitted
            ):
                width = FLOAT if isinstance(child, Compensation) else _width(child)
                self.add(child, width, count)
                return
        self.add(innermost, FLOAT, count)

    def _count_op(self, func, args: tuple, out: Any) -> None:
        """Books a fused or packed op on the layers that it is given."""
        if func._overloadpacket is torch.ops.gplq_mm.int4_attention:
            qkv, rows = args[0], args[9]
            tokens = qkv.shape[-2] if rows is None else rows.shape[-1]
            windows = math.prod(qkv.shape[:-2]) if rows is None else rows.shape[0]
            module = self.packed[id(args[3])]
            self.add(module, _width(module), 2 * windows * tokens**2 * (qkv.shape[-1] // 3))
            return
        for operand in args:
            if not isinstance(operand, list) or len(operand) != len(LAYER_FIELDS):
                continue
            module = self.packed.get(id(operand[LAYER_FIELDS.index('weight')]))
            if module is not None:
                outputs, columns = len(module.row_scale), len(module.position)
                convolves = func._overloadpacket is torch.ops.gplq_mm.int4_conv2d
                places = (
                    out.numel() // outputs if convolves else args[0].numel() // args[0].shape[-1]
                )
                self.add(module, _width(module), places * outputs * columns)


def _enter(stack: list[nn.Module], module: nn.Module, _args: tuple) -> None:
    stack.append(module)


@torch.no_grad()
def measure_coverage(model: nn.Module, run: Callable[[], Any]) -> Coverage:
    """Counts the multiply-adds of Linear, convolutions, attention products and any other matrix
    product.

    Args:
        model: Float, quantized or packed; its mode stays as it is.
        run: Runs it in eval mode on some images.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    counter = _Counter(model)

    def leave(*_call) -> None:
        counter.stack.pop()

    handles = []
    for module in model.modules():
        enter = partial(_enter, counter.stack)
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with counter:
            run()
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return counter.coverage
