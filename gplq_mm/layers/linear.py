"""Linear layer with a quantized input and, after Stage 2, a quantized weight."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quant import SiteSpec
from .weight_layer import QuantWeightLayer


class QuantLinear(QuantWeightLayer, nn.Linear):
    """``F.linear(fake_quant(x), weight, bias)``; keeps the Parameter and the key of its source.

    Input ``(..., in_features)``, output ``(..., out_features)``.
    """

    @classmethod
    def from_float(cls, module: nn.Linear, spec: SiteSpec, name: str) -> 'QuantLinear':
        """Quantized twin of ``module`` that shares its parameters."""
        return cls._twin(module, spec, (module.in_features,), name)

    def operand_rows(self, x: Tensor) -> Tensor:
        return self.operand(x).reshape(-1, self.in_features)

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def _rescale(self, accumulator: Tensor) -> Tensor:
        quantizer = self.weight_quantizer
        scale, bias = (v.to(accumulator.dtype) for v in (quantizer.row_scale, quantizer.bias))
        return torch.addcmul(bias, accumulator, scale).float()
