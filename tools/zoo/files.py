"""YAML that is read strictly and written so that a change of one number is one changed line."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from gplq_mm.checkpoint import atomic_write_text
from gplq_mm.errors import GPLQError

__all__ = ['ZooError', 'dump_yaml', 'read_yaml', 'write_yaml']

WIDTH = 100
TEXT = 'tag:yaml.org,2002:str'


class ZooError(GPLQError, RuntimeError):
    """A run, a metafile or a table that the zoo cannot use; the message names cause and mend."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping: the first would vanish silently."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f'the key {key!r} stands here twice', key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Lists are indented below their key, and the same object is written out each time."""

    def increase_indent(self, flow=False, indentless=False):
        return super().increase_indent(flow, False)

    def ignore_aliases(self, data):
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(TEXT, text, style='|' if '\n' in text else None),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Content of a YAML file whose top is a mapping; a missing or empty file is an empty mapping.

    Raises:
        ZooError: If it is no YAML, or holds a key twice; the message names the line.
    """
    if not path.exists():
        return {}
    try:
        content = yaml.load(path.read_text(encoding='utf-8'), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ZooError(f'{path} cannot be read, correct it: {error}') from error
    if content is not None and not isinstance(content, dict):
        raise ZooError(f'{path} holds a {type(content).__name__} instead of a mapping.')
    return content or {}


def dump_yaml(content: dict[str, Any]) -> str:
    """YAML text in the order of the keys; what holds no further list or mapping is one line."""
    return yaml.dump(
        content,
        Dumper=_Dumper,
        default_flow_style=None,
        sort_keys=False,
        allow_unicode=True,
        width=WIDTH,
    )


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    """Writes a file whole or not at all; comments at its top stay.

    Raises:
        OSError: If it cannot be written; the old file is intact.
    """
    old = path.read_text(encoding='utf-8') if path.exists() else ''
    head = re.match(r'(#.*\n)*', old)[0]
    atomic_write_text(path, head + dump_yaml(content))
