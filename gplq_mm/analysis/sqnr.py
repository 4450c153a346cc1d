"""Signal-to-quantization-noise ratio at the output of every layer."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluation import ErrorSums
from ..layers import QuantAttention, QuantWeightLayer, quantizers_disabled
from .sites import Site, quant_sites, switched_on

# What is quantized -> (weights, activations).
CASES = {'weights': (True, False), 'activations': (False, True), 'both': (True, True)}


@torch.no_grad()
def layer_sqnr(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], Any]
) -> dict[str, dict]:
    """Error that the quantization of a layer causes at its own output.

    Every layer gets the input that it has in the float model, so errors of different layers do
    not mix, and one pass serves all layers and cases. With weights alone the input is not rounded,
    and the bias is the one that Stage 2 has corrected for the mean rounding error.

    Args:
        model: Quantized and calibrated model in eval mode. Before Stage 2 activations alone are
            measured.
        batches: This rank's images; batches may differ in size.
        forward: Runs the model on a batch.

    Returns:
        Name of the layer -> case (``'weights'``, ``'activations'``, ``'both'``) -> ``mae``,
        ``mse``, ``sqnr_db`` and ``relative_l2`` of :class:`ErrorSums`. An attention, named as the
        layer is, has the case ``'activations'`` only. A layer that no batch reaches is left out.

    Raises:
        NotCalibratedError: If an activation quantizer has no scale.
    """
    sums: dict[str, dict[str, ErrorSums]] = {}

    def compare(site: Site, output: Tensor, compute: Callable[[], Tensor]) -> None:
        for case, part in sums[site.name].items():
            with switched_on(site.quantizers(*CASES[case])):
                part.add(compute(), output)

    with quantizers_disabled(model), ExitStack() as stack:
        for name, site in quant_sites(model).items():
            cases = CASES if site.has_quantized_weight else ('activations',)
            sums[name] = {case: ErrorSums() for case in cases}
            watch = _watch_attention if site.kind == 'attention' else _watch_layer
            stack.callback(watch(site, compare))
        for batch in batches:
            forward(batch)
    results = {
        name: {case: part.reduce() for case, part in cases.items()} for name, cases in sums.items()
    }
    return {
        name: cases
        for name, cases in results.items()
        if any(error['relative_l2'] is not None or error['mse'] > 0 for error in cases.values())
    }


def _watch_layer(site: Site, compare: Callable) -> Callable[[], None]:
    def see(layer: QuantWeightLayer, args: tuple, output: Tensor) -> None:
        # Not through __call__: that would come back here.
        compare(site, output, lambda: layer.forward(args[0]))

    return site.module.register_forward_hook(see).remove


def _watch_attention(site: Site, compare: Callable) -> Callable[[], None]:
    attention: QuantAttention = site.module
    attend = attention.attend

    def see(*args, **kwargs) -> Tensor:
        output = attend(*args, **kwargs)
        compare(site, output, lambda: attend(*args, **kwargs))
        return output

    # Some attentions call the method, others the module, which calls the method.
    attention.__dict__['attend'] = see
    return lambda: attention.__dict__.pop('attend')
