"""What a cell of a table can show of a measured model: templates such as ``{top1:.1f}``."""

import posixpath
import re
import string
from collections.abc import Mapping
from typing import Any

from ..engine.run_record import stage_bits
from .files import ZooError
from .metafile import MEASURED, STAGE, final_stage

__all__ = ['fields_of', 'fill', 'model_values', 'stage_of']

# Role of a stage in a run -> its name there, which depends on the bits.
ROLES = {
    'ptq': re.compile(r'ptq_w\d+a\d+'),
    'act': re.compile(r'w32a\d+'),
}
# Made here of what an entry holds.
MADE = {'name', 'link', 'label', 'bits', 'stage'}
# Sum of the steps that make the model, without those that only measure it.
QUANTIZING = 'quantizing_seconds'
MEASURING = re.compile(r'(evaluation|transfer)_|(baseline|diagnostics)$')
KNOWN = MEASURED | STAGE | MADE | {QUANTIZING}


def stage_of(entry: Mapping, role: str | None) -> str | None:
    """Name of a stage in a run.

    Args:
        entry: Entry of a metafile.
        role: Name of a stage, ``ptq``, ``act`` or ``final``. Defaults to the last stage.

    Returns:
        The name, or None if the run has no such stage.
    """
    stages = entry['Measured']['stages']
    if role in (None, 'final'):
        return final_stage(stages)
    if role in ROLES:
        return next((stage for stage in stages if ROLES[role].fullmatch(stage)), None)
    return role if role in stages else None


def model_values(entry: Mapping, role: str | None, page: str) -> dict[str, Any]:
    """Values that templates name, of one stage of a run; empty if it has no such stage.

    Args:
        entry: Entry of a metafile.
        role: As in :func:`stage_of`.
        page: Path of the Markdown file, relative to the checkout, for links.
    """
    stage = stage_of(entry, role)
    if stage is None:
        return {}
    measured = entry['Measured']
    config = posixpath.relpath(entry['Config'], posixpath.dirname(page) or '.')
    link = f'[{entry["Name"]}]({config})'
    steps = measured.get('seconds_by_step', {})
    made = [seconds for step, seconds in steps.items() if not MEASURING.match(step)]
    return {
        **measured,
        **({QUANTIZING: sum(made)} if made else {}),
        **measured['stages'][stage],
        'name': entry['Name'],
        'link': link,
        # Of rows that say nothing else.
        'label': link,
        'stage': stage,
        'bits': stage_bits(stage),
    }


def fields_of(template: str) -> list[str]:
    """Names in a template.

    Raises:
        ZooError: If it is no template.
    """
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ZooError(f'{template!r} is no template of a cell: {error}') from error


def _look_up(values: Mapping[str, Any], path: str) -> Any:
    value: Any = values
    for part in path.split('.'):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def fill(template: str, labels: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """The text of a cell; empty where a number is missing.

    Args:
        template: Text with fields such as ``{seconds:,.0f}`` or ``{data.training.images}``.
        labels: What the row itself says; goes before ``values``. A label of None says that there is
            no such number, whatever the values hold.
        values: Of :func:`model_values`, or a row of published figures.

    Raises:
        ZooError: If a value does not fit its format.
    """
    text = []
    for literal, path, spec, _ in string.Formatter().parse(template):
        text.append(literal)
        if path is None:
            continue
        first = path.partition('.')[0]
        if first in labels and labels[first] is None:
            return ''
        value = _look_up(labels, path)
        if value is None:
            value = _look_up(values, path)
        if value is None:
            return ''
        try:
            text.append(format(value, spec))
        except (TypeError, ValueError) as error:
            raise ZooError(f'{value!r} cannot be written as {{{path}:{spec}}}: {error}') from error
    return ''.join(text)
