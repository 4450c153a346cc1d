"""From sensitivities and a budget to a policy of several widths, and the config of it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pprint import pformat
from typing import Any

from torch import nn

from ..progress import show_steps
from ..ptq import RoundToNearest
from .allocation import BudgetError, allocate
from .sites import quant_sites, weighted_sites
from .sizes import code_sizes, other_bytes, weight_counts
from .widths import activation_noise, weight_noise

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
        BudgetError: If no widths meet it; the message names what can be reached.
    """

    sizes: Mapping[str, Mapping[int, float]]
    limit: float
    now: float
    describe: Callable[[float], str]

    def __post_init__(self):
        least, most = (sum(pick(s.values()) for s in self.sizes.values()) for pick in (min, max))
        if not self.limit >= least:
            raise BudgetError(
                f'the budget of {self.describe(self.limit)} is out of reach: with the widths at '
                f'hand {self.describe(least)} to {self.describe(most)} are possible. (Without a '
                'budget, the size of the model as it is counts as one.)'
            )

    @property
    def widths(self) -> list[int]:
        """Bits to choose from, in order."""
        return sorted({bits for size in self.sizes.values() for bits in size})

    def spend(
        self,
        cost: Mapping[str, float],
        noise: Mapping[str, Mapping[int, float]],
        now: Mapping[str, int | Mapping[str, int]],
    ) -> dict:
        """The widths of least predicted cost, as :func:`suggest_policy` describes them.

        Args:
            cost: What every layer costs as it is.
            noise: Layer -> bits -> power of its rounding error; the key 0 stands for the layer as
                it is. The cost at another width is taken as proportional to it.
            now: Present bits of every layer.
        """
        names = list(self.sizes)
        costs = [
            {bits: cost[n] * noise[n][bits] / max(noise[n][0], 1e-30) for bits in self.sizes[n]}
            for n in names
        ]
        chosen = allocate(costs, [self.sizes[name] for name in names], self.limit)
        size = sum(self.sizes[name][bits] for name, bits in zip(names, chosen, strict=True))
        return {
            'bits': dict(zip(names, chosen, strict=True)),
            'now': dict(now),
            'cost': sum(value[bits] for value, bits in zip(costs, chosen, strict=True)),
            'cost_now': sum(cost[name] for name in names),
            'budget': self.describe(self.limit),
            'size': self.describe(size),
            'size_now': self.describe(self.now),
        }


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
    counts = weight_counts(model)
    now = {name: site.weight_bits for name, site in weighted_sites(model).items()}
    if megabytes is None:
        size_now = sum(counts[name] * width for name, width in now.items())
        return _mean_budget(counts, widths, bits, size_now, 'a weight')
    other = other_bytes(model)
    sizes = code_sizes(model, {*widths, *now.values()})
    return Budget(
        {name: {width: size[width] for width in widths} for name, size in sizes.items()},
        megabytes * MEGABYTE - other,
        sum(sizes[name][width] for name, width in now.items()),
        lambda size: f'{(size + other) / MEGABYTE:.3f} MB',
    )


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
    parts: dict[str, dict | None] = {'weights': None, 'activations': None}
    steps = (len(weights.sizes) if weights else 0) + (len(sites) if activations else 0)
    with show_steps(steps, 'rounding errors at other widths') as step:
        for part, budget in (('weights', weights), ('activations', activations)):
            if budget is None:
                continue
            if part == 'weights':
                now = {name: site.weight_bits for name, site in weighted_sites(model).items()}
                noise = weight_noise(model, budget.widths, RoundToNearest(), step)
            else:
                now = {name: site.act_bits for name, site in sites.items()}
                noise = activation_noise(model, batch, forward, budget.widths, step)
            cost = {name: sensitivity['cost'][name][part] for name in budget.sizes}
            parts[part] = budget.spend(cost, noise, now)
    kinds = {name: site.kind for name, site in sites.items()}
    rules = policy_rules(kinds, _changed(parts['weights']), _changed(parts['activations']))
    return {**parts, 'policy': {**policy, 'rules': [*policy.get('rules', ()), *rules]}}


def _changed(part: Mapping[str, Mapping] | None) -> dict[str, int]:
    """Layers with another width than now."""
    if part is None:
        return {}
    now = {name: v.values() if isinstance(v, Mapping) else [v] for name, v in part['now'].items()}
    return {name: bits for name, bits in part['bits'].items() if set(now[name]) != {bits}}


def policy_rules(
    kinds: Mapping[str, str], weights: Mapping[str, int], activations: Mapping[str, int]
) -> list[dict]:
    """Rules of a :class:`gplq_mm.quant.QuantPolicy` that give layers their widths.

    Args:
        kinds: Layer -> ``'linear'``, ``'conv'`` or ``'attention'``; rules come in this order.
        weights: Layer -> bits of its weight.
        activations: Layer -> bits of its input, or of all operands of an attention.
    """
    rules = []
    for name, kind in kinds.items():
        bits = {'weight': weights.get(name), 'activation': activations.get(name)}
        rule = {part: {'bits': width} for part, width in bits.items() if width is not None}
        if rule:
            operands = r'\.(q|k|v|probs)' if kind == 'attention' else ''
            rules.append({'pattern': f'^{re.escape(name)}{operands}$', **rule})
    return rules


def policy_source(
    policy: Mapping[str, Any], base: str, comments: list[str], replaces: bool = True
) -> str:
    """Source of a config that takes everything from another one but the policy.

    Args:
        policy: Arguments of a :class:`gplq_mm.quant.QuantPolicy`.
        base: The other config, as ``_base_`` names it.
        comments: Lines to begin with.
        replaces: Whether the other config has a policy, in whose place this one comes.
    """
    head = ''.join(f'# {line}\n' for line in comments)
    delete = {'_delete_': True} if replaces else {}
    model = pformat({'policy': {**delete, **policy}}, width=88, sort_dicts=False)
    return f'{head}_base_ = [{base!r}]\n\nmodel = {model}\n'
