"""The places of a model that are quantized, and how to switch one of them on alone."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from ..layers import QuantAttention, QuantWeightLayer
from ..layers.attention import OPERANDS
from ..layers.replace import kind_of
from ..quant import ActQuantizer, QuantState, WeightQuantizer


@dataclass(frozen=True)
class Site:
    """A layer with a weight, or the products of an attention.

    Attributes:
        name: Full name of the layer, as policies know it.
        path: Name of the module; of an attention that of the child that multiplies.
        kind: ``'linear'``, ``'conv'`` or ``'attention'``.
        module: The module.
        activations: Its activation quantizers by operand: ``'input'``, or ``'q'`` to ``'probs'``.
        weight: Its weight quantizer; None of an attention.
    """

    name: str
    path: str
    kind: str
    module: QuantWeightLayer | QuantAttention
    activations: dict[str, ActQuantizer]
    weight: WeightQuantizer | None

    @property
    def act_bits(self) -> dict[str, int]:
        """Width of every activation quantizer, by operand."""
        return {operand: quantizer.spec.bits for operand, quantizer in self.activations.items()}

    @property
    def weight_bits(self) -> int | None:
        """Width of the weight; None of an attention."""
        return None if self.weight is None else self.weight.spec.bits

    @property
    def has_quantized_weight(self) -> bool:
        """Whether there are integers, or a learned quantizer that simulates them."""
        if self.weight is None:
            return False
        learned = self.weight.learned
        return self.weight.is_quantized or (
            learned is not None and learned.state >= QuantState.LEARNING
        )

    def quantizers(self, weights: bool, activations: bool) -> list[nn.Module]:
        """Those of its activations, and that of its weight where there is something to switch."""
        return [
            *(self.activations.values() if activations else ()),
            *([self.weight] if weights and self.has_quantized_weight else ()),
        ]


@contextmanager
def switched_on(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Context in which these quantizers and compensations are on; around it they must be off."""
    modules = list(modules)
    for module in modules:
        module.enabled = True
    try:
        yield
    finally:
        for module in modules:
            module.enabled = False


def quant_sites(model: nn.Module) -> dict[str, Site]:
    """All sites by name, in definition order."""
    sites = {}
    for path, module in model.named_modules():
        if isinstance(module, QuantWeightLayer):
            quantizers = {'input': module.act_quantizer}
            weight, kind = module.weight_quantizer, kind_of(module)
            sites[path] = Site(path, path, kind, module, quantizers, weight)
        elif isinstance(module, QuantAttention):
            quantizers = {
                operand: getattr(module, operand)
                for operand in OPERANDS
                if isinstance(getattr(module, operand), ActQuantizer)
            }
            name = next(iter(quantizers.values())).site.rpartition('.')[0]
            sites[name] = Site(name, path, 'attention', module, quantizers, None)
    return sites


def operand_quantizers(model: nn.Module) -> dict[str, ActQuantizer]:
    """``<layer>.input`` or ``<attention>.q``, ``.k``, ``.v``, ``.probs`` -> its quantizer."""
    return {
        f'{name}.{operand}': quantizer
        for name, site in quant_sites(model).items()
        for operand, quantizer in site.activations.items()
    }


def weighted_sites(model: nn.Module) -> dict[str, Site]:
    """The sites with a weight."""
    return {name: site for name, site in quant_sites(model).items() if site.weight is not None}


def weights_are_quantized(model: nn.Module) -> bool:
    """Whether every layer has a quantized weight."""
    return all(site.has_quantized_weight for site in weighted_sites(model).values())
