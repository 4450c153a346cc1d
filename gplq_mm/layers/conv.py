"""Convolution with a quantized input and, after Stage 2, a quantized weight."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quant import PolicyError, SiteSpec
from .saved_codes import Convolution
from .weight_layer import QuantWeightLayer


class QuantConv2d(QuantWeightLayer, nn.Conv2d):
    """``F.conv2d(fake_quant(x), weight, bias)`` for dense, zero-padded convolutions.

    Input ``(N, in, H, W)``, output ``(N, out, H', W')``. As a matrix the weight is
    ``(out, in * kh * kw)``.
    """

    @staticmethod
    def supports(module: nn.Conv2d) -> bool:
        """Whether it has no groups, and pads with explicit zeros."""
        return (
            module.groups == 1
            and module.padding_mode == 'zeros'
            and not isinstance(module.padding, str)
        )

    @classmethod
    def from_float(cls, module: nn.Conv2d, spec: SiteSpec, name: str) -> 'QuantConv2d':
        """Quantized twin of ``module`` that shares its parameters.

        With padding a float zero-point becomes an integer one, since the padded zeros must be
        on the grid.

        Raises:
            PolicyError: For a grouped convolution or a padding other than explicit zeros.
        """
        if not cls.supports(module):
            raise PolicyError(
                f'{name}: a convolution with groups={module.groups}, padding={module.padding!r}, '
                f'padding_mode={module.padding_mode!r} cannot be quantized; exclude it with '
                f'dict(pattern={name!r}, exclude=True).'
            )
        act = spec.activation
        if any(module.padding) and act.zero_point == 'float':
            spec = replace(spec, activation=replace(act, zero_point='integer'))
        return cls._twin(module, spec, (module.in_channels, 1, 1), name)

    @property
    def geometry(self) -> Convolution:
        """Stride, padding and dilation."""
        return Convolution(self.stride, self.padding, self.dilation)

    def operand_rows(self, x: Tensor) -> Tensor:
        columns = F.unfold(
            self.operand(x), self.kernel_size, self.dilation, self.padding, self.stride
        )
        return columns.transpose(1, 2).reshape(-1, columns.shape[1])

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)

    def _rescale(self, accumulator: Tensor) -> Tensor:
        quantizer = self.weight_quantizer
        scale, bias = (
            v.to(accumulator.dtype)[:, None, None] for v in (quantizer.row_scale, quantizer.bias)
        )
        return torch.addcmul(bias, accumulator, scale).float()
