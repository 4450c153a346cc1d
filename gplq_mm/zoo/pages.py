"""Markdown pages whose tables are generated between markers.

A table stands between two lines of its page::

    <!-- zoo: NAME -->
    <!-- /zoo -->
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from ..checkpoint import atomic_write_text
from .files import ZooError
from .metafile import load_zoo
from .tables import Spec, Table, build_table, load_specs

__all__ = ['check_pages', 'find_blocks', 'parse_table', 'write_pages']

OPENING = re.compile(r'<!-- zoo: (\S+) -->')
CLOSING = '<!-- /zoo -->'
PAGES = ('*.md', 'configs/**/*.md', 'docs/**/*.md')


@dataclass(frozen=True)
class Block:
    """The place of a table in a page.

    Attributes:
        name: Name of the table.
        start: Number of the first line behind the opening marker, from 0.
        end: Number of the line of the closing marker.
    """

    name: str
    start: int
    end: int


def find_blocks(lines: list[str]) -> list[Block]:
    """Places of tables in a page. Markers within fenced code are examples, and mean nothing.

    Args:
        lines: Of the page, without line ends.

    Raises:
        ZooError: If a marker is not closed, or closes nothing; the message names the line.
    """
    blocks: list[Block] = []
    fence = opened = None
    for number, line in enumerate(lines):
        mark = re.match(r' {0,3}(`{3,}|~{3,})', line)
        if fence is None and mark:
            fence = mark[1]
        elif fence is not None and line.strip().startswith(fence):
            fence = None
        elif fence is not None:
            continue
        elif match := OPENING.fullmatch(line.strip()):
            if opened is not None:
                raise ZooError(f'line {opened[1]}: the marker of {opened[0]!r} is not closed.')
            opened = match[1], number + 1
        elif line.strip() == CLOSING:
            if opened is None:
                raise ZooError(f'line {number + 1}: {CLOSING} closes nothing.')
            blocks.append(Block(opened[0], opened[1], number))
            opened = None
        elif line.strip().startswith('<!-- zoo'):
            raise ZooError(f'line {number + 1}: {line.strip()} is no marker <!-- zoo: NAME -->.')
    if opened is not None:
        raise ZooError(f'line {opened[1]}: the marker of {opened[0]!r} is not closed.')
    return blocks


def parse_table(text: str) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of the first table in a Markdown text; both empty without a table."""
    rows = []
    for line in text.splitlines():
        if line.startswith('|'):
            cells = re.split(r'(?<!\\)\|', line.strip())[1:-1]
            rows.append([cell.strip().replace('\\|', '|') for cell in cells])
        elif rows:
            break
    return (rows[0], rows[2:]) if rows else ([], [])


# -- all pages of a checkout ------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """A table in a page: what should stand there, and what does."""

    page: Path
    spec: Spec
    table: Table
    found: str


def _pages(root: Path) -> list[Path]:
    return sorted({path for pattern in PAGES for path in root.glob(pattern)})


def _places(root: Path, page: Path, specs: dict[str, Spec], zoo) -> Iterator[tuple[Block, _Place]]:
    shown = page.relative_to(root).as_posix()
    lines = page.read_text(encoding='utf-8').split('\n')
    try:
        blocks = find_blocks(lines)
        for block in blocks:
            if block.name not in specs:
                raise ZooError(f'line {block.start}: no tables.yml has a table {block.name!r}.')
            table = build_table(specs[block.name], zoo, shown)
            found = '\n'.join(lines[block.start : block.end]).strip('\n')
            yield block, _Place(page, specs[block.name], table, found)
    except ZooError as error:
        raise ZooError(f'{shown}: {error}') from error


def write_pages(root: Path) -> list[Path]:
    """Writes all tables of the pages of a checkout anew.

    Args:
        root: The checkout.

    Returns:
        The pages that have changed.

    Raises:
        ZooError: If a metafile, a layout or a marker is not valid; no page is changed then.
    """
    zoo = load_zoo(root)
    specs = load_specs(root, zoo)
    texts: dict[Path, str] = {}
    for page in _pages(root):
        old = page.read_text(encoding='utf-8')
        lines = old.split('\n')
        # From the end on, so that the places of the earlier ones stay.
        for block, place in reversed(list(_places(root, page, specs, zoo))):
            text = place.table.markdown()
            lines[block.start : block.end] = ['', *text.split('\n'), ''] if text else []
        if '\n'.join(lines) != old:
            texts[page] = '\n'.join(lines)
    for page, text in texts.items():
        atomic_write_text(page, text)
    return list(texts)


def check_pages(root: Path) -> list[str]:
    """Compares the tables of all pages with the metafiles.

    Args:
        root: The checkout.

    Returns:
        One message for every difference, with page, table, row and column; and for every layout
        that no page shows.

    Raises:
        ZooError: If a metafile, a layout or a marker is not valid.
    """
    zoo = load_zoo(root)
    specs = load_specs(root, zoo)
    messages, used = [], set()
    for page in _pages(root):
        for _, place in _places(root, page, specs, zoo):
            used.add(place.spec.name)
            where = f'{page.relative_to(root)}: table {place.spec.name}'
            messages += [f'{where}: {text}' for text in _differences(place.table, place.found)]
    unused = sorted(set(specs) - used)
    return messages + [f'no page shows the table {name}: add its markers' for name in unused]


def _differences(table: Table, found: str) -> list[str]:
    wanted = table.markdown()
    if found == wanted:
        return []
    titles, rows = parse_table(found)
    want_titles, want_rows = parse_table(wanted)
    if titles != want_titles:
        return [f'the page has the columns {titles}, the metafiles give {want_titles}']
    messages = []
    have, want = {row[0]: row for row in rows}, {row[0]: row for row in want_rows}
    if (len(have), len(want)) == (len(rows), len(want_rows)):
        messages += [f'row {label!r} is missing' for label in want if label not in have]
        messages += [f'row {label!r} is in no metafile' for label in have if label not in want]
        pairs = [(have[label], row) for label, row in want.items() if label in have]
    else:
        # Rows of one name can only be told apart by their places.
        pairs = list(zip(rows, want_rows, strict=False))
        if len(rows) != len(want_rows):
            messages.append(f'{len(rows)} rows instead of {len(want_rows)}')
    for row, wanted_row in pairs:
        messages += _cell_differences(titles, row, wanted_row)
    if not messages:
        lines = zip_longest(found.split('\n'), wanted.split('\n'), fillvalue='')
        line, wanted_line = next(pair for pair in lines if pair[0] != pair[1])
        messages.append(f'the page says {line!r}, the metafiles give {wanted_line!r}')
    return messages


def _cell_differences(titles: list[str], row: list[str], wanted: list[str]) -> Iterator[str]:
    if len(row) != len(wanted):
        yield f'row {row[0]!r} has {len(row)} cells instead of {len(wanted)}'
        return
    for title, cell, want in zip(titles, row, wanted, strict=True):
        if cell != want:
            yield (
                f'row {wanted[0]!r}, column {title!r}: the page says {cell!r}, '
                f'the metafile {want!r}'
            )
