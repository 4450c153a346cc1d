"""From a config to a PTQ method."""

from collections.abc import Callable

from ..registry import WEIGHT_PTQ, build_registered


def build_weight_ptq(cfg: dict) -> Callable:
    """Builds a weight PTQ method.

    Args:
        cfg: ``dict(type='GPTQ', ...)`` with the method's options. Not changed.

    Returns:
        ``method(weight, spec, permutation, second_moment) -> QuantizedWeight``; its
        ``needs_second_moment`` says whether the last argument may be None. If it has
        ``reconstruct(unit)``, that is called for every :class:`.unit.Unit` afterwards.

    Raises:
        SettingError: For an unknown type, or an option out of range or unknown.
    """
    return build_registered(WEIGHT_PTQ, cfg)
