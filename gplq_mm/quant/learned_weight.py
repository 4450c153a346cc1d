"""The weight quantizer of direct QAT: LSQ, and exact integers when it ends."""

import torch
from torch import Tensor, nn

from ..errors import StateError
from .quantized_weight import QuantizedWeight
from .quantizers import LearnedQuantizer, NotCalibratedError, QuantState
from .spec import PolicyError, WeightSpec

# The smallest scale in units of the initial one: a bad step must not reach zero.
MIN_RATIO = 1e-4


class LearnedWeightQuantizer(LearnedQuantizer):
    """Learned uniform weight quantizer (LSQ, Esser et al., ICLR 2020): symmetric, signed codes.

    It works on the matrix ``(out, K)`` of a layer; in the folded layout its columns are already
    multiplied by the activation scale. Order of the columns and multipliers of the groups are
    those of the initialization; what is learned is a scale for each row, or one for all rows.

    The parameter is the scale in units of its initial value, ``ratio``, and starts at 1. Adam's
    steps do not depend on the size of a gradient, so this makes its rate a relative one, that
    suits all rows, layers and layouts. Under SGD the scale moves exactly as in LSQ: the gradient
    of ``ratio`` is LSQ's divided by that unit.

    Args:
        spec: Bits, layout, group size.
        shape: ``(out, K)``.
        granularity: ``'row'`` or ``'tensor'``: what shares a scale.
        name: Full name of the layer, for messages.

    Raises:
        PolicyError: For an unknown granularity, or one scale for a tensor in the folded layout.
    """

    def __init__(
        self, spec: WeightSpec, shape: tuple[int, int], granularity: str = 'row', name: str = ''
    ):
        super().__init__(name)
        if granularity not in ('row', 'tensor'):
            raise PolicyError(f'direct.granularity={granularity!r} is not one of row, tensor.')
        if granularity == 'tensor' and spec.is_folded:
            raise PolicyError(
                f'{name}: direct.granularity="tensor" goes with weight.layout="raw" only; the '
                'folded layout has a scale for each row.'
            )
        if not spec.code_format.is_integer_product:
            raise PolicyError(
                f'{name}: direct QAT learns the scales of integers; set weight=dict('
                f'format="integer") instead of {spec.format!r}.'
            )
        rows, columns = shape
        self.spec = spec
        self.granularity = granularity
        self.format = spec.code_format
        self.group_size = spec.group_width(columns)
        scales = rows if granularity == 'row' else 1
        self.grad_scale = (max(rows * columns, 1) / max(scales, 1) * self.format.qmax) ** -0.5
        self.ratio = nn.Parameter(torch.ones(scales, 1))
        self.register_buffer('unit', torch.ones(scales, 1))
        groups = -(-columns // self.group_size)
        multiplier = torch.ones(rows, groups, dtype=spec.multiplier_dtype)
        self.register_buffer('multiplier', multiplier)
        self.register_buffer('permutation', torch.arange(columns, dtype=torch.int32))

    @torch.no_grad()
    def initialize(self, scale: Tensor, multiplier: Tensor, permutation: Tensor) -> None:
        """Sets, in place, where learning starts.

        Args:
            scale: Real value of one step of ``multiplier * code``, positive, ``(out,)`` or
                ``(1,)`` by granularity.
            multiplier: uint8 ``(out, G)``, ones in the raw layout; float32 with float group
                scales.
            permutation: ``(K,)``: stored column j is column ``permutation[j]`` of the weight.

        Raises:
            StateError: If the quantizer is frozen.
        """
        if self.state == QuantState.FROZEN:
            raise StateError(f'{self.site}: a frozen weight quantizer cannot be initialized.')
        self.unit.copy_(scale[:, None])
        self.ratio.fill_(1.0)
        self.multiplier.copy_(multiplier)
        self.permutation.copy_(permutation)
        self._set_state(QuantState.LEARNING)

    def _require_scale(self) -> None:
        if self.state < QuantState.LEARNING:
            raise NotCalibratedError(
                f'the learned weight quantizer of {self.site or "(unnamed)"} has no scale yet. '
                'Train with train_cfg.type="gplq_mm.DirectQATLoop", or load a checkpoint of such '
                'a run.'
            )

    def scale(self) -> Tensor:
        """Real value of one step of ``multiplier * code``, ``(out, 1)`` or ``(1, 1)``."""
        ratio = self.ratio.detach()
        # The difference is exactly zero; it carries the gradient, also below the floor.
        return self.unit * ratio.clamp(min=MIN_RATIO) + (self.ratio - ratio) / self.unit

    def step(self) -> Tensor:
        """Real value of one step of the code, broadcastable to the matrix."""
        if self.spec.has_one_step:
            return self.scale()
        stored = self.multiplier.repeat_interleave(self.group_size, 1)
        return self.scale() * stored[:, self.permutation.argsort()]

    def forward(self, matrix: Tensor) -> Tensor:
        """The matrix on its grid; straight through for it, LSQ's gradient for the scale.

        Args:
            matrix: ``(out, K)``, columns in the weight's own order.

        Raises:
            NotCalibratedError: If there is no scale yet.
        """
        self._require_scale()
        return self.format.fake_quantize(matrix, self.step(), None, self.grad_scale)

    @torch.no_grad()
    def freeze(self, matrix: Tensor) -> QuantizedWeight:
        """Ends learning for good.

        Args:
            matrix: As in :meth:`forward`.

        Returns:
            The integers of which :meth:`forward` makes its result, columns in stored order.

        Raises:
            NotCalibratedError: If there is nothing to freeze yet.
        """
        self._require_scale()
        self.ratio.clamp_(min=MIN_RATIO)
        self._set_state(QuantState.FROZEN)
        codes = self.format.codes(matrix, self.step(), None).to(torch.int8)
        order = self.permutation.long()
        row_scale = self.scale().flatten().expand(len(matrix)).clone()
        return QuantizedWeight(
            codes[:, order], row_scale, self.multiplier.clone(), order, self.group_size
        )

    def extra_repr(self) -> str:
        return f'{self.spec.bits} bit, scale per {self.granularity}, {self.state.name}'
