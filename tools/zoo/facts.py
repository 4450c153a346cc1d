"""What stands below a table: of which runs it is, so that a reader can repeat them."""

import re
from collections.abc import Collection, Mapping

__all__ = ['FIELDS', 'LOAD', 'commands', 'facts']

FIELDS = ('commit', 'date', 'machine', 'data', 'seconds', 'command')
# Ends the text of a machine whose load is known.
LOAD = ', mean load '
# Longer lists of runs are in the metafile.
MOST_NAMES = 4


def commands(runs: list[Mapping]) -> list[str]:
    """The commands of all runs; what several begin with stands once."""
    text = '\n'.join(run['Measured']['command'].rstrip() for run in runs)
    # A line that ends in a backslash goes on in the next.
    return list(dict.fromkeys(re.split(r'(?<!\\)\n', text)))


def facts(runs: list[Mapping], fields: tuple[str, ...]) -> list[str]:
    """Commit, date, machine, data and seconds of runs; what all have in common stands once.

    Args:
        runs: Entries of a metafile, each once.
        fields: Which of :data:`FIELDS`.
    """
    found = [_shared(runs, field) for field in fields if field not in ('command', 'seconds')]
    if 'seconds' in fields and len(runs) == 1 and 'seconds' in runs[0]['Measured']:
        found.append(f'{runs[0]["Measured"]["seconds"]:,.0f} s')
    return [text for text in found if text]


def _shared(runs: list[Mapping], field: str) -> str:
    """A field of all runs; where they differ, every value with the runs that it is of."""
    names: dict[str, list[str]] = {}
    for run in runs:
        if value := run['Measured'].get(field):
            text = _data_text(value) if field == 'data' else str(value)
            names.setdefault(text, []).append(run['Name'])
    if field == 'date' and names:
        return _span(names)
    if field == 'machine':
        names = _merge_loads(names)
    prefix = 'commit ' if field == 'commit' and names else ''
    if len(names) == 1 or sum(map(len, names.values())) > MOST_NAMES:
        return prefix + ' or '.join(names)
    return prefix + ', '.join(
        f'{text} ({", ".join(f"`{name}`" for name in owners)})' for text, owners in names.items()
    )


def _data_text(data: Mapping) -> str:
    counts = [f'{part["images"]:,}' for part in data.values()]
    first = next(iter(data.values()))
    return f'{first.get("folder") or first["type"]}, {" + ".join(counts)} images'


def _span(values: Collection) -> str:
    return ' to '.join(map(str, dict.fromkeys([min(values), max(values)])))


def _merge_loads(names: dict[str, list[str]]) -> dict[str, list[str]]:
    """Machines that differ in their load alone as one, with its range."""
    merged: dict[str, tuple[list[float], list[str]]] = {}
    for text, owners in names.items():
        machine, _, load = text.partition(LOAD)
        loads, all_owners = merged.setdefault(machine, ([], []))
        loads += [float(load)] if load else []
        all_owners += owners
    return {
        machine + (LOAD + _span(loads) if loads else ''): owners
        for machine, (loads, owners) in merged.items()
    }
