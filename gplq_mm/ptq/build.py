"""From a config to a PTQ method."""

from collections.abc import Callable

from ..registry import WEIGHT_PTQ

__all__ = ['build_weight_ptq']


def build_weight_ptq(cfg: dict) -> Callable:
    """Builds a weight PTQ method.

    Args:
        cfg: ``dict(type='GPTQ', ...)`` with the method's options. Not changed.

    Returns:
        ``method(weight, spec, permutation, second_moment) -> QuantizedWeight``; its
        ``needs_second_moment`` says whether the last argument may be None.

    Raises:
        KeyError: For an unknown type.
        ValueError, TypeError: For an option out of range or unknown.
    """
    # A runner's default scope (mmpretrain, mmdet) has no PTQ methods; without a scope of its own
    # the look-up would warn about that on every build.
    return WEIGHT_PTQ.build({'_scope_': 'gplq_mm', **cfg})
