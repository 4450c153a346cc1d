"""What stands below a table: of which runs it is, so that a reader can repeat them."""

import re
from collections.abc import Mapping

__all__ = ['FIELDS', 'LOAD', 'measured_caption', 'published_caption']

# Longer lists of runs are in the metafile.
MOST_NAMES = 4
# Ends the text of a machine whose load is known.
LOAD = ', mean load '
FIELDS = ('commit', 'date', 'machine', 'data', 'seconds', 'command')


def measured_caption(runs: list[Mapping], fields: tuple[str, ...]) -> str:
    """Commit, machine, data and commands of runs; what all have in common stands once.

    Args:
        runs: Entries of a metafile, each once.
        fields: Which of :data:`FIELDS`.
    """
    parts = []
    for field in fields:
        if field in ('command', 'seconds'):
            continue
        text = _shared(runs, field)
        if text:
            parts.append(text)
    if 'seconds' in fields and len(runs) == 1 and 'seconds' in runs[0]['Measured']:
        parts.append(f'{runs[0]["Measured"]["seconds"]:,.0f} s')
    text = f'Measured: {"; ".join(parts)}.' if parts else ''
    if 'command' in fields:
        text += ('\n\n' if text else '') + f'```bash\n{_commands(runs)}\n```'
    return text


def _commands(runs: list[Mapping]) -> str:
    """The commands of all runs; what several begin with stands once."""
    text = '\n'.join(run['Measured']['command'].rstrip() for run in runs)
    # A line that ends in a backslash goes on in the next.
    return '\n'.join(dict.fromkeys(re.split(r'(?<!\\)\n', text)))


def _shared(runs: list[Mapping], field: str) -> str:
    """A field of all runs; where they differ, every value with the runs that it is of."""
    names: dict[str, list[str]] = {}
    for run in runs:
        if run['Measured'].get(field):
            names.setdefault(_text(field, run['Measured'][field]), []).append(run['Name'])
    if field == 'machine' and len(names) > 1:
        names = _loads_as_a_range(names)
    prefix = 'commit ' if field == 'commit' else ''
    if len(names) == 1:
        return prefix + next(iter(names))
    if field == 'date' and names:
        return f'{min(names)} to {max(names)}'
    if sum(map(len, names.values())) > MOST_NAMES:
        return prefix + ' or '.join(names)
    return prefix + ', '.join(
        f'{text} ({", ".join(f"`{name}`" for name in owners)})' for text, owners in names.items()
    )


def _loads_as_a_range(names: dict[str, list[str]]) -> dict[str, list[str]]:
    """Machines that differ in their load alone as one, with its range."""
    merged: dict[str, tuple[list[float], list[str]]] = {}
    for text, owners in names.items():
        machine, _, load = text.partition(LOAD)
        loads, all_owners = merged.setdefault(machine, ([], []))
        loads += [float(load)] if load else []
        all_owners += owners
    return {machine + _load_range(loads): owners for machine, (loads, owners) in merged.items()}


def _load_range(loads: list[float]) -> str:
    if not loads:
        return ''
    least, most = min(loads), max(loads)
    return f'{LOAD}{least}' if least == most else f'{LOAD}{least} to {most}'


def _text(field: str, value) -> str:
    if field != 'data':
        return str(value)
    counts = [f'{part["images"]:,}' for part in value.values()]
    first = next(iter(value.values()))
    return f'{first.get("folder") or first["type"]}, {" + ".join(counts)} images'


def published_caption(table: Mapping) -> str:
    """Source of figures that others have published.

    Args:
        table: Of ``published.yml``.
    """
    text = f'Published, not measured by us: [{table["source"]}]({table["url"]}).'
    return f'{text} {table["note"]}' if table.get('note') else text
