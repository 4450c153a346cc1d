"""The MLP of a transformer, explicit: in training Linear, GELU and Linear are one product.

The hidden layer is four times as wide as the rest. The product keeps one tensor of that width for
backward, not two (:func:`.saved_codes.coded_mlp`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quant import ActQuantizer, WeightQuantizer
from .family import MlpNames, entry_of, with_mixin
from .linear import QuantLinear
from .reproducible import ReproducibleGELU
from .saved_codes import coded_mlp


class QuantMlp:
    """Mixin over the class of a module that computes ``(..., in)`` to ``(..., out)`` by two
    Linears with a GELU between, under whatever names.

    While both keep codes of their inputs it computes all three at once, otherwise as ever. Made
    by :func:`as_quant_mlp`.
    """

    # Names of the Linears, below the module.
    linears: tuple[str, str]

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        layers = tuple(map(self.get_submodule, self.linears))
        if not self._is_one_product(x, layers):
            return super().forward(x)
        first, second = (layer.act_quantizer for layer in layers)
        weights = tuple(layer.training_weight() for layer in layers)
        if first.is_watched or second.is_watched:
            with torch.no_grad():
                second(F.gelu(F.linear(first(x), weights[0], layers[0].bias)))
        first.check_shape(x)
        return coded_mlp(x, (first, second), weights, tuple(layer.bias for layer in layers))

    def _is_one_product(self, x: Tensor, layers: tuple[nn.Module, ...]) -> bool:
        """Whether both layers keep codes of inputs like ``x`` (all modules see the same one
        then), and no hook waits for what lies between."""
        return all(
            isinstance(layer, QuantLinear) and layer.keeps_codes(x) for layer in layers
        ) and not any(
            module._forward_hooks or module._forward_pre_hooks
            for module in self.modules()
            if module is not self and not isinstance(module, ActQuantizer | WeightQuantizer)
        )


def as_quant_mlp(module: nn.Module, names: MlpNames) -> bool:
    """Makes a module with an MLP an explicit :class:`QuantMlp`, in place; keys stay.

    Args:
        module: Of a class in a family's table. It may hold a Dropout that drops nothing, and
            Identity.
        names: Where the layers are.

    Returns:
        Whether it is one: both Linears are quantized, and nothing acts between or behind them.
    """
    module, (first, gelu, second) = module.get_submodule(names.inside), names[:3]
    known = {name: module.get_submodule(name) for name in (first, gelu, second)}
    inside = tuple(f'{name}.' for name in known)
    others = [
        child
        for name, child in module.named_modules()
        if name not in known and not name.startswith(inside) and not any(child.children())
    ]
    if not (
        isinstance(known[first], QuantLinear)
        and type(known[gelu]) is ReproducibleGELU
        and isinstance(known[second], QuantLinear)
        and all(
            isinstance(child, nn.Identity) or (isinstance(child, nn.Dropout) and child.p == 0)
            for child in others
        )
    ):
        return False
    module.linears = (first, second)
    return with_mixin(module, QuantMlp)


def make_mlps_explicit(model: nn.Module) -> None:
    """Makes the MLPs that the families know explicit, in place."""
    for module in model.modules():
        names = entry_of(module, 'mlps')
        if names is not None:
            as_quant_mlp(module, names)
