"""Tables of measured models and of published figures, laid out by ``tables.yml``."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .caption import FIELDS, measured_caption, published_caption
from .files import ZooError, read_yaml
from .metafile import Zoo
from .values import KNOWN, MADE, fields_of, fill, model_values

__all__ = ['Spec', 'Table', 'build_table', 'load_specs']

SPEC_KEYS = {'model', 'stage', 'labels', 'rows', 'columns', 'published', 'caption', 'note'}
COLUMN_KEYS = {'title', 'cell', 'model', 'stage'}


@dataclass(frozen=True)
class Spec:
    """Layout of a table.

    Attributes:
        name: As in the marker of a page.
        columns: ``title``, ``cell`` (a template) and, where it differs from the row's, ``model``
            and ``stage``.
        rows: Labels; ``model`` and ``stage`` among them say where the values come from.
        published: Name of the published figures that are shown, instead of measured ones.
        caption: What the caption says of the runs, of :data:`~gplq_mm.zoo.caption.FIELDS`.
        note: Template of a paragraph below, about ``model``.
        model: Of rows that name none.
    """

    name: str
    columns: tuple[Mapping[str, str], ...]
    rows: tuple[Mapping[str, Any], ...]
    published: str | None
    caption: tuple[str, ...]
    note: str = ''
    model: str | None = None


@dataclass(frozen=True)
class Table:
    """A table as readers see it.

    Attributes:
        titles: Of the columns.
        rows: Texts of the cells.
        caption: Markdown below the table.
    """

    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str

    def markdown(self) -> str:
        """The table and its caption; nothing for a table without a row."""
        if not self.rows:
            return ''
        lines = [_line(self.titles), '|' + '---|' * len(self.titles), *map(_line, self.rows)]
        return '\n'.join(lines) + (f'\n\n{self.caption}' if self.caption else '')


def _line(cells: tuple[str, ...]) -> str:
    texts = (cell.replace('|', '\\|') for cell in cells)
    return ''.join(f'| {text} ' if text else '| ' for text in texts) + '|'


# -- the layout -----------------------------------------------------------------------------


def load_specs(root: Path, zoo: Zoo) -> dict[str, Spec]:
    """Reads ``configs/*/tables.yml``; rows and columns of ``configs/_base_/tables.yml`` have names.

    Raises:
        ZooError: If a layout is incomplete, or names something that does not exist.
    """
    path = Path(root) / 'configs' / '_base_' / 'tables.yml'
    shared = read_yaml(path) if path.exists() else {}
    specs: dict[str, Spec] = {}
    for path in sorted(Path(root).glob('configs/*/tables.yml')):
        for name, raw in (read_yaml(path).get('Tables') or {}).items():
            where = f'{path}: table {name}'
            if name in specs:
                raise ZooError(f'{where}: there is another table of this name; rename one.')
            specs[name] = _read_spec(where, name, raw, shared, zoo)
    return specs


def _read_spec(where: str, name: str, raw: dict, shared: dict, zoo: Zoo) -> Spec:
    if unknown := set(raw) - SPEC_KEYS:
        raise ZooError(f'{where} has the unknown keys {sorted(unknown)}, not {sorted(SPEC_KEYS)}.')
    published = raw.get('published')
    if published is not None and (published not in zoo.published or 'model' in raw):
        raise ZooError(
            f'{where}: {published!r} must be one of {sorted(zoo.published)}, and stand without '
            'measured models.'
        )
    default = zoo.published[published]['rows'] if published else None
    rows = _named(where, raw.get('rows', default), shared.get('Rows') or {}, 'rows')
    columns = _named(where, raw.get('columns'), shared.get('Columns') or {}, 'columns')
    for column in columns:
        if not {'title', 'cell'} <= set(column) <= COLUMN_KEYS:
            raise ZooError(f'{where}: a column has title and cell, not {list(column)}.')
    titles = [column['title'] for column in columns]
    if len(set(titles)) < len(titles):
        raise ZooError(f'{where}: two columns have the same title, of {titles}.')
    common = {key: raw[key] for key in ('model', 'stage') if key in raw} | raw.get('labels', {})
    caption = raw.get('caption', FIELDS)
    if unknown := set(caption) - set(FIELDS):
        raise ZooError(f'{where}: caption has {sorted(unknown)}, not of {FIELDS}.')
    rows = tuple({**common, **row} for row in rows)
    note, model = raw.get('note', ''), raw.get('model')
    if note and model not in zoo.models and not zoo.config_exists(model or ''):
        raise ZooError(f'{where}: a note needs the model that it is about.')
    spec = Spec(name, tuple(columns), rows, published, tuple(caption), note, model)
    _check_names(where, spec, zoo)
    return spec


