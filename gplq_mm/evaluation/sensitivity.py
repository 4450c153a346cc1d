"""How much the quantization of one layer alone changes what the network gives."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import all_reduce_sum
from ..layers import Compensation, quantizers_disabled
from .replay import Replay
from .sites import quant_sites

__all__ = ['Outputs', 'network_sensitivity']

# What a network gives for a batch: group -> tensors. 'logits', if there, are those of a classifier.
Outputs = Mapping[str, list[Tensor]]
PARTS = ('weights', 'activations')


class _Distance:
    """Distance of outputs from those of the float model, over all batches."""

    def __init__(self) -> None:
        self.groups: dict[str, Tensor] = {}
        self.kl = torch.zeros(2, dtype=torch.float64)

    def add(self, outputs: Outputs, exact: Outputs) -> None:
        for group, tensors in outputs.items():
            pairs = zip(tensors, exact[group], strict=True)
            sums = torch.stack([_powers(value, other) for value, other in pairs])
            known = self.groups.get(group)
            self.groups[group] = sums if known is None else known + sums
        if 'logits' in outputs:
            for value, other in zip(outputs['logits'], exact['logits'], strict=True):
                divergence = F.kl_div(
                    value.double().log_softmax(-1),
                    other.double().log_softmax(-1),
                    reduction='sum',
                    log_target=True,
                )
                rows = float(value.shape[:-1].numel())
                self.kl += torch.stack((divergence, divergence.new_tensor(rows))).cpu()

    def reduce(self) -> dict[str, float]:
        """Relative squared error by group, a mean over the group's tensors; and ``kl``."""
        result = {}
        for group, sums in self.groups.items():
            noise, signal = all_reduce_sum(sums).unbind(1)
            result[group] = float((noise / signal.clamp(min=1e-30)).mean())
        divergence, count = all_reduce_sum(self.kl).tolist()
        if count:
            result['kl'] = divergence / count
        return result


def _powers(value: Tensor, exact: Tensor) -> Tensor:
    exact = exact.double()
    difference = value.double() - exact
    return torch.stack((difference.square().sum(), exact.square().sum())).cpu()


@torch.no_grad()
def network_sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    observe: Callable[[Any], Outputs],
    step: Callable[[], Any] = lambda: None,
) -> dict:
    """Quantizes one layer at a time, the others in float, and compares the network's output.

    For every batch the float model runs once. For a layer it then runs from the layer's block on,
    everything before is replayed; on average that is half a forward for the weight of a layer and
    half a one for its activations.

    Args:
        model: Quantized and calibrated model in eval mode. Before Stage 2 activations alone are
            measured.
        batches: This rank's images; batches may differ in size.
        observe: Runs the model on a batch and returns what counts of it. It is called again for
            the same batch, and must then use what the model computes the same way.
        step: Called after every forward, :func:`number_of_steps` times a batch.

    Returns:
        ``sites``: name -> ``'weights'`` and ``'activations'`` -> group of outputs -> squared
        error relative to the square of the float model's, and ``kl``, the Kullback-Leibler
        divergence from the float model's class probabilities in nats, where there are logits;
        ``all``: the same with everything quantized, and compensated if the model is; ``cost``: name
        -> part -> the figure to rank by (``kl``, or the sum over groups), and ``metric``: its
        name.

    Raises:
        NotCalibratedError: If an activation quantizer has no scale.
    """
    cases = _cases(model)
    sites = quant_sites(model)
    distances = {case: _Distance() for case in cases}
    everything = _Distance()
    replay = Replay(model)
    with quantizers_disabled(model):
        for batch in batches:
            with replay.recorded():
                exact = observe(batch)
            step()
            for name, part in cases:
                site = sites[name]
                with (
                    replay.before(replay.unit_of(site.path)),
                    site.quantized(part == 'weights', part == 'activations'),
                ):
                    distances[name, part].add(observe(batch), exact)
                step()
            everything.add(_all_quantized(model, observe, batch), exact)
            step()
    replay.clear()
    result: dict[str, dict] = {name: {} for name in sites}
    for (name, part), distance in distances.items():
        result[name][part] = distance.reduce()
    total = everything.reduce()
    return {
        'metric': 'kl' if 'kl' in total else 'relative_squared_error',
        'sites': result,
        'all': total,
        'cost': {
            name: {part: _cost(errors) for part, errors in parts.items()}
            for name, parts in result.items()
        },
        'all_cost': _cost(total),
    }


def _cases(model: nn.Module) -> list[tuple[str, str]]:
    return [
        (name, part)
        for name, site in quant_sites(model).items()
        for part in PARTS
        if part == 'activations' or site.has_quantized_weight
    ]


def number_of_steps(model: nn.Module) -> int:
    """How often :func:`network_sensitivity` calls ``step`` a batch."""
    return len(_cases(model)) + 2


def _all_quantized(model: nn.Module, observe: Callable[[Any], Outputs], batch: Any) -> Outputs:
    modules = [module for module in model.modules() if isinstance(module, Compensation)]
    for site in quant_sites(model).values():
        modules += site.activations.values()
        if site.has_quantized_weight:
            modules.append(site.weight)
    for module in modules:
        module.enabled = True
    try:
        return observe(batch)
    finally:
        for module in modules:
            module.enabled = False


def _cost(errors: Mapping[str, float]) -> float:
    return errors['kl'] if 'kl' in errors else sum(errors.values())
