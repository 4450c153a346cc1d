"""Where the weight scales of direct QAT start."""

import torch
from torch import Tensor, nn

from ..distributed import broadcast_
from ..errors import SettingError
from ..layers import quant_layers
from ..quant import WeightSpec
from .rounding import to_stored_order
from .scales import search_group_scales, search_row_scale


def lsq_scale(weight: Tensor, spec: WeightSpec) -> Tensor:
    """``2 * mean|w| / sqrt(qmax)`` of every row (LSQ, section 2.1).

    Args:
        weight: ``(out, K)``.
        spec: Says the bits.

    Returns:
        float32 ``(out,)``, real value per integer step, 1 for a row of zeros.
    """
    scale = 2 * weight.float().abs().mean(1) / spec.code_range[1] ** 0.5
    return torch.where(scale > 0, scale, 1.0)


@torch.no_grad()
def init_learned_weights(model: nn.Module, init: str = 'observer') -> None:
    """Gives every learned weight quantizer its scales from the weights as they are.

    Args:
        model: Quantized model with learned weight quantizers and calibrated activations.
        init: ``'observer'``: the scale search of the policy's ``weight.observer``, as for
            rounding to nearest; ``'lsq'``: LSQ's own rule, for the raw layout only.

    Raises:
        SettingError: For an unknown rule, or LSQ's in the folded layout.
    """
    if init not in ('observer', 'lsq'):
        raise SettingError(f'direct.init={init!r} is not one of observer, lsq.')
    for name, layer in quant_layers(model).items():
        learned = layer.weight_quantizer.learned
        matrix, permutation = layer.foldable()
        spec, multiplier = learned.spec, learned.multiplier
        if init == 'lsq' and layer.is_folded:
            raise SettingError(
                f'{name}: LSQ knows no groups; set direct.init="observer", or '
                'policy.weight.layout="raw".'
            )
        if learned.granularity == 'tensor':
            rows = matrix.reshape(1, -1)
            scale = lsq_scale(rows, spec) if init == 'lsq' else search_row_scale(rows, spec)
        elif init == 'lsq':
            scale = lsq_scale(matrix, spec)
        else:
            stored, permutation, _ = to_stored_order(matrix, permutation, None)
            scale, multiplier = search_group_scales(stored, spec)
        learned.initialize(scale, multiplier, permutation)
        broadcast_([learned.unit, learned.multiplier, learned.permutation])
