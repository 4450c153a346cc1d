"""RepQ-ViT's scale reparametrization: per-channel calibration, per-tensor quantization.

Source: Li et al., "RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision
Transformers", ICCV 2023, eq. 4-8. The output of a LayerNorm differs so much between channels
that one scale does not fit, but its own affine map can bring all channels to one scale, and the
next linear layer undoes that. Here codes stand for ``x_hat = scale * q + offset``, so the
paper's zero-point is ``z = -offset / scale``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Reparametrization(NamedTuple):
    """Result of :func:`reparametrize`, in the dtype of the norm's weight.

    Attributes:
        norm_weight: ``(C,)``.
        norm_bias: ``(C,)``.
        linears: Weight ``(out, C)`` and bias ``(out,)`` of each linear layer.
        scale: Scalar, real value per integer step of the whole tensor.
        offset: Scalar, real value of code 0.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    linears: list[tuple[Tensor, Tensor]]
    scale: Tensor
    offset: Tensor


@torch.no_grad()
def reparametrize(
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linears: Sequence[tuple[Tensor, Tensor | None]],
    scale: Tensor,
    offset: Tensor | None = None,
) -> Reparametrization:
    """Moves the spread of per-channel quantization parameters into the layers around.

    With ``s~ = mean(s)``, ``z~ = mean(z)``, ``r1 = s / s~`` and ``r2 = z - z~`` the normalised
    tensor becomes ``(x + s * r2) / r1`` (eq. 5, 6), whose codes on the one grid (s~, z~) are
    those of x on the grids (s, z); the linear weight becomes ``r1 * W`` and its bias
    ``b - W (s * r2)`` (eq. 7, 8).

    Args:
        norm_weight: ``(C,)`` affine weight of the LayerNorm.
        norm_bias: ``(C,)`` or None for zeros.
        linears: Weight ``(out, C)`` and bias ``(out,)`` (None for zeros) of every layer that
            reads the LayerNorm's output.
        scale: ``(C,)``, real value per integer step of each channel, positive.
        offset: ``(C,)``, real value of each channel's code 0, or None for zeros.

    Returns:
        New parameters; the float function is the same.

    Raises:
        ValueError: If shapes do not agree, or a scale is not positive and finite.
    """
    channels = norm_weight.shape
    for name, value in (('norm bias', norm_bias), ('scale', scale), ('offset', offset)):
        if value is not None and value.shape != channels:
            raise ValueError(f'{name} must have shape {tuple(channels)}, got {tuple(value.shape)}.')
    for weight, _ in linears:
        if weight.dim() != 2 or weight.shape[1:] != channels:
            raise ValueError(
                f'a linear weight of shape {tuple(weight.shape)} does not read '
                f'{channels[0]} channels.'
            )
    if not (scale.isfinite().all() and (scale > 0).all()):
        raise ValueError('scales must be positive and finite.')
    # Codes sit next to rounding boundaries: everything in float64, cast once at the end.
    dtype = norm_weight.dtype
    scale = scale.double()
    zero_point = torch.zeros_like(scale) if offset is None else -offset.double() / scale
    new_scale, new_zero_point = scale.mean(), zero_point.mean()
    ratio = scale / new_scale
    shift = scale * (zero_point - new_zero_point)
    bias = torch.zeros_like(scale) if norm_bias is None else norm_bias.double()
    new_linears = []
    for weight, linear_bias in linears:
        moved = -(weight.double() @ shift)
        if linear_bias is not None:
            moved += linear_bias.double()
        new_linears.append(((weight.double() * ratio).to(dtype), moved.to(dtype)))
    return Reparametrization(
        (norm_weight.double() / ratio).to(dtype),
        ((bias + shift) / ratio).to(dtype),
        new_linears,
        new_scale.to(dtype),
        (-new_scale * new_zero_point).to(dtype),
    )


def _set_bias(module: nn.Module, value: Tensor) -> None:
    if module.bias is not None:
        module.bias.data.copy_(value)
    elif value.any():
        # Nobody trains it: the optimizer may have been built before.
        module.bias = nn.Parameter(value, requires_grad=False)


@torch.no_grad()
def reparametrize_(
    norm: nn.LayerNorm,
    linears: Sequence[nn.Linear],
    scale: Tensor,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Applies :func:`reparametrize` to modules in place.

    A module without a bias gets one if it needs one (only with an offset). A checkpoint then has
    an entry that the float model lacks: :func:`gplq_mm.checkpoint.adopt_biases`.

    Args:
        norm: LayerNorm over the last dimension, with an affine weight.
        linears: All layers that read its output; one left out would see a changed input.
        scale: ``(C,)``, real value per integer step of each channel.
        offset: ``(C,)``, real value of each channel's code 0, or None for zeros.

    Returns:
        Scale and offset of the whole tensor, scalars.

    Raises:
        ValueError: If the norm has no affine weight, no layer is given, or as in
            :func:`reparametrize`.
    """
    if norm.weight is None:
        raise ValueError('a LayerNorm without affine weight cannot take over the scales.')
    if not linears:
        raise ValueError('give the linear layers that read the output of the LayerNorm.')
    result = reparametrize(
        norm.weight,
        norm.bias,
        [(linear.weight, linear.bias) for linear in linears],
        scale,
        offset,
    )
    norm.weight.data.copy_(result.norm_weight)
    _set_bias(norm, result.norm_bias)
    for linear, (weight, bias) in zip(linears, result.linears, strict=True):
        linear.weight.data.copy_(weight)
        _set_bias(linear, bias)
    return result.scale, result.offset
