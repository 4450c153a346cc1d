"""What a run has measured so far, and the table and JSON made from it."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from mmengine.utils.dl_utils import collect_env
from rich.console import Console
from rich.table import Table

from ..checkpoint import atomic_write
from ..version import __version__
from .stage_clock import StageClock

__all__ = ['RunRecord', 'print_summary', 'write_summary']


@dataclass
class RunRecord:
    """Results by stage; travels in every checkpoint, so that a resumed run repeats nothing.

    Attributes:
        metrics: Stage (``fp32``, ``ptq_w4a4``, ``w32a4``, ``latent_fp32``, ``w4a4``) to the
            metrics of that evaluation.
        calibration: Seed and ids of the images that calibrated the activations.
        weight_ptq: Seed and ids of the images of Stage 2, and R^2 of the compensations.
        pca: Number of images and of components, explained variance and spectrum.
        weight_drift: Result of :func:`gplq_mm.evaluation.weight_drift`.
        ptq_error: ``without_stage1`` and ``with_stage1`` (before and after training), of
            ``layer_output_error``.
        feature_distance: Stage to the result of :func:`gplq_mm.evaluation.feature_distance`.
        transfer: Stage to the result of :meth:`gplq_mm.engine.transfer.TransferProbe.measure`.
        clock: Seconds and peak memory.
    """

    metrics: dict = field(default_factory=dict)
    calibration: dict = field(default_factory=dict)
    weight_ptq: dict = field(default_factory=dict)
    pca: dict = field(default_factory=dict)
    weight_drift: dict = field(default_factory=dict)
    ptq_error: dict = field(default_factory=dict)
    feature_distance: dict = field(default_factory=dict)
    transfer: dict = field(default_factory=dict)
    clock: StageClock = field(default_factory=StageClock)

    def images(self, training: int) -> dict[str, int]:
        """Images that each step has read, and all of them, ``seen``.

        An image counts once in a calibration, however many passes that makes, and once for every
        epoch in training.

        Args:
            training: Images of the iterations of training.
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
        state = {key: value for key, value in self.__dict__.items() if key != 'clock'}
        return {**state, 'clock': self.clock.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Continues from :meth:`state_dict`."""
        state = dict(state)
        self.clock.load_state_dict(state.pop('clock'))
        self.__dict__.update(state)


# Metric of a data set's evaluator -> name in the summary, and what makes it percent or AP points.
HEADLINES = {
    'accuracy/top1': ('top1', 1.0),
    'coco/bbox_mAP': ('bbox_mAP', 100.0),
    'coco/segm_mAP': ('segm_mAP', 100.0),
}


def headline_metrics(metrics: dict[str, dict]) -> dict[str, dict]:
    """``{'top1': {stage: value}, ...}`` from the metrics of every stage."""
    table: dict[str, dict] = {}
    for stage, values in metrics.items():
        for key, value in values.items():
            if key in HEADLINES:
                name, factor = HEADLINES[key]
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
        'ptq_error': record.ptq_error,
        'feature_distance': record.feature_distance,
        'transfer': record.transfer,
        'pca': record.pca,
        'calibration': record.calibration,
        'weight_ptq': record.weight_ptq,
        **extra,
        'environment': environment,
    }
    text = json.dumps(summary, indent=2)
    atomic_write(path, lambda file: file.write(text.encode()))
    return summary


TITLES = {
    'fp32': 'FP32',
    'ptq': 'plain PTQ',
    'act': 'Stage 1: activations',
    'latent_fp32': 'latent FP32 after Stage 1',
    'final': 'Stage 2: weights',
}
DIRECT_TITLES = {'latent_fp32': 'latent FP32 after direct QAT', 'final': 'direct QAT'}


def print_summary(summary: dict, console: Console | None = None) -> None:
    """Prints the result tables.

    Args:
        summary: Content of ``summary.json``.
        console: Where to. Defaults to standard output.
    """
    console = console or Console()
    titles = {**TITLES, **(DIRECT_TITLES if summary.get('direct') else {})}
    headlines = headline_metrics(summary['metrics'])
    table = Table(title='accuracy')
    table.add_column('model')
    table.add_column('bits')
    for metric in headlines:
        table.add_column(metric, justify='right')
    table.add_column('feature distance', justify='right')
    transfer = summary.get('transfer')
    if transfer:
        table.add_column('transfer top1', justify='right')
    for row, stage in summary['stages'].items():
        if stage not in summary['metrics']:
            continue
        distance = summary['feature_distance'].get(stage, {}).get('relative_l2')
        bits = 'W32A32' if row in ('fp32', 'latent_fp32') else stage.removeprefix('ptq_').upper()
        cells = [f'{values[stage]:.2f}' for values in headlines.values()]
        cells.append('' if distance is None else f'{distance:.3f}')
        if transfer:
            cells.append(f'{transfer[stage]["top1"]:.2f}' if stage in transfer else '')
        table.add_row(titles[row], bits, *cells)
    console.print(table)

    costs = Table(title='cost')
    for column in ('step', 'seconds', 'peak memory MB'):
        costs.add_column(column, justify='left' if column == 'step' else 'right')
    for stage, seconds in summary['seconds'].items():
        costs.add_row(stage, f'{seconds:.1f}', f'{summary["peak_memory_mb"][stage]:.0f}')
    console.print(costs)
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
