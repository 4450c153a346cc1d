"""Transposed convolution that enlarges a map without overlap, as mask heads and pyramids do."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quant import PolicyError, SiteSpec
from .saved_codes import Convolution
from .weight_layer import QuantWeightLayer


class QuantConvTranspose2d(QuantWeightLayer, nn.ConvTranspose2d):
    """``F.conv_transpose2d(fake_quant(x), weight, bias)`` with a kernel as large as its stride.

    Every output pixel then is one product of an input pixel with a row of the matrix
    ``(out * kh * kw, in)``. Input ``(N, in, H, W)``, output ``(N, out, H * kh, W * kw)``.
    """

    @staticmethod
    def supports(module: nn.ConvTranspose2d) -> bool:
        """Whether outputs of several input pixels do not overlap, and nothing is cropped."""
        return (
            module.groups == 1
            and tuple(module.kernel_size) == tuple(module.stride)
            and not any((*module.padding, *module.output_padding))
            and max(module.dilation) == 1
        )

    @classmethod
    def from_float(
        cls, module: nn.ConvTranspose2d, spec: SiteSpec, name: str
    ) -> 'QuantConvTranspose2d':
        """Quantized twin of ``module`` that shares its parameters.

        Raises:
            PolicyError: Unless :meth:`supports` says yes.
        """
        if not cls.supports(module):
            raise PolicyError(
                f'{name}: only a transposed convolution with kernel_size=stride, no padding, no '
                f'groups and no dilation can be quantized; exclude this one with '
                f'dict(pattern={name!r}, exclude=True).'
            )
        return cls._twin(module, spec, (module.in_channels, 1, 1), name)

    @property
    def geometry(self) -> Convolution:
        """Stride, padding and dilation."""
        return Convolution(self.stride, self.padding, self.dilation, transposed=True)

    def operand_rows(self, x: Tensor) -> Tensor:
        return self.operand(x).movedim(1, -1).reshape(-1, self.in_channels)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.permute(1, 2, 3, 0).flatten(0, 2)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.out_channels, *self.kernel_size, -1).permute(3, 0, 1, 2)

    def row_bias(self) -> Tensor:
        taps = self.kernel_size[0] * self.kernel_size[1]
        if self.bias is None:
            return self.weight.new_zeros(self.out_channels * taps)
        return self.bias.detach().repeat_interleave(taps)

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv_transpose2d(x, weight, bias, self.stride)

    def _rescale(self, accumulator: Tensor) -> Tensor:
        quantizer = self.weight_quantizer
        # Scale and bias of a row belong to one place in every kernel-sized cell of the output.
        height, width = (n // k for n, k in zip(accumulator.shape[-2:], self.stride, strict=True))
        scale, bias = (
            v.to(accumulator.dtype)
            .reshape(self.out_channels, *self.stride)
            .repeat(1, height, width)
            for v in (quantizer.row_scale, quantizer.bias)
        )
        return torch.addcmul(bias, accumulator, scale).float()
