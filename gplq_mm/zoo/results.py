"""What a work dir holds of a finished run: ``summary.json``, or the log of a float training."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ..layers.family import headlines
from .files import ZooError

__all__ = ['read_results', 'result_time']

METRICS = {
    **headlines(),
    'accuracy/top5': ('top5', 1.0),
    **{
        f'coco/{kind}_mAP_{iou}': (f'{kind}_mAP_{iou}', 100.0)
        for kind in ('bbox', 'segm')
        for iou in (50, 75)
    },
}
# Digits that a metafile keeps of a number; the tables show fewer.
DIGITS = 6
PCA_PARTS = ('num_components', 'explained_variance')


def rounded(value: Any) -> Any:
    """Floats of nested data to six significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f'{value:.{DIGITS}g}') if isinstance(value, float) else value


def read_results(work_dir: Path, cfg: Config, since: float = 0.0) -> dict[str, Any]:
    """Results of a finished run, as keys of ``Measured``.

    Args:
        work_dir: Folder of the run.
        cfg: Its config. A quantization run has ``summary.json``; of any other training the log's
            metrics after the last epoch are taken, whatever better ones came before.
        since: Logs that begin before this time (seconds of the epoch) belong to another run.

    Returns:
        ``stages`` and, where the run tells, ``iterations``, ``seed``, ``seconds_by_step``,
        ``peak_memory_mb``, ``images``, ``ptq_error``, ``weight_drift``, ``pca``.

    Raises:
        ZooError: If the run is not finished, or has none of the metrics that tables know.
    """
    work_dir = Path(work_dir)
    if cfg.model.get('type') == 'gplq_mm.GPLQ':
        return rounded(_of_summary(work_dir / 'summary.json'))
    return rounded(_of_log(work_dir, cfg, since))


def result_time(work_dir: Path) -> float:
    """When the results of a run were written, seconds of the epoch; 0 without any."""
    summary = Path(work_dir) / 'summary.json'
    files = [summary] if summary.exists() else Path(work_dir).glob('*/vis_data/scalars.json')
    return max((path.stat().st_mtime for path in files), default=0.0)


def _known_metrics(metrics: dict) -> dict[str, float]:
    found = {}
    for key, value in metrics.items():
        if key in METRICS:
            name, factor = METRICS[key]
            found[name] = value * factor
    return found


def _of_summary(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        raise ZooError(f'the run is not finished: {path} does not exist.') from error
    except ValueError as error:
        raise ZooError(f'{path} is damaged ({error}); run again.') from error
    try:
        return _of_content(summary)
    except KeyError as error:
        raise ZooError(f'{path} is no summary of a run: {error} is missing; run again.') from error


def _of_content(summary: dict) -> dict[str, Any]:
    stages = {}
    for stage, metrics in summary['metrics'].items():
        values = _known_metrics(metrics)
        distance = summary['feature_distance'].get(stage, {})
        values |= {key: distance[key] for key in ('relative_l2', 'cosine', 'agreement') if distance}
        if summary.get('transfer', {}).get(stage):
            values['transfer'] = summary['transfer'][stage]
        if values:
            stages[stage] = values
    if not stages:
        raise ZooError(f'the run has none of the metrics {sorted(METRICS)}.')
    result = {'iterations': summary['act_qat_iterations'], 'seed': summary['seed']}
    result['seconds_by_step'] = summary['seconds']
    result['peak_memory_mb'] = max(summary['peak_memory_mb'].values())
    result['stages'] = stages
    if summary.get('images'):
        result['images'] = summary['images']
    for key, parts in (('weight_drift', ('mae', 'mse')), ('pca', PCA_PARTS)):
        if summary[key]:
            result[key] = {part: summary[key][part] for part in parts}
    errors = {
        when: {part: error[part] for part in ('mae', 'mse')}
        for when, error in summary['ptq_error'].items()
    }
    return {**result, **({'ptq_error': errors} if errors else {})}


def _of_log(work_dir: Path, cfg: Config, since: float) -> dict[str, Any]:
    loop = cfg.get('train_cfg') or {}
    unit = 'epoch' if loop.get('max_epochs') else 'iteration'
    length = loop.get('max_epochs') or loop.get('max_iters')
    if not length:
        raise ZooError('the config trains nothing; score a checkpoint with tools/test.py instead.')
    last: dict = {}
    for entry in _evaluations(work_dir, since):
        last = entry
    if last.get('step') != length:
        at = f'the last evaluation is of {unit} {last["step"]}' if last else 'nothing was evaluated'
        raise ZooError(f'the run in {work_dir} is not finished: {at}, of {length}.')
    seed = (cfg.get('randomness') or {}).get('seed')
    return {
        **({} if seed is None else {'seed': seed}),
        'stages': {'trained': {**_known_metrics(last), unit: last['step']}},
    }


def _evaluations(work_dir: Path, since: float) -> Iterator[dict]:
    """Lines of mmengine's logs with metrics, in the order of time; a resumed run has several."""
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        if path.stat().st_mtime < since:
            continue
        for line in path.read_text(encoding='utf-8').splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                # The line that a kill has cut.
                continue
            if isinstance(entry, dict) and _known_metrics(entry) and 'step' in entry:
                yield entry
