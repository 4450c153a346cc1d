"""Tables of measured models and of published figures, laid out by ``tables.yml``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from .cells import KNOWN, MADE, RANK, fields_of, fill, stage_of, values_of
from .decisions import ranks
from .facts import FIELDS, commands, facts
from .files import ZooError, read_yaml
from .metafile import Zoo

__all__ = ['load_layouts', 'make_table']

# Keys of a layout besides rows and columns; docs/zoo.md says what they are.
DEFAULTS = {
    'model': '',
    'stage': None,
    'labels': {},
    'published': None,
    'caption': FIELDS,
    'note': '',
}
COLUMN_KEYS = {'title', 'cell', 'model', 'stage'}
ENVIRONMENT = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
TEMPLATE = ENVIRONMENT.from_string(
    Path(__file__).with_name('table.md.j2').read_text(encoding='utf-8')
)


def load_layouts(root: Path, zoo: Zoo) -> dict[str, dict[str, Any]]:
    """Reads ``configs/*/tables.yml``; rows and columns of ``configs/_base_/tables.yml`` have names.

    Returns:
        Name -> layout with all of its keys.

    Raises:
        ZooError: If a layout is incomplete, or names something that does not exist.
    """
    shared = read_yaml(root / 'configs' / '_base_' / 'tables.yml')
    layouts: dict[str, dict] = {}
    for path in sorted(root.glob('configs/*/tables.yml')):
        for name, raw in (read_yaml(path).get('Tables') or {}).items():
            try:
                if name in layouts:
                    raise ZooError('there is another table of this name; rename one.')
                layouts[name] = _complete(raw, shared, zoo)
                _check(layouts[name], zoo)
            except ZooError as error:
                raise ZooError(f'{path}: table {name}: {error}') from error
    return layouts


def _complete(raw: dict, shared: dict, zoo: Zoo) -> dict[str, Any]:
    """A layout with its defaults, and with rows and columns for their names."""
    keys = {*DEFAULTS, 'rows', 'columns'}
    if unknown := set(raw) - keys:
        raise ZooError(f'unknown keys {sorted(unknown)}, not of {sorted(keys)}.')
    layout = {**DEFAULTS, **raw}
    source = layout['published']
    if source is not None and (source not in zoo.published or layout['model']):
        raise ZooError(
            f'{source!r} must be one of {sorted(zoo.published)}, and stand without measured models.'
        )
    if source is not None:
        layout.setdefault('rows', zoo.published[source]['rows'])
    for what in ('rows', 'columns'):
        value = layout.get(what)
        if isinstance(value, str):
            named = shared.get(what.capitalize()) or {}
            if value not in named:
                raise ZooError(f'{what} {value!r} are none of {sorted(named)}.')
            value = named[value]
        if not value:
            raise ZooError(f'it has no {what}.')
        layout[what] = value
    common = {key: raw[key] for key in ('model', 'stage') if key in raw} | layout['labels']
    layout['rows'] = [{**common, **row} for row in layout['rows']]
    return layout


def _check(layout: Mapping, zoo: Zoo) -> None:
    """Refuses what would be an empty cell for ever."""
    for column in layout['columns']:
        if not {'title', 'cell'} <= set(column) <= COLUMN_KEYS:
            raise ZooError(f'a column has title and cell, not {list(column)}.')
    if unknown := set(layout['caption']) - set(FIELDS):
        raise ZooError(f'caption has {sorted(unknown)}, not of {FIELDS}.')
    known = set().union(() if layout['published'] else KNOWN, *layout['rows'])
    for template in [*(column['cell'] for column in layout['columns']), layout['note']]:
        if unknown := set(fields_of(template)) - known:
            raise ZooError(f'no row and no run has {sorted(unknown)}; correct {template!r}.')
    if layout['published']:
        return
    names = [{_model_of(row, column) for column in layout['columns']} for row in layout['rows']]
    names += [{layout['model']}] if layout['note'] else []
    for found in names:
        if found <= {''}:
            raise ZooError('every row, and a note, need a model.')
        # An unmeasured model has no row yet, but it must be one.
        if missing := [name for name in found - {''} if not zoo.config_exists(name)]:
            raise ZooError(f'there is no config of the name {missing[0]}.')


def _model_of(row: Mapping, column: Mapping) -> str:
    """Name of the model that a cell is about; empty for a cell that stays empty."""
    return fill(column.get('model', row.get('model', '')), row)


def make_table(layout: Mapping, zoo: Zoo) -> str:
    """Markdown of a table and of what stands below it.

    What is not measured is left out: a row or a column without any number, else the cell.

    Raises:
        ZooError: If a value does not fit its format.
    """
    source = zoo.published.get(layout['published'])
    columns = layout['columns']
    # Columns that tell what the rows are, and nothing that was measured.
    labels = MADE.union(set.intersection(*(set(row) for row in layout['rows'])))
    told = [not source and set(fields_of(column['cell'])) <= labels for column in columns]
    rows = _ranked(layout, zoo)
    lines = [(row, [_cell(row, column, zoo) for column in columns]) for row in rows]
    lines = [
        (row, cells)
        for row, cells in lines
        if all(told) or any(cell and not label for cell, label in zip(cells, told, strict=True))
    ]
    kept = [i for i, label in enumerate(told) if label or any(cells[i] for _, cells in lines)]
    shown = [columns[i] for i in kept if not told[i] and not source]
    names = dict.fromkeys(_model_of(row, column) for column in shown for row, _ in lines)
    runs = [run for name in names for run in zoo.runs_of(name)]
    about = zoo.runs_of(layout['model'])
    return TEMPLATE.render(
        titles=[columns[i]['title'] for i in kept],
        rows=[[cells[i] for i in kept] for _, cells in lines],
        note=fill(layout['note'], values_of(about, None)) if about else '',
        facts=facts(runs, layout['caption']),
        commands=commands(runs) if runs and 'command' in layout['caption'] else [],
        published=source,
    ).strip('\n')


def _ranked(layout: Mapping, zoo: Zoo) -> list[Mapping]:
    """The rows, with their place among each other where a column asks for it."""
    rows = layout['rows']
    if not any(RANK in fields_of(column['cell']) for column in layout['columns']):
        return rows
    runs = [zoo.runs_of(_model_of(row, {})) for row in rows]
    stages = [stage_of(found, row.get('stage')) for found, row in zip(runs, rows, strict=True)]
    places = ranks(list(zip(runs, stages, strict=True)))
    return [{**row, RANK: place} for row, place in zip(rows, places, strict=True)]


def _cell(row: Mapping, column: Mapping, zoo: Zoo) -> str:
    stage = column.get('stage') or row.get('stage')
    values = values_of(zoo.runs_of(_model_of(row, column)), stage)
    # What the row itself says goes before what was measured.
    return fill(column['cell'], {**values, **row})
