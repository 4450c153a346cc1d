"""A suggested policy as a config file."""

from collections.abc import Mapping
from typing import Any

__all__ = ['policy_source']

LINE = 96


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
    model = _source({'policy': {**delete, **policy}}, 0)
    return f'{head}_base_ = [{base!r}]\n\nmodel = {model}\n'


def _source(value: Any, indent: int) -> str:
    """Python source of plain data, wrapped."""
    if not isinstance(value, Mapping | list | tuple):
        return repr(value)
    flat = _flat(value)
    if len(flat) + indent <= LINE and not (isinstance(value, Mapping) and 'rules' in value):
        return flat
    inner = ' ' * (indent + 4)
    if isinstance(value, Mapping):
        items = [f'{key}={_source(item, indent + 4)}' for key, item in value.items()]
        opening, closing = 'dict(', ')'
    else:
        items = [_source(item, indent + 4) for item in value]
        opening, closing = '[', ']'
    body = ''.join(f'{inner}{item},\n' for item in items)
    return f'{opening}\n{body}{" " * indent}{closing}'


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return f'dict({", ".join(f"{key}={_flat(item)}" for key, item in value.items())})'
    if isinstance(value, list | tuple):
        return f'[{", ".join(map(_flat, value))}]'
    return repr(value)
