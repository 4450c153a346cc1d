"""A policy of several widths, from the sensitivity of every layer and a budget."""

import re
from collections.abc import Callable, Iterable, Mapping

from .allocation import BudgetError, allocate

__all__ = ['costs_at', 'policy_rules', 'require_reachable', 'suggest_widths']


def costs_at(cost: float, noise: Mapping[int, float], now: int) -> dict[int, float]:
    """Cost of a layer at every width: what was measured, by the power of the rounding error.

    Args:
        cost: What the layer costs as it is.
        noise: Bits -> power of its rounding error.
        now: Key of ``noise`` that stands for the layer as it is.
    """
    own = max(noise[now], 1e-30)
    return {bits: cost * value / own for bits, value in noise.items() if bits}


def require_reachable(
    sizes: Mapping[str, Mapping[int, float]], budget: float, describe: Callable[[float], str]
) -> None:
    """Raises BudgetError if no widths meet a budget; the message names what can be reached.

    Args:
        sizes: Layer -> bits -> size.
        budget: Largest sum of sizes.
        describe: Turns a size into words.
    """
    least, most = (sum(pick(size.values()) for size in sizes.values()) for pick in (min, max))
    if not budget >= least:
        raise BudgetError(
            f'the budget of {describe(budget)} is out of reach: with the widths at hand '
            f'{describe(least)} to {describe(most)} are possible. (Without a budget, the size '
            'of the model as it is counts as one.)'
        )


def suggest_widths(
    costs: Mapping[str, Mapping[int, float]],
    sizes: Mapping[str, Mapping[int, float]],
    budget: float,
) -> dict:
    """The widths of least cost within a budget.

    Args:
        costs: Layer -> bits -> cost; may know more widths than ``sizes``.
        sizes: Layer -> bits -> size, for the widths to choose from.
        budget: Largest sum of sizes.

    Returns:
        ``bits``: layer -> bits; ``size`` and ``cost``, their sums (of cost the predicted one).

    Raises:
        BudgetError: If no widths meet the budget.
    """
    names = list(sizes)
    choices = [{bits: costs[name][bits] for bits in sizes[name]} for name in names]
    chosen = allocate(choices, [sizes[name] for name in names], budget)
    bits = dict(zip(names, chosen, strict=True))
    return {
        'bits': bits,
        'size': sum(sizes[name][width] for name, width in bits.items()),
        'cost': sum(costs[name][width] for name, width in bits.items()),
    }


def policy_rules(
    kinds: Mapping[str, str],
    weights: Mapping[str, int],
    activations: Mapping[str, int],
    unchanged: Iterable[tuple[str, str]] = (),
) -> list[dict]:
    """Rules of a :class:`gplq_mm.quant.QuantPolicy` that give layers their widths.

    Args:
        kinds: Layer -> ``'linear'``, ``'conv'`` or ``'attention'``; rules come in this order.
        weights: Layer -> bits of its weight.
        activations: Layer -> bits of its input, or of all operands of an attention.
        unchanged: ``(layer, 'weights' or 'activations')`` that have their width already.
    """
    unchanged = set(unchanged)
    rules = []
    for name, kind in kinds.items():
        rule = {}
        if name in weights and (name, 'weights') not in unchanged:
            rule['weight'] = {'bits': weights[name]}
        if name in activations and (name, 'activations') not in unchanged:
            rule['activation'] = {'bits': activations[name]}
        if rule:
            operands = r'\.(q|k|v|probs)' if kind == 'attention' else ''
            rules.append({'pattern': f'^{re.escape(name)}{operands}$', **rule})
    return rules
