"""Refinement of a quantized weight under the output error ``tr(E H E^T)``, ``E = W - W_hat``.

Codes by sweeps of coordinate descent (Behdin et al., "QuantEase: Optimization-based Quantization
for Language Models", 2023), row scales in closed form. Neither step can raise the error.
"""

import torch
from torch import Tensor

from ..quant.functional import dequantize, quantize

__all__ = ['coordinate_descent', 'refit_row_scale']


@torch.no_grad()
def coordinate_descent(
    weight: Tensor,
    codes: Tensor,
    hessian: Tensor,
    step: Tensor,
    code_range: tuple[int, int],
    sweeps: int = 1,
    block_size: int = 128,
) -> Tensor:
    """Revisits every column and takes its best code given all the others.

    The error is a parabola in every single code, so each visit can only lower
    ``tr(E H E^T)``; its minimum ``w_hat_k + (E H)_k / H_kk``, rounded, is the best code.

    Args:
        weight: ``(out, K)``.
        codes: int8 ``(out, K)``, the start.
        hessian: ``(K, K)`` symmetric, positive diagonal.
        step: ``(out, K)``, real value per code, positive.
        code_range: Smallest and largest code.
        sweeps: Visits of each column; ends early when nothing changes.
        block_size: Columns between two updates of the others.

    Returns:
        int8 ``(out, K)`` codes.
    """
    target, steps = weight.float().T.contiguous(), step.float().T.contiguous()
    hessian = hessian.to(weight.device, torch.float32)
    diagonal = hessian.diagonal()
    current = codes.T.to(torch.float32)
    for _ in range(sweeps):
        before = current.clone()
        # Afresh in each sweep, so that rounding errors of the updates do not pile up.
        pull = hessian @ (target - dequantize(current, steps, None))
        for start in range(0, len(target), block_size):
            block = slice(start, min(start + block_size, len(target)))
            local_pull, local = pull[block].clone(), hessian[block, block]
            moves = torch.empty_like(local_pull)
            for k in range(len(moves)):
                size = steps[start + k]
                value = dequantize(current[start + k], size, None)
                best = value + local_pull[k] / diagonal[start + k]
                current[start + k] = quantize(best, size, None, *code_range)
                moves[k] = value - dequantize(current[start + k], size, None)
                local_pull[k + 1 :].addr_(local[k + 1 :, k], moves[k])
            pull.addmm_(hessian[:, block], moves)
        if torch.equal(before, current):
            break
    return current.to(torch.int8).T.contiguous()


@torch.no_grad()
def refit_row_scale(weight: Tensor, integers: Tensor, hessian: Tensor, row_scale: Tensor) -> Tensor:
    """Best scale of each row for given integers: ``t = (w^T H z) / (z^T H z)``.

    Args:
        weight: ``(out, K)``.
        integers: ``(out, K)``, multiplier times code, z above, columns as in ``weight``.
        hessian: ``(K, K)`` symmetric positive definite.
        row_scale: ``(out,)``, kept where the formula gives nothing positive (a zero row).

    Returns:
        float32 ``(out,)``.
    """
    integers = integers.double()
    projected = integers @ hessian.to(weight.device, torch.float64)
    power = (projected * integers).sum(1)
    best = (projected * weight.double()).sum(1) / torch.where(power > 0, power, 1.0)
    best = best.to(torch.float32)
    return torch.where(best > 0, best, row_scale)
