"""The pictures of an analysis."""

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .curves import draw_losses, draw_pca, draw_watched, draw_weight_drift
from .style import COLORS, SETTINGS, label_rows, legend_below, new_figure, to_png

# Effects below this share of the largest one are drawn at the edge.
EFFECT_RANGE = 1e-5
CASE_LABELS = {
    'weights': 'weights quantized',
    'activations': 'activations quantized',
    'both': 'both',
}
OPERANDS = {
    'input': 'input of a layer',
    'q': 'q',
    'k': 'k',
    'v': 'v',
    'probs': 'attention probabilities',
}


def draw_figures(analysis: Mapping[str, Any]) -> dict[str, bytes]:
    """Draws what the data of an analysis allow.

    Args:
        analysis: Content of ``analysis.json``.

    Returns:
        Name -> PNG file, in the order in which they are to be read.
    """
    pictures = {}
    with rc_context(SETTINGS):
        for name, draw in DRAWERS.items():
            figure = draw(analysis)
            if figure is not None:
                pictures[name] = to_png(figure)
    return pictures


def draw_sqnr(analysis: Mapping) -> Figure | None:
    """SQNR at every layer's output."""
    layers = {n: layer['errors'] for n, layer in analysis['layers'].items() if layer['errors']}
    if not layers:
        return None
    names = list(layers)
    figure, (axes,) = new_figure(8, rows=len(names))
    for case in CASE_LABELS:
        points = [
            (layers[name][case]['sqnr_db'], row)
            for row, name in enumerate(names)
            if layers[name].get(case, {}).get('sqnr_db') is not None
        ]
        if points:
            axes.scatter(
                *zip(*points, strict=True),
                s=26 if case == 'both' else 20,
                marker='|' if case == 'both' else 'o',
                linewidths=1.6 if case == 'both' else 0,
                color=COLORS[case],
                label=CASE_LABELS[case],
                zorder=3,
            )
    label_rows(axes, names)
    axes.set_xlabel("SQNR at the layer's output (dB; larger is better)")
    axes.set_title('Signal-to-quantization-noise ratio, input of the float model')
    legend_below(axes, 3)
    return figure


def draw_sensitivity(analysis: Mapping) -> Figure | None:
    """Effect of every layer alone, the largest on top."""
    sensitivity = analysis.get('sensitivity')
    if not sensitivity:
        return None
    cost = sensitivity['cost']
    names = sorted(cost, key=lambda name: -sum(cost[name].values()))
    figure, (axes,) = new_figure(8, rows=len(names))
    # A layer without effect (8 bits, or a constant input) must not take the room of all others.
    least = EFFECT_RANGE * max(value for parts in cost.values() for value in parts.values())
    for part in ('weights', 'activations'):
        points = [
            (cost[name][part], row)
            for row, name in enumerate(names)
            if cost[name].get(part, 0.0) > 0
        ]
        for marker, shown in (
            ('o', [point for point in points if point[0] >= least]),
            ('<', [(least, row) for value, row in points if value < least]),
        ):
            if shown:
                axes.scatter(
                    *zip(*shown, strict=True),
                    s=20,
                    marker=marker,
                    linewidths=0,
                    color=COLORS[part],
                    label=CASE_LABELS[part] if marker == 'o' else None,
                    zorder=3,
                )
    line = dict(color=COLORS['both'], linewidth=1, linestyle='--', label='everything quantized')
    axes.axvline(sensitivity['all_cost'], **line)
    axes.set_xscale('log')
    label_rows(axes, names)
    axes.set_xlabel(f'{metric_label(sensitivity["metric"])} (smaller is better)')
    axes.set_title('Effect of quantizing one layer alone on the output of the network')
    legend_below(axes, 3)
    return figure


def metric_label(metric: str) -> str:
    """A metric of ``network_sensitivity`` in words."""
    if metric == 'kl':
        return 'KL divergence from the float model (nats an image)'
    return 'relative squared error of the outputs'


def draw_bits(analysis: Mapping) -> Figure | None:
    """Suggested widths beside the present ones."""
    suggestion = analysis.get('suggestion') or {}
    parts = [part for part in ('weights', 'activations') if suggestion.get(part)]
    if not parts:
        return None
    names = [
        name for name in analysis['layers'] if any(name in suggestion[p]['bits'] for p in parts)
    ]
    figure, panels = new_figure(8, rows=len(names), columns=len(parts))
    for axes, part in zip(panels, parts, strict=True):
        chosen, now = suggestion[part]['bits'], suggestion[part]['now']
        rows = [row for row, name in enumerate(names) if name in chosen]
        widths = [chosen[names[row]] for row in rows]
        axes.barh(rows, widths, height=0.6, color=COLORS[part], label='suggested', zorder=2)
        before = [_largest(now[names[row]]) for row in rows]
        axes.scatter(before, rows, marker='|', s=40, color=COLORS['both'], label='now', zorder=3)
        label_rows(axes, names)
        if axes is not panels[0]:
            axes.set_yticklabels([])
        axes.set_xlim(0, 8.4)
        axes.set_xticks(range(0, 9, 2))
        axes.set_xlabel('bits')
        axes.set_title(f'{part.capitalize()}: {suggestion[part]["size"]}')
    legend_below(panels[0], 2)
    return figure


