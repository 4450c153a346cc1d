"""What a cell of a table can show of a measured model: templates such as ``{top1:.1f}``."""

import re
import string
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from gplq_mm.engine.run_record import stage_bits

from .decisions import compare
from .files import ZooError
from .metafile import MEASURED, STAGE, final_stage

__all__ = ['KNOWN', 'MADE', 'fields_of', 'fill', 'stage_of', 'values_of']

# Role of a stage in a run -> its name there, which depends on the bits.
ROLES = {
    'ptq': re.compile(r'ptq_w\d+a\d+'),
    'act': re.compile(r'w32a\d+'),
}
# Made here of what an entry holds.
MADE = {'bits', 'stage'}
# Sum of the steps that make the model, without those that only measure it.
QUANTIZING = 'quantizing_seconds'
MEASURING = re.compile(r'(evaluation|transfer)_|(baseline|diagnostics)$')
# Of the runs of a model together, or of the rows of a table.
SEEDS, DIFFERENCE, RANK = 'seeds', 'difference', 'rank'
KNOWN = MEASURED | STAGE | MADE | {QUANTIZING, SEEDS, DIFFERENCE, RANK}


def stage_of(runs: Sequence[Mapping], role: str | None) -> str | None:
    """Name of a stage in runs: the last one by default, None if they have no such stage."""
    stages = runs[0]['Measured']['stages'] if runs else {}
    if stages and role in (None, 'final'):
        return final_stage(stages)
    if role in ROLES:
        return next((stage for stage in stages if ROLES[role].fullmatch(stage)), None)
    return role if role in stages else None


def values_of(runs: Sequence[Mapping], role: str | None) -> dict[str, Any]:
    """Values that templates name, of one stage of a model; empty if it has no such stage.

    Args:
        runs: Entries of the model, one for each seed. Numbers are their means.
        role: The stage.
    """
    stage = stage_of(runs, role)
    runs = [run for run in runs if stage in run['Measured']['stages']]
    if not runs:
        return {}
    difference = None if stage == 'fp32' else compare((runs, stage), (runs, 'fp32'))
    return {
        **_mean([_values_of_run(run['Measured'], stage) for run in runs]),
        'stage': stage,
        'bits': stage_bits(stage),
        SEEDS: len(runs),
        DIFFERENCE: difference,
    }


def _values_of_run(measured: Mapping, stage: str) -> dict[str, Any]:
    steps = measured.get('seconds_by_step', {})
    made = [seconds for step, seconds in steps.items() if not MEASURING.match(step)]
    return {
        **measured,
        **({QUANTIZING: sum(made)} if made else {}),
        **measured['stages'][stage],
    }


def _mean(values: list) -> Any:
    """Means of numbers in nested mappings; of all else, and of what all have alike, the first."""
    first = values[0]
    if all(isinstance(value, Mapping) for value in values):
        common = [key for key in first if all(key in value for value in values)]
        return {key: _mean([value[key] for value in values]) for key in common}
    same = all(value == first for value in values)
    if same or not all(isinstance(value, int | float) for value in values):
        return first
    return fmean(values)


def fields_of(template: str) -> list[str]:
    """Names in a template.

    Raises:
        ZooError: If it is no template.
    """
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template)]
    except ValueError as error:
        raise ZooError(f'{template!r} is no template of a cell: {error}') from error
    return [field.partition('.')[0] for field in fields if field is not None]


class _Cell(string.Formatter):
    """Looks ``{data.training.images}`` up in nested mappings."""

    def get_field(self, field_name, args, kwargs):
        value = kwargs
        for part in field_name.split('.'):
            value = value[part]
            if value is None:
                raise KeyError(field_name)
        return value, field_name


def fill(template: str, values: Mapping[str, Any]) -> str:
    """The text of a cell; empty where a number is missing, or is None.

    Raises:
        ZooError: If a value does not fit its format.
    """
    try:
        return _Cell().vformat(template, (), values)
    except KeyError:
        return ''
    except (TypeError, ValueError) as error:
        raise ZooError(f'a value cannot be written as {template!r}: {error}') from error
