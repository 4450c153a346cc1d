"""Refinement of a quantized weight under the output error ``tr(E H E^T)``, ``E = W - W_hat``.

Codes by sweeps of coordinate descent (Behdin et al., "QuantEase: Optimization-based Quantization
for Language Models", 2023), scales in closed form. No step can raise the error.
"""

import torch
from torch import Tensor

from ..quant.format import Format
from .group_steps import LEAST_RATIO
from .rounding import expand_multiplier


@torch.no_grad()
def coordinate_descent(
    weight: Tensor,
    codes: Tensor,
    hessian: Tensor,
    step: Tensor,
    code_format: Format,
    sweeps: int = 1,
    block_size: int = 128,
    pull: Tensor | None = None,
) -> Tensor:
    """Revisits every column and takes its best code given all the others.

    The error is a parabola in every single code, so each visit can only lower
    ``tr(E H E^T)``; its minimum ``w_hat_k + (E H)_k / H_kk``, rounded, is the best code.

    Args:
        weight: ``(out, K)``.
        codes: int8 ``(out, K)``, the start.
        hessian: ``(K, K)`` symmetric, positive diagonal.
        step: ``(out, K)``, real value per code, positive.
        code_format: Rounds to codes.
        sweeps: Visits of each column; ends early when nothing changes.
        block_size: Columns between two updates of the others.
        pull: ``(out, K)``, ``(weight - step * codes) @ hessian`` if it is known.

    Returns:
        int8 ``(out, K)`` codes.
    """
    target, steps = weight.float().T.contiguous(), step.float().T.contiguous()
    hessian = hessian.to(weight.device, torch.float32)
    # Of a Hessian with ones on the diagonal the pull is the best move itself.
    inverse_diagonal = hessian.diagonal().reciprocal()[:, None]
    hessian = hessian * inverse_diagonal
    inverse = steps.reciprocal()
    current = codes.T.to(torch.float32, memory_format=torch.contiguous_format)
    pull = None if pull is None else (pull.T * inverse_diagonal).contiguous()
    for _ in range(sweeps):
        before = current.clone()
        if pull is None:
            # Afresh in each sweep, so that rounding errors of the updates do not pile up.
            pull = hessian @ (target - current * steps)
        for start in range(0, len(target), block_size):
            block = slice(start, min(start + block_size, len(target)))
            local_pull, local = pull[block], hessian[block, block].T.contiguous()
            moves, best = torch.empty_like(local_pull), torch.empty_like(local_pull[0])
            # Views are made once: the vectors are so short that making them would take the time.
            columns = (local_pull, current[block], steps[block], inverse[block], moves, local)
            for wanted, code, size, inv, move, row in zip(
                *(matrix.unbind() for matrix in columns), strict=True
            ):
                code_format.round_(torch.addcmul(code, wanted, inv, out=best))
                torch.sub(code, best, out=move).mul_(size)
                code.copy_(best)
                local_pull.addr_(row, move)
            pull[block.stop :].addmm_(hessian[block.stop :, block], moves)
        pull = None
        if torch.equal(before, current):
            break
    return current.to(torch.int8).T.contiguous()


@torch.no_grad()
def refit_row_scale(
    weight: Tensor,
    integers: Tensor,
    hessian: Tensor,
    row_scale: Tensor,
    product: Tensor | None = None,
) -> Tensor:
    """Best scale of each row for given integers: ``t = (w^T H z) / (z^T H z)``.

    Args:
        weight: ``(out, K)``.
        integers: ``(out, K)``, multiplier times code, z above, columns as in ``weight``.
        hessian: ``(K, K)`` symmetric positive definite.
        row_scale: ``(out,)``, kept where the formula gives nothing positive (a zero row).
        product: ``(out, K)``, ``integers @ hessian`` if it is known.

    Returns:
        float32 ``(out,)``.
    """
    if product is None:
        product = integers.double() @ hessian.to(weight.device, torch.float64)
    power = (product * integers).sum(1, dtype=torch.float64)
    best = (product * weight).sum(1, dtype=torch.float64) / torch.where(power > 0, power, 1.0)
    best = best.to(torch.float32)
    return torch.where(best > 0, best, row_scale)


@torch.no_grad()
def refit_group_scale(
    weight: Tensor,
    codes: Tensor,
    hessian: Tensor,
    row_scale: Tensor,
    multiplier: Tensor,
    width: int,
) -> Tensor:
    """Best float scale of each group for given codes, one group after the other.

    Args:
        weight: ``(out, K)``.
        codes: int8 ``(out, K)``, columns as in ``weight``.
        hessian: ``(K, K)`` symmetric positive definite.
        row_scale: ``(out,)``, positive.
        multiplier: float32 ``(out, G)``, scales of the groups in units of the row's; one is kept
            where the formula gives nothing positive (a group of zeros).
        width: Columns of a group.

    Returns:
        float32 ``(out, G)``.
    """
    hessian = hessian.to(weight.device, torch.float32)
    steps = expand_multiplier(multiplier, width, weight.shape[1])
    # In units of the row's scale, whose square may underflow.
    pull = (weight.float() / row_scale[:, None] - steps * codes) @ hessian
    result = multiplier.clone()
    for index, scale in enumerate(result.unbind(1)):
        columns = slice(index * width, (index + 1) * width)
        group = codes[:, columns].float()
        product = group @ hessian[columns]
        power = (product[:, columns] * group).sum(1)
        best = scale + (pull[:, columns] * group).sum(1) / torch.where(power > 0, power, 1.0)
        best = torch.where(best > LEAST_RATIO, best, scale)
        pull.addcmul_(product, (scale - best)[:, None])
        scale.copy_(best)
    return result
