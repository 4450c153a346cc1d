"""How much the quantization of one layer alone changes what the network gives."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import all_reduce_sum
from ..layers import Compensation, quantizers_disabled
from .replay import Replay
from .sites import quant_sites, switched_on

# What a network gives for a batch: group -> tensors. 'logits', if there, are those of a classifier.
Outputs = Mapping[str, list[Tensor]]
PARTS = ('weights', 'activations')
EVERYTHING = ('', 'all')


class _Distance:
    """Distance of outputs from those of the float model, over all batches."""

    def __init__(self) -> None:
        # Noise and signal of every tensor of a group.
        self.groups: dict[str, Tensor] = {}
        self.kl = torch.zeros(2, dtype=torch.float64)

    def add(self, outputs: Outputs, exact: Outputs) -> None:
        for group, tensors in outputs.items():
            pairs = zip(tensors, exact[group], strict=True)
            powers = torch.stack([_powers(value, other) for value, other in pairs])
            self.groups[group] = self.groups.get(group, 0.0) + powers
        for value, other in zip(outputs.get('logits', ()), exact.get('logits', ()), strict=True):
            value, other = value.double().log_softmax(-1), other.double().log_softmax(-1)
            divergence = F.kl_div(value, other, reduction='sum', log_target=True)
            rows = value.shape[:-1].numel()
            self.kl += torch.stack((divergence, divergence.new_tensor(float(rows)))).cpu()

    def reduce(self) -> dict[str, float]:
        """Relative squared error by group, a mean over the group's tensors; and ``kl``."""
        result = {}
        for group, sums in self.groups.items():
            noise, signal = all_reduce_sum(sums).unbind(1)
            result[group] = float((noise / signal.clamp(min=1e-30)).mean())
        divergence, count = all_reduce_sum(self.kl).tolist()
        return {**result, 'kl': divergence / count} if count else result


def _powers(value: Tensor, exact: Tensor) -> Tensor:
    exact = exact.double()
    return torch.stack(((value.double() - exact).square().sum(), exact.square().sum())).cpu()


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
    distances = {case: _Distance() for case in cases}
    replay = Replay(model)
    with quantizers_disabled(model):
        for batch in batches:
            with replay.recorded():
                exact = observe(batch)
            step()
            for case, (path, modules) in cases.items():
                with replay.before(replay.unit_of(path)), switched_on(modules):
                    distances[case].add(observe(batch), exact)
                step()
    found = {case: distance.reduce() for case, distance in distances.items()}
    total = found.pop(EVERYTHING)
    sites: dict[str, dict] = {name: {} for name in quant_sites(model)}
    costs: dict[str, dict] = {name: {} for name in sites}
    for (name, part), errors in found.items():
        sites[name][part], costs[name][part] = errors, _cost(errors)
    return {
        'metric': 'kl' if 'kl' in total else 'relative_squared_error',
        'sites': sites,
        'all': total,
        'cost': costs,
        'all_cost': _cost(total),
    }


def _cases(model: nn.Module) -> dict[tuple[str, str], tuple[str, list[nn.Module]]]:
    """Site and part -> what is switched on, and the path of the module where it begins."""
    sites = quant_sites(model)
    cases = {
        (name, part): (site.path, site.quantizers(part == 'weights', part == 'activations'))
        for name, site in sites.items()
        for part in PARTS
        if part == 'activations' or site.has_quantized_weight
    }
    everything = [module for module in model.modules() if isinstance(module, Compensation)]
    for site in sites.values():
        everything += site.quantizers(weights=True, activations=True)
    return {**cases, EVERYTHING: ('', everything)}


def number_of_steps(model: nn.Module) -> int:
    """How often :func:`network_sensitivity` calls ``step`` a batch."""
    return len(_cases(model)) + 1


def _cost(errors: Mapping[str, float]) -> float:
    return errors['kl'] if 'kl' in errors else sum(errors.values())
