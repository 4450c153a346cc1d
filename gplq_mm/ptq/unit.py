"""What a Weight-PTQ method sees of a whole unit, for block reconstruction."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import QuantWeightLayer, weights_disabled
from ..quant import QuantizedWeight
from .tensor_store import TensorStore


@dataclass(frozen=True)
class Unit:
    """A residual block, or a layer outside of any, after each of its layers was rounded.

    Attributes:
        module: The unit. Its activation quantizers are frozen.
        layers: Name below the module -> quantized layer; the name of a unit that is one is empty.
        means: Name -> mean operand of the layer, ``(K,)``.
        inputs: For every batch a list of the arguments ``(args, kwargs)`` of each call, as the
            quantized units before it give them. In memory up to the budget of Stage 2, on disk
            beyond it.
        targets: For every batch a list of what each call gives with float weights; likewise.
    """

    module: nn.Module
    layers: dict[str, QuantWeightLayer]
    means: dict[str, Tensor]
    inputs: TensorStore
    targets: TensorStore

    def forward(self, call: tuple[tuple, dict], matrices: dict[str, Tensor]) -> Any:
        """Output of one call with other weights, differentiable in them.

        Args:
            call: ``(args, kwargs)``, an item of ``inputs[batch]``.
            matrices: Name of a layer -> real weight ``(out, K)`` in the space and the columns of
                :meth:`QuantWeightLayer.foldable`, such as ``QuantizedWeight.dequantize()``. Layers
                without one compute with their float weights.
        """
        values = {name: value.detach() for name, value in self.module.named_parameters()}
        for name, matrix in matrices.items():
            layer, prefix = self.layers[name], f'{name}.' if name else ''
            if layer.is_folded:
                # The stored bias will make up for the mean error, as in `store`. That of a
                # transposed convolution has a value for each tap, which its float form has not.
                scale, offset = layer.column_grid()
                if layer.geometry is None or not layer.geometry.transposed:
                    mean = self.means[name].to(scale.dtype)
                    if layer.act_quantizer.spec.zero_point != 'integer':
                        mean = mean + offset / scale
                    shift = (layer.foldable()[0] - matrix) @ mean
                    values[f'{prefix}bias'] = layer.row_bias() + shift
                matrix = matrix / scale
            values[f'{prefix}weight'] = layer.from_matrix(matrix)
        args, kwargs = call
        with weights_disabled(self.module):
            return torch.func.functional_call(self.module, values, args, kwargs)

    def store(self, name: str, value: QuantizedWeight) -> None:
        """Gives a layer other integers and scales; its bias makes up for their mean error."""
        self.layers[name].set_quantized_weight(value, self.means[name])