def _largest(bits: int | Mapping[str, int]) -> int:
    return max(bits.values()) if isinstance(bits, Mapping) else bits


def draw_clip_rate(analysis: Mapping) -> Figure | None:
    """Share of clipped values of every quantizer, layers left and attention operands right."""
    statistics = analysis['activations']

    def draw(panel: Axes, row: int, operands: Mapping[str, str]) -> None:
        for operand, key in operands.items():
            panel.scatter(
                100 * statistics[key]['clip_rate'], row, s=18, color=COLORS[operand], zorder=3
            )

    figure, panels = _draw_rows(statistics, draw)
    for panel in panels:
        panel.set_xlim(left=-0.1)
        panel.set_xlabel('clipped values (%)')
    panels[0].set_title('Values outside the grid of their quantizer')
    return figure


def draw_scales(analysis: Mapping) -> Figure | None:
    """Range of the scales of every quantizer."""
    statistics = analysis['activations']

    def draw(panel: Axes, row: int, operands: Mapping[str, str]) -> None:
        for index, (operand, key) in enumerate(operands.items()):
            scale = statistics[key]['scale']
            place = row + 0.18 * (index - (len(operands) - 1) / 2)
            ends, middle = (scale['smallest'], scale['largest']), scale['median']
            panel.plot(ends, (place, place), color=COLORS[operand], linewidth=0.8, zorder=2)
            box = (scale['first_quartile'], scale['third_quartile'])
            panel.plot(box, (place, place), color=COLORS[operand], linewidth=3, zorder=3)
            panel.plot(middle, place, '|', color='white', markersize=4, zorder=4)

    figure, panels = _draw_rows(statistics, draw)
    for panel in panels:
        panel.set_xscale('log')
        panel.set_xlabel('scale (units of the activation)')
    panels[0].set_title('Scales by channel or head: range, quartiles, median')
    return figure


def _draw_rows(
    statistics: Mapping, draw: Callable[[Axes, int, Mapping[str, str]], None]
) -> tuple[Figure, list[Axes]]:
    """A row for every layer, and for every attention in a panel of its own.

    Args:
        statistics: By name of the quantizer.
        draw: Given the panel, the number of the row, and operand -> name of the quantizer.
    """
    groups = _by_row(statistics)
    rows, columns = max(map(len, groups)), len(groups)
    figure, panels = new_figure(4.2 * columns + 1, rows=rows, columns=columns)
    for panel, rows in zip(panels, groups, strict=True):
        for row, operands in enumerate(rows.values()):
            draw(panel, row, operands)
        label_rows(panel, list(rows))
        _legend(panel, {operand for operands in rows.values() for operand in operands})
    return figure, panels


def _by_row(statistics: Mapping) -> list[dict[str, dict[str, str]]]:
    """Inputs of layers, and operands of attentions: row -> operand -> name of the quantizer."""
    inputs: dict[str, dict[str, str]] = {}
    attentions: dict[str, dict[str, str]] = {}
    for key in statistics:
        name, _, operand = key.rpartition('.')
        rows = inputs if operand == 'input' else attentions
        rows.setdefault(name, {})[operand] = key
    return [rows for rows in (inputs, attentions) if rows]


def _legend(axes: Axes, operands: set[str]) -> None:
    for operand, label in OPERANDS.items():
        if operand in operands:
            axes.scatter([], [], s=18, color=COLORS[operand], label=label)
    if operands != {'input'}:
        legend_below(axes, 4)


def draw_scale_histogram(analysis: Mapping) -> Figure | None:
    """All scales of the model, by what they belong to."""
    histogram = analysis['scale_histogram']
    edges = histogram['edges']
    figure, (axes,) = new_figure(8)
    for operand, counts in histogram['counts'].items():
        axes.stairs(counts, edges, color=COLORS[operand], label=OPERANDS[operand], linewidth=1.4)
    # Layers have a scale a channel, attentions a few: thousands beside dozens.
    axes.set_yscale('log')
    axes.set_ylim(bottom=0.7)
    axes.set_xscale('log')
    axes.set_xlabel('scale (units of the activation)')
    axes.set_ylabel('number of scales')
    axes.set_title('Scales of all activation quantizers')
    axes.legend()
    return figure


DRAWERS: dict[str, Callable[[Mapping], Figure | None]] = {
    'sqnr': draw_sqnr,
    'sensitivity': draw_sensitivity,
    'bits': draw_bits,
    'clip_rate': draw_clip_rate,
    'scales': draw_scales,
    'scale_histogram': draw_scale_histogram,
    'weight_drift': draw_weight_drift,
    'losses': draw_losses,
    'quantizers': draw_watched,
    'pca': draw_pca,
}
FIGURES = tuple(DRAWERS)