def _named(where: str, value: Any, shared: dict, what: str) -> list[dict]:
    if isinstance(value, str):
        if value not in shared:
            raise ZooError(f'{where}: {what} {value!r} are none of {sorted(shared)}.')
        value = shared[value]
    if not value:
        raise ZooError(f'{where} has no {what}.')
    return list(value)


def _check_names(where: str, spec: Spec, zoo: Zoo) -> None:
    known = set().union(KNOWN if spec.published is None else (), *spec.rows)
    for template in [*(column['cell'] for column in spec.columns), spec.note]:
        try:
            fields = fields_of(template)
        except ZooError as error:
            raise ZooError(f'{where}: {error}') from error
        for field in fields:
            if field.split('.')[0] not in known:
                raise ZooError(f'{where}: no row and no run has {field!r}; correct {template!r}.')
    if spec.published is not None:
        return
    for row in spec.rows:
        names = {_model_of(row, column) for column in spec.columns} - {''}
        if not names:
            raise ZooError(f'{where}: the row {dict(row)} has no model.')
        for name in names:
            # An unmeasured model has no row yet, but it must be one.
            if not any(mark in name for mark in '*?[') and not zoo.config_exists(name):
                raise ZooError(f'{where}: there is no config of the name {name}.')


def _model_of(row: Mapping, column: Mapping) -> str:
    """Name of the model that a cell is about; empty for a cell that stays empty."""
    return fill(column.get('model', row.get('model', '')), row, {})


# -- the content ----------------------------------------------------------------------------


def build_table(spec: Spec, zoo: Zoo, page: str) -> Table:
    """Fills a layout with what is measured.

    What is not measured is left out: a row or a column without any number, else the cell.

    Args:
        spec: The layout.
        zoo: The data.
        page: Path of the Markdown file, relative to the checkout.

    Raises:
        ZooError: If a value does not fit its format.
    """
    labels = [_is_label(spec, column) for column in spec.columns]
    rows, cells = [], []
    for row in spec.rows if spec.published else _expanded(spec.rows, zoo):
        texts = [_cell(spec, row, column, zoo, page) for column in spec.columns]
        if all(labels) or any(text for text, label in zip(texts, labels, strict=True) if not label):
            rows.append(row)
            cells.append(texts)
    kept = [
        index for index, label in enumerate(labels) if label or any(texts[index] for texts in cells)
    ]
    return Table(
        tuple(spec.columns[index]['title'] for index in kept),
        tuple(tuple(texts[index] for index in kept) for texts in cells),
        _below(spec, rows, [spec.columns[index] for index in kept if not labels[index]], zoo, page),
    )


def _below(spec: Spec, rows: list[Mapping], columns: list[Mapping], zoo: Zoo, page: str) -> str:
    """Caption and note of a table with these rows and columns."""
    if spec.published:
        return published_caption(zoo.published[spec.published])
    names = dict.fromkeys(_model_of(row, column) for column in columns for row in rows)
    runs = [zoo.models[name] for name in names if name in zoo.models]
    parts = []
    if spec.note and spec.model in zoo.models:
        parts.append(fill(spec.note, {}, model_values(zoo.models[spec.model], None, page)))
    if runs and spec.caption:
        parts.append(measured_caption(runs, spec.caption))
    return '\n\n'.join(part for part in parts if part)


def _expanded(rows: tuple[Mapping, ...], zoo: Zoo) -> Iterator[Mapping]:
    """Rows with a pattern as their model, once for every measured model that it fits."""
    for row in rows:
        pattern = row.get('model', '')
        if not any(mark in pattern for mark in '*?['):
            yield row
            continue
        for name in zoo.models:
            if fnmatchcase(name, pattern):
                yield {**row, 'model': name}


def _is_label(spec: Spec, column: Mapping) -> bool:
    """Whether a column tells what the rows are, and nothing that was measured."""
    labels = MADE.union(set.intersection(*(set(row) for row in spec.rows)))
    names = {field.split('.')[0] for field in fields_of(column['cell'])}
    return spec.published is None and names <= labels


def _cell(spec: Spec, row: Mapping, column: Mapping, zoo: Zoo, page: str) -> str:
    if spec.published:
        return fill(column['cell'], row, {})
    entry = zoo.models.get(_model_of(row, column))
    if entry is None:
        values = {}
    else:
        values = model_values(entry, column.get('stage') or row.get('stage'), page)
    try:
        return fill(column['cell'], row, values)
    except ZooError as error:
        raise ZooError(f'table {spec.name}: {error}') from error
