"""Tables, files and pictures of measurements."""

import csv
import json
from io import BytesIO, StringIO
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..checkpoint import atomic_write, atomic_write_text
from .candidates import OURS

__all__ = ['draw', 'show', 'show_ptq', 'show_training', 'write']


def _table(title: str, first: str, *numbers: str) -> Table:
    """An empty table: a column of names, and columns of numbers."""
    table = Table(title=title, title_justify='left')
    table.add_column(first)
    for heading in numbers:
        table.add_column(heading, justify='right')
    return table


def show_training(rows: list[dict], title: str, console: Console) -> None:
    """Prints what training steps cost."""
    table = _table(title, 'implementation', 'kept for backward', 'peak memory', 'step')
    for row in rows:
        table.add_row(
            row['impl'],
            f'{row["saved_ratio"]:.2f}  ({row["saved_mb"]:.0f} MB)',
            f'{row["peak_ratio"]:.2f}  ({row["peak_mb"]:.0f} MB)',
            f'{row["step_ratio"]:.2f}  ({row["step_ms"]:.0f} ms)',
        )
    console.print(table)


def show_ptq(result: dict, model: str, console: Console) -> None:
    """Prints the cost of Stage 2."""
    title = f'{model}, {result["images"]} images ({result["image_source"]}), '
    title += f'{result["threads"]} threads'
    table = _table(title, 'step', 'seconds', 'CPU seconds', 'memory growth, MB')
    for step, seconds in result['cpu_seconds'].items():
        growth = f'{result["memory_growth_mb"][step]:.0f}'
        table.add_row(step, f'{result["seconds"][step]:.1f}', f'{seconds:.1f}', growth)
    for unit, seconds in result['units'].items():
        table.add_row(f'  {unit}', f'{seconds:.1f}')
    console.print(table)


def show(rows: list[dict], title: str, console: Console) -> None:
    """Prints one comparison."""
    table = _table(title, 'implementation', 'median ms', 'quartiles', 'GOPS', 'time / ours')
    for row in rows:
        table.add_row(
            row['impl'],
            f'{row["median_ms"]:.3g}',
            f'{row["quartile1_ms"]:.3g} to {row["quartile3_ms"]:.3g}',
            f'{row["gops"]:.0f}',
            f'{row["times_ours"]:.2f}',
            style='bold' if row['impl'] == OURS else None,
        )
    console.print(table)


def draw(rows: list[dict]) -> bytes:
    """Bars of the ratios, one panel for each comparison, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups: dict[str, list[dict]] = {}
    for row in rows:
        title = row.get('shape') or f'{row["model"]}, batch {row["batch"]}'
        groups.setdefault(title, []).append(row)
    figure = Figure(figsize=(8, 0.6 + 2.0 * len(groups)), layout='constrained')
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for panel, (title, group) in zip(panels, groups.items(), strict=True):
        if group[0]['name'] == 'train':
            draw_training(panel, group)
        else:
            colors = ['tab:orange' if row['impl'] == OURS else 'tab:blue' for row in group]
            bars = panel.barh(
                [row['impl'] for row in group], [row['times_ours'] for row in group], color=colors
            )
            panel.bar_label(bars, [f'{row["median_ms"]:.3g} ms' for row in group], padding=3)
        panel.set_title(f'{title}, {group[0]["threads"]} threads', loc='left', fontsize=10)
        panel.margins(x=0.15)
        panel.invert_yaxis()
    training = rows[0]['name'] == 'train'
    panels[-1].set_xlabel(
        'multiples of FP32 training' if training else 'time / ours (shorter is faster)'
    )
    buffer = BytesIO()
    figure.savefig(buffer, format='png', dpi=120)
    return buffer.getvalue()


def draw_training(panel, group: list[dict]) -> None:
    """Three bars an implementation: kept bytes, peak memory, time of a step."""
    height = 0.27
    for index, (key, label) in enumerate(
        (('saved', 'kept for backward'), ('peak', 'peak memory'), ('step', 'step'))
    ):
        places = [place + (index - 1) * height for place in range(len(group))]
        values = [row[f'{key}_ratio'] for row in group]
        bars = panel.barh(places, values, height, label=label)
        panel.bar_label(bars, [f'{value:.2f}' for value in values], padding=3, fontsize=8)
    panel.set_yticks(range(len(group)), [row['impl'] for row in group])
    panel.legend(fontsize=8)


def write(path: Path, rows: list[dict], skipped: dict, environment: dict) -> None:
    """Writes ``path`` (JSON) and beside it the rows as CSV and the plot as PNG."""
    result = {'environment': environment, 'rows': rows, 'skipped': skipped}
    table = StringIO()
    writer = csv.DictWriter(table, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    picture = draw(rows)
    atomic_write_text(path, json.dumps(result, indent=2))
    atomic_write_text(path.with_suffix('.csv'), table.getvalue())
    atomic_write(path.with_suffix('.png'), lambda file: file.write(picture))
