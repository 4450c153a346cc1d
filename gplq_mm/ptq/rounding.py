"""Rounding to nearest, and what every PTQ method shares."""

import torch
from torch import Tensor

from ..errors import DataError
from ..quant.quantized_weight import QuantizedWeight
from ..quant.spec import WeightSpec
from ..registry import WEIGHT_PTQ
from .scales import search_group_scales

# Columns that the calibration images do not excite still matter a little for other images.
IMPORTANCE_FLOOR = 0.01


def to_stored_order(
    weight: Tensor, permutation: Tensor | None, second_moment: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weight, permutation and second moment with columns in stored order, shapes checked.

    Args:
        weight: ``(out, K)``, in its own column order.
        permutation: int64 ``(K,)``, stored column j is column ``permutation[j]``; None for the
            identity.
        second_moment: ``(K, K)`` in the weight's own order, or None.

    Raises:
        ValueError: If shapes do not agree or the permutation is none.
    """
    if weight.dim() != 2:
        raise ValueError(f'a weight must be a matrix (out, K), got shape {tuple(weight.shape)}.')
    columns = weight.shape[1]
    identity = torch.arange(columns, device=weight.device)
    permutation = identity if permutation is None else permutation.to(weight.device).long()
    if permutation.shape != (columns,) or not torch.equal(permutation.sort().values, identity):
        raise ValueError(f'permutation is not one of the {columns} columns of the weight.')
    if second_moment is not None:
        if second_moment.shape != (columns, columns):
            raise ValueError(
                f'the second moment of {columns} columns must have shape {(columns, columns)}, '
                f'got {tuple(second_moment.shape)}.'
            )
        second_moment = second_moment.to(weight.device)[permutation][:, permutation]
    return weight.detach().float()[:, permutation], permutation, second_moment


def expand_multiplier(multiplier: Tensor, width: int, columns: int) -> Tensor:
    """Multiplier of every column, float32 ``(out, K)``, from ``(out, G)``."""
    return multiplier.float().repeat_interleave(width, 1)[:, :columns]


@WEIGHT_PTQ.register_module()
class RoundToNearest:
    """Scale search, then the nearest code for each weight on its own.

    Args:
        use_importance: Whether the scale search weighs each column's squared error with the
            mean square of its input; the method then needs a second moment. Defaults to False.
    """

    needs_second_moment = False

    def __init__(self, use_importance: bool = False):
        self.use_importance = use_importance
        # Callers collect statistics only for methods that ask for them.
        self.needs_second_moment = use_importance

    @torch.no_grad()
    def __call__(
        self,
        weight: Tensor,
        spec: WeightSpec,
        permutation: Tensor | None = None,
        second_moment: Tensor | None = None,
    ) -> QuantizedWeight:
        """Rounds ``weight``.

        Args:
            weight: ``(out, K)``, in its own column order, in the space that is quantized.
            spec: Bits, layout, groups and observer.
            permutation: int64 ``(K,)``: stored column j is column ``permutation[j]``. None for
                the weight's own order.
            second_moment: ``(K, K)`` of the layer's input, in the weight's own column order;
                only its diagonal is used, and only with ``use_importance``.

        Returns:
            Integers and scales, in stored order.

        Raises:
            ValueError: If shapes do not agree, values are not finite, or ``use_importance`` has
                no second moment.
        """
        if self.use_importance and second_moment is None:
            raise DataError(
                'RoundToNearest(use_importance=True) needs the second moment of the layer input; '
                'collect it over calibration images, or set use_importance=False.'
            )
        weight, permutation, second_moment = to_stored_order(weight, permutation, second_moment)
        importance = None
        if self.use_importance:
            importance = second_moment.diagonal()
            importance = importance + IMPORTANCE_FLOOR * importance.mean()
        row_scale, multiplier = search_group_scales(weight, spec, importance)
        width = spec.group_width(weight.shape[1])
        step = row_scale[:, None] * expand_multiplier(multiplier, width, weight.shape[1])
        codes = spec.code_format.codes_at(weight, step).to(torch.int8)
        return QuantizedWeight(codes, row_scale, multiplier, permutation, width)
