"""Markdown pages whose tables are generated between markers.

A table stands between two lines of its page::

    <!-- zoo: NAME -->
    <!-- /zoo -->
"""

import difflib
import re
from pathlib import Path

from gplq_mm.checkpoint import atomic_write_text

from .files import ZooError
from .metafile import load_zoo
from .tables import load_layouts, make_table

__all__ = ['check_pages', 'write_pages']

PAGES = ('*.md', 'configs/**/*.md', 'docs/**/*.md')
# Markers within fenced code are examples; a marker that is no part of a pair is an error.
BLOCK = re.compile(
    r'^ {0,3}(?P<fence>`{3,}|~{3,}).*?\n {0,3}(?P=fence)'
    r'|^<!-- zoo: (?P<name>\S+) -->\n(?P<body>(?:(?!<!-- /?zoo).)*)^<!-- /zoo -->$'
    r'|^[ \t]*<!-- /?zoo[^\n]*',
    re.MULTILINE | re.DOTALL,
)


def _render(root: Path) -> tuple[dict[Path, str], list[str]]:
    """Pages of a checkout that are not as measured.

    Returns:
        What they should hold; one message for every table that differs, and for every layout that
        no page shows.

    Raises:
        ZooError: If a metafile, a layout or a marker is not valid.
    """
    zoo = load_zoo(root)
    layouts = load_layouts(root, zoo)
    unused, texts, messages = set(layouts), {}, []
    for path in sorted({path for pattern in PAGES for path in root.glob(pattern)}):
        old = path.read_text(encoding='utf-8')
        position, parts = 0, []
        for match in BLOCK.finditer(old):
            name = match['name']
            where = f'{path.relative_to(root)}: line {old.count(chr(10), 0, match.start()) + 1}'
            if match['fence']:
                continue
            if name not in layouts:
                raise ZooError(
                    f'{where}: no tables.yml has a table {name!r}.'
                    if name
                    else f'{where}: {match[0]} has no partner, of <!-- zoo: NAME --> and '
                    '<!-- /zoo -->.'
                )
            unused.discard(name)
            try:
                text = make_table(layouts[name], zoo)
            except ZooError as error:
                raise ZooError(f'{where}: table {name}: {error}') from error
            body = f'\n{text}\n\n' if text else ''
            if body != match['body']:
                lines = difflib.ndiff(match['body'].splitlines(), body.splitlines())
                changes = [line for line in lines if line[0] in '-+']
                messages.append(
                    '\n'.join([f'{where}: table {name}, page - and metafiles +', *changes])
                )
            parts += [old[position : match.start('body')], body]
            position = match.end('body')
        if (new := ''.join([*parts, old[position:]])) != old:
            texts[path] = new
    return texts, messages + [
        f'no page shows the table {name}: add its markers' for name in sorted(unused)
    ]


def write_pages(root: Path) -> list[Path]:
    """Writes all tables of a checkout anew, and returns the pages that have changed.

    Raises:
        ZooError: If a metafile, a layout or a marker is not valid; no page is changed then.
    """
    texts, _ = _render(root)
    for path, text in texts.items():
        atomic_write_text(path, text)
    return list(texts)


def check_pages(root: Path) -> list[str]:
    """Compares the tables of a checkout with its metafiles, and returns a message a difference.

    Raises:
        ZooError: If a metafile, a layout or a marker is not valid.
    """
    return _render(root)[1]
