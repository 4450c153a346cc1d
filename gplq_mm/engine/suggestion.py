"""From sensitivities and a budget to a policy of several widths."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..evaluation import (
    Site,
    activation_noise,
    code_sizes,
    costs_at,
    other_bytes,
    policy_rules,
    quant_sites,
    require_reachable,
    suggest_widths,
    weight_counts,
    weight_noise,
)
from ..ptq import RoundToNearest
from .progress import show_steps

__all__ = ['Budget', 'activation_budget', 'suggest_policy', 'weight_budget']

MEGABYTE = 1e6


@dataclass(frozen=True)
class Budget:
    """What the widths of weights, or those of activations, may add up to.

    Attributes:
        sizes: Layer -> bits -> size, for the widths to choose from.
        limit: Largest sum of sizes.
        now: Sum of sizes of the model as it is.
        describe: Turns a size into words.

    Raises:
        BudgetError: If it is out of reach.
    """

    sizes: Mapping[str, Mapping[int, float]]
    limit: float
    now: float
    describe: Callable[[float], str]

    def __post_init__(self):
        require_reachable(self.sizes, self.limit, self.describe)


def weight_budget(
    model: nn.Module,
    widths: tuple[int, ...],
    megabytes: float | None = None,
    bits: float | None = None,
) -> Budget:
    """Budget of the weights of a quantized model.

    Args:
        model: Quantized model.
        widths: Bits to choose from.
        megabytes: Size of the packed file without header and compensations, in 10^6 bytes.
        bits: Otherwise, mean width of the weights; None for that of the model as it is.

    Raises:
        BudgetError: If it is out of reach.
    """
    now = _weight_bits(quant_sites(model))
    if megabytes is not None:
        other = other_bytes(model)
        sizes = code_sizes(model, {*widths, *now.values()})
        return Budget(
            {name: {width: size[width] for width in widths} for name, size in sizes.items()},
            megabytes * MEGABYTE - other,
            sum(sizes[name][width] for name, width in now.items()),
            lambda size: f'{(size + other) / MEGABYTE:.3f} MB',
        )
    counts = weight_counts(model)
    size_now = sum(counts[name] * width for name, width in now.items())
    return _mean_budget(counts, widths, bits, size_now, 'a weight')


def activation_budget(
    model: nn.Module,
    statistics: Mapping[str, Mapping],
    widths: tuple[int, ...],
    bits: float | None = None,
) -> Budget:
    """Budget of the activations: their mean width over all values that pass a quantizer.

    Args:
        model: Quantized model.
        statistics: Result of ``activation_statistics``.
        widths: Bits to choose from. All operands of an attention get the same.
        bits: Mean width; None for that of the model as it is.

    Raises:
        BudgetError: If it is out of reach.
    """
    counts = {
        name: sum(statistics[f'{name}.{operand}']['values'] for operand in site.activations)
        for name, site in quant_sites(model).items()
    }
    size_now = sum(value['values'] * value['bits'] for value in statistics.values())
    return _mean_budget(counts, widths, bits, size_now, 'an activation')


def _mean_budget(
    counts: Mapping[str, int], widths: tuple[int, ...], bits: float | None, now: float, unit: str
) -> Budget:
    total = sum(counts.values())
    return Budget(
        {name: {width: width * count for width in widths} for name, count in counts.items()},
        now if bits is None else bits * total,
        now,
        lambda size: f'{size / total:.2f} bits {unit}',
    )


def _weight_bits(sites: Mapping[str, Site]) -> dict[str, int]:
    return {name: site.weight_bits for name, site in sites.items() if site.weight is not None}


def suggest_policy(
    model: nn.Module,
    policy: Mapping[str, Any],
    batch: Any,
    forward: Callable[[Any], Any],
    sensitivity: Mapping[str, Any],
    weights: Budget | None,
    activations: Budget | None,
) -> dict:
    """Widths of least predicted cost within the budgets, and the policy that gives them.

    Args:
        model: Quantized model in eval mode.
        policy: Arguments of its :class:`gplq_mm.quant.QuantPolicy`.
        batch: Some images.
        forward: Runs the model on them.
        sensitivity: Result of ``network_sensitivity`` for this model.
        weights: Budget of the weights; None leaves them as they are.
        activations: The same of activations.

    Returns:
        ``weights`` and ``activations``: ``bits`` by layer, ``now`` (those of today, of an
        attention by operand), ``cost`` (predicted) and ``cost_now`` (measured), sums over layers,
        and ``budget``, ``size``, ``size_now`` in words; or None. ``policy``: arguments of the new
        policy.
    """
    sites = quant_sites(model)
    result: dict[str, Any] = {'weights': None, 'activations': None}
    kept: set[tuple[str, str]] = set()
    steps = (len(weights.sizes) if weights else 0) + (len(sites) if activations else 0)
    with show_steps(steps, 'rounding errors at other widths') as step:
        if weights is not None:
            now = _weight_bits(sites)
            noise = weight_noise(model, _widths(weights), RoundToNearest(), step)
            costs = {
                name: costs_at(sensitivity['cost'][name]['weights'], noise[name], now[name])
                for name in weights.sizes
            }
            result['weights'] = _chosen(weights, costs, now, sensitivity, 'weights')
            kept |= {
                (name, 'weights')
                for name, bits in result['weights']['bits'].items()
                if bits == now[name]
            }
        if activations is not None:
            now = {name: site.act_bits for name, site in sites.items()}
            noise = activation_noise(model, batch, forward, _widths(activations), step)
            costs = {
                name: costs_at(sensitivity['cost'][name]['activations'], noise[name], 0)
                for name in activations.sizes
            }
            result['activations'] = _chosen(activations, costs, now, sensitivity, 'activations')
            kept |= {
                (name, 'activations')
                for name, bits in result['activations']['bits'].items()
                if set(now[name].values()) == {bits}
            }
    rules = policy_rules(
        {name: site.kind for name, site in sites.items()},
        (result['weights'] or {}).get('bits', {}),
        (result['activations'] or {}).get('bits', {}),
        kept,
    )
    result['policy'] = {**policy, 'rules': [*policy.get('rules', ()), *rules]}
    return result


def _widths(budget: Budget) -> list[int]:
    return sorted({bits for size in budget.sizes.values() for bits in size})


def _chosen(
    budget: Budget, costs: Mapping, now: Mapping, sensitivity: Mapping[str, Any], part: str
) -> dict:
    found = suggest_widths(costs, budget.sizes, budget.limit)
    return {
        'bits': found['bits'],
        'now': dict(now),
        'cost': found['cost'],
        'cost_now': sum(sensitivity['cost'][name][part] for name in budget.sizes),
        'budget': budget.describe(budget.limit),
        'size': budget.describe(found['size']),
        'size_now': budget.describe(budget.now),
    }
