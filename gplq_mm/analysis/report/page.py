"""One HTML page with the tables and pictures of an analysis; it needs no other file."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from .figures import metric_label

TEMPLATE = Path(__file__).with_name('page.html')


def render_page(analysis: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The page.

    Args:
        analysis: Content of ``analysis.json``.
        pictures: Name -> PNG, of :func:`draw_figures`.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=_number, digits=_digits, bits=_bits)
    template = environment.from_string(TEMPLATE.read_text(encoding='utf-8'))
    sources = {
        name: f'data:image/png;base64,{base64.b64encode(data).decode()}'
        for name, data in pictures.items()
    }
    rows = analysis['run']['rows']
    return template.render(
        analysis=analysis,
        pictures=sources,
        metrics=list(rows[0]['metrics']) if rows else [],
        transfer=any(row.get('transfer') is not None for row in rows),
        metric=metric_label(analysis['sensitivity']['metric']) if analysis['sensitivity'] else '',
    )


def _number(value: float | None) -> str:
    """Three significant digits, nothing for None."""
    return '' if value is None else f'{value:.3g}'


def _digits(value: float | None, digits: int) -> str:
    return '' if value is None else f'{value:.{digits}f}'


def _bits(value: int | Mapping[str, int] | None) -> str:
    """Widths of the operands of an attention, once if they are all the same."""
    if value is None:
        return ''
    if isinstance(value, Mapping):
        widths = list(value.values())
        return str(widths[0]) if len(set(widths)) == 1 else '/'.join(map(str, widths))
    return str(value)
