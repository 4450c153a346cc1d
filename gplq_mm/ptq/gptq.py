"""GPTQ: rounding that lets the columns still to come make up for the error of those done.

The output error of a layer is ``tr(E H E^T)`` with ``E = W - W_hat`` and H the second moment of
its input: an error of the layer's output, not of its weight. GPTQ (Frantar et al., "GPTQ:
Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023)
minimises it column by column; the steps of ``refinement.py`` go on from there.
"""

import warnings

import torch
from torch import Tensor

from ..errors import DataError, SettingError
from ..quant.format import Format
from ..quant.quantized_weight import QuantizedWeight
from ..quant.spec import WeightSpec
from ..registry import WEIGHT_PTQ
from .refinement import coordinate_descent, refit_group_scale, refit_row_scale
from .rounding import expand_multiplier, to_stored_order
from .scales import search_group_scales

ORDERS = ('activation', 'stored')
DAMPING_TRIES = 6


def _check_order(order: str) -> None:
    if order not in ORDERS:
        raise SettingError(f'order={order!r} is not one of {", ".join(ORDERS)}.')


def damped_hessian(second_moment: Tensor, damp: float = 0.1) -> Tensor:
    """Second moment plus a multiple of the identity that makes it safely invertible.

    The damping is ``damp`` times the mean diagonal. With few samples the second moment has no
    full rank, and one that was summed in low precision may even have negative eigenvalues; then
    the damping is raised tenfold until the Cholesky decomposition works, with a warning. A dead
    column (its input was always zero) is left with the damping alone: it is rounded to nearest
    and compensates for nobody.

    Args:
        second_moment: ``(K, K)``, in squared units of the layer's input.
        damp: Fraction of the mean diagonal.

    Returns:
        float64 ``(K, K)``, symmetric positive definite, divided by the mean of its diagonal.
        Nothing here depends on its unit.

    Raises:
        ValueError: If it is not a square finite matrix with a diagonal that is not negative, or
            so far from positive definite that no reasonable damping helps.
    """
    if second_moment.dim() != 2 or second_moment.shape[0] != second_moment.shape[1]:
        raise ValueError(
            f'a second moment must be a square matrix, got shape {tuple(second_moment.shape)}.'
        )
    hessian = second_moment.double()
    if not hessian.isfinite().all():
        raise DataError('the second moment has non-finite values; check the calibration data.')
    diagonal = hessian.diagonal()
    if (diagonal < 0).any():
        raise ValueError('the second moment has a negative diagonal, so it is none.')
    mean = diagonal.mean()
    if mean == 0:
        # No input was ever seen: any rounding is as good as the nearest one.
        return torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    hessian = (hessian + hessian.T).div_(2 * mean)
    for attempt in range(DAMPING_TRIES):
        amount = damp * 10**attempt
        damped = hessian.clone()
        damped.diagonal().add_(amount)
        if not torch.linalg.cholesky_ex(damped).info.item():
            if attempt:
                warnings.warn(
                    f'GPTQ: the second moment is not positive definite; damping raised from '
                    f'{damp:g} to {amount:g}. More calibration images help.',
                    stacklevel=2,
                )
            return damped.div_(damped.diagonal().mean())
    raise DataError(
        f'the second moment is not positive definite even with a damping of {amount:g}; '
        'use more calibration images or a larger "damp".'
    )


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U with ``U^T U = H^-1``.

    With the Cholesky factor M of H in reverse order, ``H = M M^T`` and M upper triangular, U is
    its inverse: one decomposition, and H is never inverted itself.
    """
    lower, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if info.item():
        raise ValueError('the Hessian is not positive definite; use damped_hessian.')
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)


@torch.no_grad()
def gptq_round(
    weight: Tensor,
    hessian: Tensor,
    step: Tensor,
    code_format: Format,
    block_size: int = 128,
    order: str = 'activation',
) -> Tensor:
    """Rounds columns one after the other, each taking over the error of those before it.

    Source: GPTQ, Algorithm 1, all rows at once; updates beyond a block of columns are applied
    once for the whole block. With a diagonal Hessian this is rounding to nearest.

    Args:
        weight: ``(out, K)``, in stored order.
        hessian: ``(K, K)`` symmetric positive definite, of :func:`damped_hessian`.
        step: ``(out, K)``, real value per code, positive.
        code_format: Rounds to codes.
        block_size: Columns between two updates of the remaining ones.
        order: ``'activation'``: columns of large input first, while all others can still make
            up for them ("act-order"); ``'stored'``: from left to right. Steps are fixed before,
            so the order does not break up the groups.

    Returns:
        int8 ``(out, K)`` codes, in the order of ``weight``.

    Raises:
        ValueError: If the Hessian is not positive definite, or the order is unknown.
    """
    _check_order(order)
    sequence = torch.arange(weight.shape[1], device=weight.device)
    if order == 'activation':
        sequence = hessian.diagonal().argsort(descending=True, stable=True).to(weight.device)
    hessian = hessian.to(weight.device)[sequence][:, sequence]
    factor = _inverse_factor(hessian.double()).to(torch.float32)
    # Columns become contiguous rows, since everything below goes column by column.
    rest = weight.float().T[sequence]
    steps = step.float().T[sequence]
    inverse = steps.reciprocal()
    codes = torch.empty_like(rest)
    for start in range(0, len(rest), block_size):
        block = slice(start, min(start + block_size, len(rest)))
        local, values = factor[block, block], rest[block]
        errors = torch.empty_like(values)
        weights = local.diagonal().reciprocal().tolist()
        # Views are made once: the vectors are so short that making them would take the time.
        columns = (values, steps[block], inverse[block], codes[block], errors, local)
        for k, (value, size, inv, code, error, row) in enumerate(
            zip(*(matrix.unbind() for matrix in columns), strict=True)
        ):
            code_format.round_(torch.mul(value, inv, out=code))
            torch.addcmul(value, code, size, value=-1, out=error).mul_(weights[k])
            # The factor is triangular: of what is done nothing changes but the column itself.
            values.addr_(row, error, alpha=-1)
        rest[block.stop :].addmm_(factor[block, block.stop :].T, errors, alpha=-1)
    result = torch.empty_like(codes, dtype=torch.int8)
    result[sequence] = codes.to(torch.int8)
    return result.T.contiguous()


@WEIGHT_PTQ.register_module()
class GPTQ:
    """Second-order rounding of a weight.

    Scales are chosen first (static groups), then codes, then both are refined in turns; every
    turn lowers the error on the (damped) calibration data.

    The defaults come from 16 layers of a real ViT-Ti, 4 bit, folded groups of 32, 64
    calibration images; relative output error on 32 other images (geometric mean over layers):
    rounding to nearest 0.00760, GPTQ alone with the original's damping of 0.01 0.00527, with
    the refinement 0.00479, and with a damping of 0.1 0.00466. The latter has no larger error on
    the calibration images either.

    Args:
        damp: Damping of the second moment, a fraction of its mean diagonal. Defaults to 0.1.
        block_size: Columns per lazy update; changes speed only. Defaults to 128.
        order: ``'activation'`` or ``'stored'``, see :func:`gptq_round`.
        use_importance: Whether the scale search weighs each column's squared error with the
            diagonal of the second moment. Defaults to True.
        sweeps: Sweeps of coordinate descent after GPTQ; each costs about as much as GPTQ.
            Defaults to 4.
        refine_scale: Whether the scales are refitted to the codes, before each sweep and at the
            end: the row's, and before it those of its groups where they are floats. Those of
            block-scaled formats stay. Defaults to True.

    Raises:
        SettingError: For an option out of range.
    """

    needs_second_moment = True

    def __init__(
        self,
        damp: float = 0.1,
        block_size: int = 128,
        order: str = 'activation',
        use_importance: bool = True,
        sweeps: int = 4,
        refine_scale: bool = True,
    ):
        if not damp > 0:
            raise SettingError(f'damp={damp!r} must be positive.')
        if block_size < 1 or sweeps < 0:
            raise SettingError(f'{block_size=} must be at least 1 and {sweeps=} at least 0.')
        _check_order(order)
        self.damp = damp
        self.block_size = block_size
        self.order = order
        self.use_importance = use_importance
        self.sweeps = sweeps
        self.refine_scale = refine_scale

    @torch.no_grad()
    def __call__(
        self,
        weight: Tensor,
        spec: WeightSpec,
        permutation: Tensor | None = None,
        second_moment: Tensor | None = None,
    ) -> QuantizedWeight:
        """Rounds ``weight``; arguments and result are those of :class:`RoundToNearest`.

        Raises:
            ValueError: If the second moment is missing or unusable, or shapes do not agree.
        """
        if second_moment is None:
            raise DataError(
                'GPTQ needs the second moment of the layer input; collect it over calibration '
                'images, or use RoundToNearest.'
            )
        weight, permutation, second_moment = to_stored_order(weight, permutation, second_moment)
        hessian = damped_hessian(second_moment, self.damp)
        importance = hessian.diagonal() if self.use_importance else None
        row_scale, multiplier = search_group_scales(weight, spec, importance)
        width = spec.group_width(weight.shape[1])
        multiple = expand_multiplier(multiplier, width, weight.shape[1])
        grid = (row_scale[:, None] * multiple, spec.code_format)
        codes = gptq_round(weight, hessian, *grid, self.block_size, self.order)
        hessian = hessian.float()
        target = weight @ hessian
        # Scales of blocks have a format of their own.
        refines = self.refine_scale and spec.code_format.block_size is None
        for sweep in range(self.sweeps + 1):
            if refines and spec.has_float_groups:
                multiplier = refit_group_scale(weight, codes, hessian, row_scale, multiplier, width)
                multiple = expand_multiplier(multiplier, width, weight.shape[1])
            integers = codes * multiple
            product = integers @ hessian
            if refines:
                row_scale = refit_row_scale(weight, integers, hessian, row_scale, product)
                grid = (row_scale[:, None] * multiple, spec.code_format)
            if sweep == self.sweeps:
                break
            before = codes
            pull = target - row_scale[:, None] * product
            codes = coordinate_descent(weight, codes, hessian, *grid, 1, self.block_size, pull)
            if torch.equal(before, codes):
                break
        return QuantizedWeight(codes, row_scale, multiplier, permutation, width)
