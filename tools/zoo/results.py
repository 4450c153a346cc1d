"""What a work dir holds of a finished run: ``summary.json``, or the log of a float training."""

import json
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mmengine.config import Config

from gplq_mm.evaluation import Decisions

from .decisions import pack
from .files import ZooError

__all__ = ['read_results']

# Metrics of evaluators that tables know: percent, and fractions that become AP points.
METRIC = re.compile(r'accuracy/(top[15])|coco/((?:bbox|segm)_mAP(?:_50|_75)?)')
# Digits that a metafile keeps of a number; the tables show fewer.
DIGITS = 6
# Parts of a summary -> what is kept of them.
PARTS = {
    'weight_drift': ('mae', 'mse'),
    'pca': ('num_components', 'explained_variance'),
}
DISTANCES = ('relative_l2', 'cosine', 'agreement')


def read_results(work_dir: Path, cfg: Config) -> dict[str, Any]:
    """Results of a finished run, as keys of ``Measured``.

    Args:
        work_dir: Folder of the run.
        cfg: Its config. A quantization run has ``summary.json``; of any other training the log's
            metrics after the last epoch are taken, whatever better ones came before.

    Returns:
        ``date``, ``stages`` and, where the run tells, ``iterations``, ``seed``,
        ``seconds_by_step``, ``peak_memory_mb``, ``images``, ``ptq_error``, ``weight_drift``,
        ``pca``, ``decisions``.

    Raises:
        ZooError: If the run is not finished, or has none of the metrics that tables know.
    """
    if cfg.model.get('type') == 'gplq_mm.GPLQ':
        files = [work_dir / 'summary.json']
        results = _of_summary(files[0])
        if (table := work_dir / 'decisions.csv').exists():
            decisions = Decisions.from_csv(table.read_text(encoding='utf-8'))
            results['decisions'] = pack(decisions)
    else:
        # In the order of time; a resumed run has several.
        files = sorted(work_dir.glob('*/vis_data/scalars.json'))
        results = _of_log(work_dir, files, cfg)
    end = max(path.stat().st_mtime for path in files)
    date = datetime.fromtimestamp(end, timezone.utc)
    return {'date': f'{date:%Y-%m-%d}', **_rounded(results)}


def _rounded(value: Any) -> Any:
    """Floats of nested data to so many significant digits."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f'{value:.{DIGITS}g}') if isinstance(value, float) else value


def _known_metrics(metrics: dict) -> dict[str, float]:
    found = {}
    for key, value in metrics.items():
        if match := METRIC.fullmatch(key):
            found[match[1] or match[2]] = value * (1.0 if match[1] else 100.0)
    return found


def _of_summary(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_text(encoding='utf-8'))
        return _of_content(summary)
    except FileNotFoundError as error:
        raise ZooError(f'the run is not finished: {path} does not exist.') from error
    except json.JSONDecodeError as error:
        raise ZooError(f'{path} is damaged ({error}); run again.') from error
    except KeyError as error:
        raise ZooError(f'{path} is no summary of a run: {error} is missing; run again.') from error


def _of_content(summary: dict) -> dict[str, Any]:
    stages = {}
    for stage, metrics in summary['metrics'].items():
        values = _known_metrics(metrics)
        distance = summary['feature_distance'].get(stage, {})
        values |= {key: distance[key] for key in DISTANCES if distance}
        if transfer := summary.get('transfer', {}).get(stage):
            values['transfer'] = transfer
        if values:
            stages[stage] = values
    if not stages:
        raise ZooError(f'the run has none of the metrics {METRIC.pattern}.')
    errors = {
        when: {part: error[part] for part in ('mae', 'mse')}
        for when, error in summary['ptq_error'].items()
    }
    kept = {
        key: {part: summary[key][part] for part in parts}
        for key, parts in PARTS.items()
        if summary[key]
    }
    return {
        'iterations': summary['act_qat_iterations'],
        'seed': summary['seed'],
        'seconds_by_step': summary['seconds'],
        'peak_memory_mb': max(summary['peak_memory_mb'].values()),
        'stages': stages,
        **({'images': summary['images']} if summary.get('images') else {}),
        **kept,
        **({'ptq_error': errors} if errors else {}),
    }


def _of_log(work_dir: Path, files: list[Path], cfg: Config) -> dict[str, Any]:
    loop = cfg.get('train_cfg') or {}
    unit = 'epoch' if loop.get('max_epochs') else 'iteration'
    length = loop.get('max_epochs') or loop.get('max_iters')
    if not length:
        raise ZooError('the config trains nothing; score a checkpoint with tools/test.py instead.')
    last: dict = {}
    for path in files:
        for line in path.read_text(encoding='utf-8').splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                # The line that a kill has cut.
                continue
            if isinstance(entry, dict) and _known_metrics(entry) and 'step' in entry:
                last = entry
    if last.get('step') != length:
        at = f'the last evaluation is of {unit} {last["step"]}' if last else 'nothing was evaluated'
        raise ZooError(f'the run in {work_dir} is not finished: {at}, of {length}.')
    seed = (cfg.get('randomness') or {}).get('seed')
    return {
        **({} if seed is None else {'seed': seed}),
        'stages': {'trained': {**_known_metrics(last), unit: last['step']}},
    }
