"""RepQ-ViT's scale reparametrization: per-channel calibration, per-tensor quantization.

Source: Li et al., "RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision
Transformers", ICCV 2023, eq. 4-8. The output of a LayerNorm differs so much between channels
that one scale does not fit, but its own affine map can bring all channels to one scale, and the
next linear layer undoes that. Here codes stand for ``x_hat = scale * q + offset``, so the
paper's zero-point is ``z = -offset / scale``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def reparametrize(
    norm: nn.LayerNorm,
    linears: Sequence[nn.Linear],
    scale: Tensor,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Moves the spread of per-channel quantization parameters into the layers around, in place.

    With ``s~ = mean(s)``, ``z~ = mean(z)``, ``r1 = s / s~`` and ``r2 = z - z~`` the normalised
    tensor becomes ``(x + s * r2) / r1`` (eq. 5, 6), whose codes on the one grid (s~, z~) are
    those of x on the grids (s, z); the linear weight becomes ``r1 * W`` and its bias
    ``b - W (s * r2)`` (eq. 7, 8). The float function is the same.

    A module without a bias gets one if it needs one (only with an offset). A checkpoint then has
    an entry that the float model lacks: :func:`gplq_mm.checkpoint.adopt_biases`.

    Args:
        norm: LayerNorm over the last dimension, with an affine weight ``(C,)``.
        linears: All layers that read its output; one left out would see a changed input.
        scale: ``(C,)``, real value per integer step of each channel, positive.
        offset: ``(C,)``, real value of each channel's code 0, or None for zeros.

    Returns:
        Scale and offset of the whole tensor, scalars.

    Raises:
        ValueError: If the norm has no affine weight, no layer is given, shapes do not agree, or a
            scale is not positive and finite.
    """
    if norm.weight is None:
        raise ValueError('a LayerNorm without affine weight cannot take over the scales.')
    if not linears:
        raise ValueError('give the linear layers that read the output of the LayerNorm.')
    channels, dtype = norm.weight.shape, norm.weight.dtype
    for name, value in (('scale', scale), ('offset', offset)):
        if value is not None and value.shape != channels:
            raise ValueError(f'{name} must have shape {tuple(channels)}, got {tuple(value.shape)}.')
    for linear in linears:
        if linear.weight.shape[1:] != channels:
            raise ValueError(
                f'a linear weight of shape {tuple(linear.weight.shape)} does not read '
                f'{channels[0]} channels.'
            )
    if not (scale.isfinite().all() and (scale > 0).all()):
        raise ValueError('scales must be positive and finite.')
    # Codes sit next to rounding boundaries: everything in float64, cast once at the end.
    scale = scale.double()
    zero_point = torch.zeros_like(scale) if offset is None else -offset.double() / scale
    new_scale, new_zero_point = scale.mean(), zero_point.mean()
    ratio = scale / new_scale
    shift = scale * (zero_point - new_zero_point)
    for linear in linears:
        moved = -(linear.weight.double() @ shift)
        _set_bias(linear, moved if linear.bias is None else moved + linear.bias.double())
        linear.weight.copy_(linear.weight.double() * ratio)
    bias = shift if norm.bias is None else norm.bias.double() + shift
    _set_bias(norm, bias / ratio)
    norm.weight.copy_(norm.weight.double() / ratio)
    return new_scale.to(dtype), (-new_scale * new_zero_point).to(dtype)


def _set_bias(module: nn.Module, value: Tensor) -> None:
    value = value.to(module.weight.dtype)
    if module.bias is not None:
        module.bias.copy_(value)
    elif value.any():
        # Nobody trains it: the optimizer may have been built before.
        module.bias = nn.Parameter(value, requires_grad=False)
