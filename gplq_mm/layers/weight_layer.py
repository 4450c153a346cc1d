"""What quantized Linear and Conv2d share: two quantizers and the life of the weight."""

import torch
from torch import Tensor, nn

from ..quant import (
    ActQuantizer,
    ActSpec,
    PolicyError,
    QuantizedWeight,
    SiteSpec,
    WeightQuantizer,
    WeightSpec,
)
from .saved_codes import Convolution, coded_product

# Above this an integer is not exact in float32.
EXACT_FLOAT32 = 2**24


class QuantWeightLayer(nn.Module):
    """Mixin of layers that compute ``operand(x) @ weight.T + bias``.

    Before Stage 2 the operand is the fake-quantized input and the weight is the FP32 parameter,
    or in direct QAT its fake-quantized value.
    After it, in the ``folded`` layout, the operand is the integer code itself and the weight the
    integer ``multiplier * code``; scale and bias of a row follow. These are the integers of the
    deployed model, and the arithmetic is exact: the product runs in float64 where float32 could
    not hold the sum. With float group scales, which no deployed model has, it is the same product
    in floats.
    """

    act_quantizer: ActQuantizer
    weight_quantizer: WeightQuantizer
    # Whether training keeps codes for backward (:mod:`.saved_codes`); switched off it keeps
    # floats, as plain autograd does.
    saves_codes: bool = True
    # Geometry of a convolution, None of a Linear.
    geometry: Convolution | None = None

    @classmethod
    def _twin(cls, module: nn.Module, spec: SiteSpec, act_shape: tuple[int, ...], name: str):
        """Layer with the sizes and the parameters of a float one, and two quantizers.

        Args:
            module: The float layer.
            spec: Specs of input and weight, both present.
            act_shape: Shape of a scale for each channel, channels first.
            name: Full name of the layer.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        # What nn.Module keeps itself begins with an underscore.
        own = {key: value for key, value in vars(module).items() if not key.startswith('_')}
        layer.__dict__.update(own)
        layer.weight, layer.bias = module.weight, module.bias
        if spec.activation.granularity != 'channel':
            act_shape = (1, *act_shape[1:])
        layer._add_quantizers(spec.activation, spec.weight, act_shape, name)
        return layer.train(module.training)

    def _add_quantizers(
        self, act: ActSpec, weight: WeightSpec, act_shape: tuple[int, ...], name: str
    ) -> None:
        """Adds both quantizers.

        Raises:
            PolicyError: If the grid of the activations cannot be folded into the weight.
        """
        self.site = name
        self.act_quantizer = ActQuantizer(act, act_shape, f'{name}.input')
        if weight.is_folded and not self.act_quantizer.format.is_integer_product:
            raise PolicyError(
                f'{name}: layout "folded" takes the scale of integers into the weight, and '
                f'{act.format} codes are none; set weight=dict(layout="raw") '
                'for this site.'
            )
        shape = tuple(self.as_matrix(self.weight.detach()).shape)
        self.weight_quantizer = WeightQuantizer(weight, shape, name)

    @property
    def weight_is_quantized(self) -> bool:
        """Whether forward uses the integers of Stage 2."""
        return self.weight_quantizer.enabled and self.weight_quantizer.is_quantized

    @property
    def is_folded(self) -> bool:
        """Whether the activation scale is folded into the quantized weight."""
        return self.weight_quantizer.spec.is_folded

    def column_grid(self) -> tuple[Tensor, Tensor]:
        """Scale and offset of the input for every column of the weight matrix, each ``(K,)``."""
        scale, offset = self.act_quantizer.grid()
        offset = torch.zeros_like(scale) if offset is None else offset
        # All taps of a kernel on one channel share its scale.
        taps = self.weight_quantizer.shape[1] // max(scale.numel(), 1)
        return tuple(grid.detach().flatten().repeat_interleave(taps) for grid in (scale, offset))

    def operand(self, x: Tensor) -> Tensor:
        """What Stage 2 multiplies with the weight: codes (folded) or x_hat (raw), shape of x.

        With the activation quantizer switched off nothing is rounded: codes are real numbers.
        """
        if not self.is_folded:
            return self.act_quantizer(x).float()
        quantizer = self.act_quantizer
        codes = quantizer.codes(x) if quantizer.enabled else quantizer.steps(x)
        if self.act_quantizer.spec.zero_point == 'integer':
            codes = codes - self.act_quantizer.zero_point
        return codes

    @torch.no_grad()
    def operand_power(self) -> Tensor:
        """How much an error of each channel of the input counts: the squared norm of the weights
        that meet it, float32, one for each scale of the activation."""
        power = self.weight_matrix().square().sum(0)
        return power.view(self.act_quantizer.scale.numel(), -1).sum(1)

    def largest_operand(self) -> int | None:
        """Bound of the magnitudes of :meth:`operand` where it is an integer, else None."""
        if not self.is_folded:
            return None
        act = self.act_quantizer
        low = high = 0
        if act.spec.zero_point == 'integer':
            low, high = (int(v) for v in act.zero_point.aminmax())
        return max(abs(act.qmin - high), abs(act.qmax - low))

    def operand_rows(self, x: Tensor) -> Tensor:
        """Operands as rows of the matrix product, ``(n, K)``; for statistics."""
        raise NotImplementedError

    def weight_matrix(self) -> Tensor:
        """FP32 latent weight as a matrix ``(out, K)``."""
        return self.as_matrix(self.weight.detach().float())

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as the matrix ``(rows, K)`` that meets the operand."""
        return weight.flatten(1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Inverse of :meth:`as_matrix`."""
        return matrix.reshape(self.weight.shape)

    @torch.no_grad()
    def original_weight(self) -> Tensor:
        """Latent weight in the float model's terms, float64, shape of the parameter.

        Without the factors that its columns got when the LayerNorm in front was reparametrized.
        """
        weight, scale = self.weight.double(), self.act_quantizer.channel_scale
        return weight if scale is None else weight * (scale.double().mean() / scale.double())

    def row_bias(self) -> Tensor:
        """FP32 bias of every row of the matrix, zeros for a layer without, ``(rows,)``."""
        if self.bias is None:
            return self.weight.new_zeros(self.weight.shape[0])
        return self.bias.detach()

    @torch.no_grad()
    def foldable(self) -> tuple[Tensor, Tensor]:
        """The matrix that a PTQ method rounds, and the order of its columns.

        Returns:
            ``(out, K)`` float32 weight, times the activation scale in the folded layout, and
            int64 ``(K,)`` the columns sorted by that scale (as they are in the raw layout).
        """
        weight = self.weight_matrix()
        if not self.is_folded:
            return weight, torch.arange(weight.shape[1], device=weight.device)
        scale, _ = self.column_grid()
        return weight * scale, torch.argsort(scale, stable=True)

    @torch.no_grad()
    def set_quantized_weight(self, value: QuantizedWeight, operand_mean: Tensor | None) -> None:
        """Takes the integers of a PTQ method over and computes the bias that belongs to them.

        Args:
            value: Integers of the matrix that :meth:`foldable` gave.
            operand_mean: Mean operand ``(K,)`` over the calibration set. In the folded layout
                the bias then makes the mean output exact; without it only the zero-points are
                folded into the bias.
        """
        bias = self.row_bias().double()
        if self.is_folded:
            target, _ = self.foldable()
            rounded = value.dequantize().double()
            scale, offset = (grid.double() for grid in self.column_grid())
            if self.act_quantizer.spec.zero_point == 'integer':
                # The operand is code - zero_point already, so nothing is left to fold.
                offset = torch.zeros_like(offset)
            if operand_mean is None:
                bias = bias + rounded @ (offset / scale)
            else:
                mean = operand_mean.double()
                bias = bias + target.double() @ (offset / scale) + (target - rounded) @ mean
        self.weight_quantizer.set(value, bias)

    def training_weight(self) -> Tensor:
        """Weight that enters the product before Stage 2; shape and dtype of the parameter.

        The parameter itself, or in direct QAT its learned fake-quantized value.
        """
        quantizer = self.weight_quantizer
        if quantizer.learned is None or not quantizer.enabled:
            return self.weight
        matrix = self.as_matrix(self.weight)
        if not self.is_folded:
            return self.from_matrix(quantizer.learned(matrix))
        # Straight through the rounding the activation scale cancels: it has no gradient here.
        scale, _ = self.column_grid()
        return self.from_matrix(quantizer.learned(matrix * scale) / scale)

    @torch.no_grad()
    def freeze_learned_weight(self) -> None:
        """Ends direct QAT: the integers that forward has simulated are stored for good."""
        matrix, _ = self.foldable()
        self.set_quantized_weight(self.weight_quantizer.learned.freeze(matrix), None)

    def dequantized_weight(self) -> Tensor:
        """Real quantized weight in its own shape, float32."""
        value = self.weight_quantizer.integers() * self.weight_quantizer.row_scale[:, None]
        if self.is_folded:
            value = value / self.column_grid()[0]
        return self.from_matrix(value)

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's product: F.linear or F.conv2d."""
        raise NotImplementedError

    def accumulate(self, x: Tensor) -> Tensor:
        """Integer accumulators of the folded product, before scale and bias (exact).

        float32 where the largest possible sum is exact there, float64 otherwise.
        """
        operand = self.operand(x)
        integers = self.from_matrix(self.weight_quantizer.integers())
        worst = self.largest_operand() * self.weight_quantizer.largest_row_sum()
        if worst >= EXACT_FLOAT32:
            operand, integers = operand.double(), integers.double()
        return self._multiply(operand, integers, None)

    def keeps_codes(self, x: Tensor) -> bool:
        """Whether this forward keeps codes of ``x`` for its backward."""
        return (
            self.saves_codes
            and torch.is_grad_enabled()
            and not self.weight_is_quantized
            and self.act_quantizer.keeps_codes(x)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Same shapes and dtype as the float layer."""
        if self.keeps_codes(x):
            return self._forward_coded(x)
        if not self.weight_is_quantized:
            return self._multiply(self.act_quantizer(x), self.training_weight(), self.bias)
        with torch.autocast(x.device.type, enabled=False):
            if not self.is_folded:
                out = self._multiply(
                    self.act_quantizer(x).float(), self.dequantized_weight(), self.bias
                )
            else:
                out = self._rescale(self.accumulate(x))
        return out.to(x.dtype)

    def _forward_coded(self, x: Tensor) -> Tensor:
        """Training's forward."""
        quantizer = self.act_quantizer
        if quantizer.is_watched:
            with torch.no_grad():
                quantizer(x)
        quantizer.check_shape(x)
        weight = self.training_weight()
        return coded_product(x, quantizer, weight, self.bias, self.geometry)

    def _rescale(self, accumulator: Tensor) -> Tensor:
        """``accumulator * row_scale + bias``, rows on the layer's output axis, float32."""
        raise NotImplementedError
