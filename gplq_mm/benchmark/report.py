"""Where measurements are taken, and their tables, files and pictures."""

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..checkpoint import atomic_write
from ..evaluation.provenance import describe_machine
from ..ops import native
from .peers import PACKAGES
from .timing import Call, Clock, Timing, interleave, wall_clock

OURS = 'gplq_int4'
# Heading -> format of a row's cells.
SPEED = {
    'implementation': '{impl}',
    'median ms': '{median_ms:.3g}',
    'quartiles': '{quartile1_ms:.3g} to {quartile3_ms:.3g}',
    'GOPS': '{gops:.0f}',
    'time / ours': '{times_ours:.2f}',
}
# What a picture shows of the rows of a name: key, legend, text beside a bar.
TRAINING_BARS = tuple(
    (f'{key}_ratio', legend, f'{{{key}_ratio:.2f}}')
    for key, legend in (('saved', 'kept for backward'), ('peak', 'peak memory'), ('step', 'step'))
)
SPEED_BARS = (('times_ours', 'time / ours (shorter is faster)', '{median_ms:.3g} ms'),)


def environment() -> dict[str, Any]:
    """Where measurements are taken: :func:`describe_machine`, the kernels in use, and the GPU."""
    found = describe_machine(('gplq_mm', *PACKAGES))
    found['kernels'] = native.backend()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found['capability'] = f'{properties.major}.{properties.minor}'
        found['multiprocessors'] = properties.multi_processor_count
        found['cuda'] = torch.version.cuda
    return found


def show(rows: Iterable[dict], title: str, columns: dict[str, str], console: Console) -> None:
    """Prints a table of ``columns``: heading -> format string, filled from a row."""
    table = Table(title=title, title_justify='left')
    for index, heading in enumerate(columns):
        table.add_column(heading, justify='right' if index else 'left')
    for row in rows:
        cells = [template.format(**row) for template in columns.values()]
        table.add_row(*cells, style='bold' if row.get('impl') == OURS else None)
    console.print(table)


@dataclass
class Bench:
    """Times candidates, prints what comes out and keeps it.

    Attributes:
        console: Where progress and tables are shown.
        rounds: Turns of every candidate.
        clock: Takes the samples.
        rows: What was measured so far.
        skipped: Candidates that could not run, and why.
    """

    console: Console
    rounds: int
    clock: Clock = wall_clock
    rows: list[dict] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def time(self, candidates: dict[str, Call], label: str) -> dict[str, Timing]:
        """Times candidates in turns, with a progress bar."""
        with Progress(console=self.console, transient=True) as progress:
            track = partial(progress.track, description=label)
            return interleave(candidates, self.rounds, self.clock, track=track)

    def compare(
        self,
        name: str,
        subject: dict,
        candidates: dict[str, Call],
        operations: float | None,
        title: str,
        ours: str = OURS,
    ) -> None:
        """Times candidates that do the same, and adds a row of each.

        Args:
            name: Of the measurement.
            subject: Columns that say what was measured.
            candidates: Implementation -> call.
            operations: Multiplications and additions of a call, or None.
            title: Of the table.
            ours: The candidate of which ``times_ours`` are multiples.
        """
        timings = self.time(candidates, title)
        rows = []
        for impl, timing in timings.items():
            row = {'name': name, **subject, 'threads': torch.get_num_threads(), 'impl': impl}
            row['median_ms'] = timing.median_ms
            if operations is not None:
                row['gops'] = operations / timing.median_ms / 1e6
            row['times_ours'] = timing.median_ms / timings[ours].median_ms
            rows.append(row | timing._asdict())
        left_out = 'GOPS' if operations is None else None
        self.rows += rows
        columns = {key: SPEED[key] for key in SPEED if key != left_out}
        show(rows, title, columns, self.console)


def write(path: Path, content: dict, picture: bool = True) -> list[Path]:
    """Writes ``path`` (JSON), and beside it its ``rows``, if any, as CSV and PNG.

    Returns:
        The files.
    """
    files = {path: json.dumps(content, indent=2).encode()}
    rows = content.get('rows')
    if rows:
        table = StringIO()
        writer = csv.DictWriter(table, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
        files[path.with_suffix('.csv')] = table.getvalue().encode()
        if picture:
            files[path.with_suffix('.png')] = draw(rows)
    for file, data in files.items():
        atomic_write(file, lambda stream, data=data: stream.write(data))
    return list(files)


def draw(rows: list[dict]) -> bytes:
    """Bars of the ratios, one panel for each comparison, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    training = rows[0]['name'] == 'train'
    series = TRAINING_BARS if training else SPEED_BARS
    groups: dict[str, list[dict]] = {}
    for row in rows:
        title = row.get('shape') or f'{row["model"]}, batch {row["batch"]}'
        groups.setdefault(title, []).append(row)
    figure = Figure(figsize=(8, 0.6 + 2.0 * len(groups)), layout='constrained')
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    height = 0.8 / len(series)
    for panel, (title, group) in zip(panels, groups.items(), strict=True):
        colors = ['tab:orange' if row['impl'] == OURS else 'tab:blue' for row in group]
        colors = None if training else colors
        for index, (key, legend, text) in enumerate(series):
            shift = (index - (len(series) - 1) / 2) * height
            places = [place + shift for place in range(len(group))]
            values = [row[key] for row in group]
            bars = panel.barh(places, values, height, label=legend, color=colors)
            panel.bar_label(bars, [text.format(**row) for row in group], padding=3, fontsize=8)
        panel.set_yticks(range(len(group)), [row['impl'] for row in group])
        panel.set_title(f'{title}, {group[0]["threads"]} threads', loc='left', fontsize=10)
        panel.margins(x=0.15)
        panel.invert_yaxis()
        if training:
            panel.legend(fontsize=8)
    panels[-1].set_xlabel('multiples of FP32 training' if training else series[0][1])
    buffer = BytesIO()
    figure.savefig(buffer, format='png', dpi=120)
    return buffer.getvalue()
