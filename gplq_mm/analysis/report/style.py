"""How pictures look: colours that colour-blind readers tell apart, room for long names."""

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito, 2008.
COLORS = {
    'weights': '#0072B2',
    'activations': '#D55E00',
    'both': '#333333',
    'input': '#0072B2',
    'q': '#E69F00',
    'k': '#56B4E9',
    'v': '#009E73',
    'probs': '#CC79A7',
}
ROW_HEIGHT = 0.19
MIN_HEIGHT = 2.6
DPI = 110
SETTINGS = {
    'font.size': 9,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.titlesize': 10,
    'axes.titleweight': 'bold',
    'axes.titlelocation': 'left',
    'axes.grid': True,
    'axes.axisbelow': True,
    'grid.color': '#E6E6E6',
    'grid.linewidth': 0.7,
    'legend.frameon': False,
    'legend.fontsize': 8,
    'savefig.dpi': DPI,
}


def new_figure(width: float, rows: int | None = None, height: float = 3.2, columns: int = 1):
    """A figure and the list of its axes, without pyplot and thus without a display or global state.

    Args:
        width: Inches.
        rows: Number of rows with a name each, which decides the height.
        height: Inches, without ``rows``.
        columns: Axes side by side.
    """
    if rows is not None:
        height = max(MIN_HEIGHT, 1.1 + ROW_HEIGHT * rows)
    figure = Figure(figsize=(width, height), layout='constrained')
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def shorten(name: str) -> str:
    """A layer's name without what all have in common."""
    return name.removeprefix('backbone.')


def label_rows(axes: Axes, names: list[str]) -> None:
    """Gives every row its name, the first on top, with a faint line to follow."""
    axes.set_yticks(range(len(names)), [shorten(name) for name in names], fontsize=7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis='y', length=0)
    axes.grid(axis='y', linewidth=0.5)


def legend_below(axes: Axes, columns: int) -> None:
    """A legend under the axes, however high the figure is."""
    place = (0.4, -0.45 / axes.figure.get_figheight())
    axes.legend(loc='upper center', bbox_to_anchor=place, ncol=columns)


def to_png(figure: Figure) -> bytes:
    """The picture as the bytes of a PNG file, the same for the same data."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', metadata={'Software': None})
    return buffer.getvalue()
