"""MLPs of transformers as one product of training: Linear, GELU, Linear.

The hidden layer is four times as wide as the rest. In training the last Linear computes all three
steps and keeps one tensor of that width, not two (:func:`.saved_codes.coded_mlp`); the two before
it hand their input on. Otherwise all compute as ever.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import QuantLinear
from .saved_codes import coded_mlp

__all__ = ['CodedMlp', 'find_mlps']


class CodedMlp:
    """The two layers of an MLP, which know each other through it.

    Args:
        first, second: The Linears before and behind the GELU.
        between: The modules between them.
    """

    def __init__(self, first: QuantLinear, second: QuantLinear, between: list[nn.Module]):
        self.first, self.second, self.between = first, second, between

    def takes_over(self, x: Tensor) -> bool:
        """Whether the second layer computes the MLP: both keep codes of inputs like ``x`` (all
        modules see the same one then), and no hook waits for what lies between."""
        return (
            self.first.keeps_codes(x)
            and self.second.keeps_codes(x)
            and not any(
                module._forward_hooks or module._forward_pre_hooks
                for module in (self.first, self.second, *self.between)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)``, the input of the first layer, to ``(..., out)``."""
        layers = (self.first, self.second)
        quantizers = tuple(layer.act_quantizer for layer in layers)
        if any(quantizer.is_watched for quantizer in quantizers):
            with torch.no_grad():
                hidden = F.linear(quantizers[0](x), self.first.training_weight(), self.first.bias)
                quantizers[1](F.gelu(hidden))
        quantizers[0].check_shape(x)
        weights = tuple(layer.training_weight() for layer in layers)
        return coded_mlp(x, quantizers, weights, tuple(layer.bias for layer in layers))


def _is_sequence(module: nn.Module) -> bool:
    """Whether a module runs its children one after the other (mmengine has a Sequential too)."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _steps(module: nn.Module) -> Iterator[nn.Module]:
    """What a Sequential of Sequentials runs, in order."""
    for child in module:
        if _is_sequence(child):
            yield from _steps(child)
        elif not (isinstance(child, nn.Dropout) and child.p == 0):
            yield child


def find_mlps(model: nn.Module, gelu: type[nn.Module]) -> None:
    """Lets the MLPs in the ``nn.Sequential`` of a model be computed as one in training, in place.

    A Dropout that drops nothing may lie between the layers.

    Args:
        model: With quantized layers.
        gelu: Class of the GELUs that hand their input on.
    """
    for module in model.modules():
        if not _is_sequence(module):
            continue
        steps = list(_steps(module))
        for first, middle, second in zip(steps, steps[1:], steps[2:], strict=False):
            layers = isinstance(first, QuantLinear) and isinstance(second, QuantLinear)
            if layers and type(middle) is gelu:
                mlp = CodedMlp(first, second, [middle])
                # Not as children: all three have their places already.
                for member in (first, middle, second):
                    member.__dict__['mlp'] = mlp
