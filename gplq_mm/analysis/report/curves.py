"""The pictures of a run's history: losses, drift of the weights, the spectrum of the features."""

from collections.abc import Mapping
from itertools import accumulate

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from .style import new_figure, shorten

LOSS_COLORS = ('#333333', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
WATCHED = {
    'quant_clip_rate': 'mean clip rate',
    'quant_sqnr_db': 'mean SQNR (dB)',
    'quant_scale': 'mean scale',
}


def draw_weight_drift(analysis: Mapping) -> Figure | None:
    """Deviation of the weights by layer and iteration, and its mean."""
    history = analysis['run'].get('weight_drift_history')
    if not history:
        return None
    iterations = sorted(history, key=int)
    layers = list(history[iterations[-1]]['layers'])
    height = max(3.0, 1.2 + 0.16 * len(layers))
    figure = Figure(figsize=(8, 2.4 + height), layout='constrained')
    top, bottom = figure.subplots(2, 1, height_ratios=[2.4, height])
    steps = [int(iteration) for iteration in iterations]
    for key, power, label, color in (
        ('mae', 1.0, 'mean absolute', '#0072B2'),
        ('mse', 0.5, 'root mean square', '#D55E00'),
    ):
        values = [history[iteration][key] ** power for iteration in iterations]
        top.plot(steps, values, 'o-', color=color, markersize=3, label=label)
    # A weight that has not moved has no place on a logarithmic scale.
    if any(history[iteration][key] > 0 for iteration in iterations for key in ('mae', 'mse')):
        top.set_yscale('log')
    top.set_xlabel('iteration')
    top.set_ylabel('units of the weight')
    top.set_title('Deviation of the weights from the original, mean over layers')
    top.legend()
    values = [[history[i]['layers'][name]['mae'] for i in iterations] for name in layers]
    positive = [value for row in values for value in row if value > 0]
    if positive:
        norm = LogNorm(min(positive), max(max(positive), min(positive) * 1.01))
        mesh = bottom.pcolormesh(
            range(len(steps) + 1), range(len(layers) + 1), values, norm=norm, cmap='viridis'
        )
        figure.colorbar(mesh, ax=bottom, label='MAE (units of the weight)', shrink=0.7)
    bottom.grid(False)
    shown = range(0, len(steps), -(-len(steps) // 12))
    bottom.set_xticks([i + 0.5 for i in shown], [str(steps[i]) for i in shown])
    bottom.set_yticks(
        [row + 0.5 for row in range(len(layers))], [shorten(name) for name in layers], fontsize=7
    )
    bottom.tick_params(axis='y', length=0)
    bottom.set_ylim(len(layers), 0)
    bottom.set_xlabel('iteration')
    bottom.set_title('Mean absolute deviation by layer')
    return figure


def draw_losses(analysis: Mapping) -> Figure | None:
    """Losses over the iterations."""
    # A loss of weight 0 is recorded and says nothing.
    curves = {
        key: value
        for key, value in analysis['curves'].items()
        if 'loss' in key and any(loss for _, loss in value)
    }
    if not curves:
        return None
    figure, (axes,) = new_figure(8)
    names = sorted(curves, key=lambda key: (key != 'loss', key))
    for index, name in enumerate(names):
        steps, values = zip(*curves[name], strict=True)
        axes.plot(
            steps,
            values,
            color=LOSS_COLORS[index % len(LOSS_COLORS)],
            linewidth=1.8 if name == 'loss' else 1.1,
            marker='.' if len(steps) < 60 else None,
            markersize=4,
            label=name,
        )
    if all(value > 0 for name in names for _, value in curves[name]):
        axes.set_yscale('log')
    axes.set_xlabel('iteration')
    axes.set_ylabel('loss')
    axes.set_title('Losses of training')
    axes.legend(ncol=2)
    return figure


def draw_watched(analysis: Mapping) -> Figure | None:
    """What the log says of the activation quantizers while they learn."""
    curves = analysis['curves']
    names = [name for name in WATCHED if curves.get(name)]
    if not names:
        return None
    figure, panels = new_figure(max(4.5, 3.0 * len(names)), height=2.6, columns=len(names))
    for axes, name in zip(panels, names, strict=True):
        steps, values = zip(*curves[name], strict=True)
        axes.plot(steps, values, '.-', color='#0072B2', linewidth=1.2, markersize=4)
        axes.set_xlabel('iteration')
        axes.set_title(WATCHED[name])
    return figure


def draw_pca(analysis: Mapping) -> Figure | None:
    """Cumulated explained variance of the teacher's features."""
    pca = analysis['run'].get('pca')
    if not pca:
        return None
    shares = [100 * share for share in accumulate(pca['spectrum'])]
    figure, (axes,) = new_figure(8)
    axes.plot(range(1, len(shares) + 1), shares, color='#0072B2', linewidth=1.6)
    chosen = pca['num_components']
    axes.axvline(chosen, color='#D55E00', linewidth=1, linestyle='--')
    axes.annotate(
        f'{chosen} components: {100 * pca["explained_variance"]:.1f} %',
        (chosen, 100 * pca['explained_variance']),
        xytext=(8, -14),
        textcoords='offset points',
        color='#D55E00',
    )
    axes.set_ylim(0, 102)
    axes.set_xlim(0, len(shares) * 1.02)
    axes.set_xlabel('number of principal components')
    axes.set_ylabel('explained variance (%)')
    axes.set_title("Variance of the teacher's features")
    return figure
