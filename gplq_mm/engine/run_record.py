"""What a run has measured so far, and the table and JSON made from it."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from mmengine.utils.dl_utils import collect_env
from rich.console import Console
from rich.table import Table

from ..checkpoint import atomic_write_text
from ..evaluation import Decisions, accuracy_difference
from ..layers.family import headlines
from ..version import __version__
from .stage_clock import StageClock


@dataclass
class RunRecord:
    """Results by stage; travels in every checkpoint, so that a resumed run repeats nothing.

    Attributes:
        metrics: Stage (``fp32``, ``ptq_w4a4``, ``w32a4``, ``latent_fp32``, ``w4a4``) to the
            metrics of that evaluation.
        calibration: Seed and ids of the images that calibrated the activations.
        weight_ptq: Seed and ids of the images of Stage 2, R^2 of the compensations, and, where
            there was training between the blocks, its iterations and losses.
        pca: Number of images and of components, explained variance and spectrum.
        weight_drift: Result of :func:`gplq_mm.evaluation.weight_drift`.
        weight_drift_history: The same by iteration, of :class:`WeightDriftHook`.
        ptq_error: ``without_stage1`` and ``with_stage1`` (before and after training), of
            ``layer_output_error``.
        feature_distance: Stage to the result of :func:`gplq_mm.evaluation.feature_distance`.
        decisions: Of a classifier, the top-1 decision of every stage on every validation image.
        act_qat_from: Checkpoint of another run whose Stage 1 this one goes on with, or None.
        transfer: Stage to the result of :meth:`gplq_mm.engine.transfer.TransferProbe.measure`.
        clock: Seconds and peak memory.
    """

    metrics: dict = field(default_factory=dict)
    calibration: dict = field(default_factory=dict)
    weight_ptq: dict = field(default_factory=dict)
    pca: dict = field(default_factory=dict)
    weight_drift: dict = field(default_factory=dict)
    weight_drift_history: dict = field(default_factory=dict)
    ptq_error: dict = field(default_factory=dict)
    feature_distance: dict = field(default_factory=dict)
    transfer: dict = field(default_factory=dict)
    decisions: Decisions = field(default_factory=Decisions)
    act_qat_from: str | None = None
    clock: StageClock = field(default_factory=StageClock)

    @property
    def tuning_iterations(self) -> int:
        """Iterations of training between the blocks of Stage 2."""
        return self.weight_ptq.get('tuning_iterations', 0)

    def images(self, training: int) -> dict[str, int]:
        """Images that each step has read, and all of them, ``seen``.

        An image counts once in a calibration, however many passes that makes, and once for every
        epoch in training.

        Args:
            training: Images of the iterations of training, those of Stage 2 among them.
        """
        steps = {
            'calibration': self.calibration.get('num_images', 0),
            'pca': self.pca.get('num_images', 0),
            'training': training,
            'weight_ptq': self.weight_ptq.get('num_images', 0),
        }
        return {**steps, 'seen': sum(steps.values())}

    def state_dict(self) -> dict:
        """Plain data."""
        parts = {'clock': self.clock.state_dict(), 'decisions': self.decisions.state_dict()}
        return {**self.__dict__, **parts}

    def load_state_dict(self, state: dict) -> None:
        """Continues from :meth:`state_dict`."""
        state = dict(state)
        self.clock.load_state_dict(state.pop('clock'))
        self.decisions = Decisions(**state.pop('decisions', {}))
        self.__dict__.update(state)

    def continue_from(self, state: dict, source: str) -> None:
        """Goes on where another run has ended Stage 1.

        Its plain PTQ stays behind: it belongs to the weight grid of that run.

        Args:
            state: Of :meth:`state_dict`.
            source: The checkpoint that it comes from.
        """
        self.load_state_dict(state)
        self.act_qat_from = source
        for table in (self.metrics, self.feature_distance, self.decisions.predictions):
            for name in [name for name in table if name.startswith('ptq_')]:
                del table[name]
        self.ptq_error.pop('without_stage1', None)

    def differences(self) -> dict[str, dict[str, float]]:
        """Stage -> :func:`accuracy_difference` to FP32, of a classifier."""
        decisions = self.decisions
        if 'fp32' not in decisions.predictions:
            return {}
        reference = decisions.correct('fp32')
        return {
            stage: accuracy_difference(decisions.correct(stage), reference)
            for stage in decisions.predictions
            if stage != 'fp32'
        }


def stage_bits(stage: str) -> str:
    """Widths that a stage computes with, such as ``'W4A4'`` of ``'ptq_w4a4'``."""
    quantized = re.search(r'w\d+a\d+', stage)
    return quantized[0].upper() if quantized else 'W32A32'


def headline_metrics(metrics: dict[str, dict]) -> dict[str, dict]:
    """``{'top1': {stage: value}, ...}`` from the metrics of every stage."""
    table: dict[str, dict] = {}
    known = headlines()
    for stage, values in metrics.items():
        for key, value in values.items():
            if key in known:
                name, factor = known[key]
                # CocoMetric gives fractions of three digits; the product would have sixteen.
                table.setdefault(name, {})[stage] = round(value * factor, 9)
    return table


def write_summary(path: Path, record: RunRecord, extra: dict) -> dict:
    """Writes ``summary.json`` atomically and returns its content.

    Args:
        path: The file.
        record: What was measured.
        extra: Entries that describe the run (policy, config, checkpoints).
    """
    environment = {str(key): str(value) for key, value in collect_env().items()}
    environment['gplq_mm'] = __version__
    summary = {
        **headline_metrics(record.metrics),
        'metrics': record.metrics,
        'seconds': record.clock.seconds,
        'peak_memory_mb': record.clock.peak_memory_mb,
        'weight_drift': record.weight_drift,
        'weight_drift_history': record.weight_drift_history,
        'ptq_error': record.ptq_error,
        'feature_distance': record.feature_distance,
        'difference_to_fp32': record.differences(),
        'transfer': record.transfer,
        'pca': record.pca,
        'calibration': record.calibration,
        'weight_ptq': record.weight_ptq,
        'act_qat_from': record.act_qat_from,
        **extra,
        'environment': environment,
    }
    atomic_write_text(path, json.dumps(summary, indent=2))
    return summary


TITLES = {
    'fp32': 'FP32',
    'ptq': 'plain PTQ',
    'act': 'Stage 1: activations',
    'latent_fp32': 'latent FP32 after Stage 1',
    'final': 'Stage 2: weights',
}
DIRECT_TITLES = {'latent_fp32': 'latent FP32 after direct QAT', 'final': 'direct QAT'}


def result_rows(summary: dict) -> list[dict]:
    """The main table: one row for each stage that was evaluated.

    Args:
        summary: Content of ``summary.json``.

    Returns:
        ``title``, ``bits``, ``metrics`` (name -> value), ``difference`` (of top-1 to FP32, with its
        interval, or None), and ``feature_distance`` and ``transfer`` (top-1 of the linear probe),
        each a number or None.
    """
    titles = {**TITLES, **(DIRECT_TITLES if summary.get('direct') else {})}
    values_of = headline_metrics(summary['metrics'])
    rows = []
    for row, stage in summary['stages'].items():
        if stage not in summary['metrics']:
            continue
        rows.append(
            {
                'title': titles[row],
                'bits': stage_bits(stage),
                'metrics': {name: values[stage] for name, values in values_of.items()},
                'difference': summary.get('difference_to_fp32', {}).get(stage),
                'feature_distance': summary['feature_distance'].get(stage, {}).get('relative_l2'),
                'transfer': summary.get('transfer', {}).get(stage, {}).get('top1'),
            }
        )
    return rows


def _interval(difference: dict | None) -> str:
    return '{points:+.1f} ({low:+.1f} to {high:+.1f})'.format(**difference) if difference else ''


def print_summary(summary: dict, console: Console | None = None) -> None:
    """Prints the result tables.

    Args:
        summary: Content of ``summary.json``.
        console: Where to. Defaults to standard output.
    """
    console = console or Console()
    rows = result_rows(summary)
    table = Table(title='accuracy')
    table.add_column('model')
    table.add_column('bits')
    for metric in rows[0]['metrics'] if rows else ():
        table.add_column(metric, justify='right')
    if summary.get('difference_to_fp32'):
        table.add_column('top1 to FP32 (95 %)', justify='right')
    table.add_column('feature distance', justify='right')
    transfer = summary.get('transfer')
    if transfer:
        table.add_column('transfer top1', justify='right')
    for row in rows:
        distance = row['feature_distance']
        cells = [f'{value:.2f}' for value in row['metrics'].values()]
        if summary.get('difference_to_fp32'):
            cells.append(_interval(row['difference']))
        cells.append('' if distance is None else f'{distance:.3f}')
        if transfer:
            cells.append('' if row['transfer'] is None else f'{row["transfer"]:.2f}')
        table.add_row(row['title'], row['bits'], *cells)
    console.print(table)

    costs = Table(title='cost')
    for column in ('step', 'seconds', 'peak memory MB'):
        costs.add_column(column, justify='left' if column == 'step' else 'right')
    for stage, seconds in summary['seconds'].items():
        costs.add_row(stage, f'{seconds:.1f}', f'{summary["peak_memory_mb"][stage]:.0f}')
    console.print(costs)
    if summary.get('act_qat_from'):
        console.print(f'Stage 1 is that of {summary["act_qat_from"]}')
    drift = summary['weight_drift']
    if drift:
        console.print(f'weight drift: MAE {drift["mae"]:.3g}, MSE {drift["mse"]:.3g}')
    final = summary['stages']['final'].upper()
    for key, start in (('without_stage1', 'W32A32'), ('with_stage1', f'W32{final[2:]}')):
        error = summary['ptq_error'].get(key)
        if error:
            console.print(
                f'PTQ error {start} -> {final}: MAE {error["mae"]:.3g}, MSE {error["mse"]:.3g} '
                'a layer'
            )
