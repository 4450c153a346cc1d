"""What a run has left in its folder: the summary and the curves of training."""

import json
import math
from pathlib import Path

from ..engine import result_rows

NEEDED = {'metrics', 'stages', 'feature_distance', 'seconds', 'peak_memory_mb'}

# What is drawn; every line of the log has dozens of other entries.
CURVES = ('loss', 'quant_clip_rate', 'quant_sqnr_db', 'quant_scale')


def read_run(folder: Path, record: dict) -> dict:
    """Reads ``summary.json`` and the scalars that mmengine's ``LocalVisBackend`` has written.

    Args:
        folder: Work dir of the run.
        record: State of the run's :class:`RunRecord` in the checkpoint, for what the summary
            lacks; may be empty.

    Returns:
        ``run``: ``rows`` of the main table (:func:`result_rows`), ``seconds`` and
        ``peak_memory_mb`` by step, ``pca`` and ``weight_drift_history``, each empty if unknown;
        ``curves``: name -> ``[[iteration, value], ...]``; ``notes``: sentences on what is missing
        or damaged.
    """
    notes: list[str] = []
    summary = _read_summary(folder / 'summary.json', notes)
    known = {**record, **summary}
    run = {
        'rows': result_rows(summary) if summary else [],
        'seconds': summary.get('seconds', {}),
        'peak_memory_mb': summary.get('peak_memory_mb', {}),
        'pca': known.get('pca', {}),
        # JSON has strings as keys, a checkpoint has numbers.
        'weight_drift_history': {
            str(key): value for key, value in known.get('weight_drift_history', {}).items()
        },
    }
    return {'run': run, 'curves': _read_curves(folder, notes), 'notes': notes}


def _read_summary(path: Path, notes: list[str]) -> dict:
    if not path.is_file():
        notes.append(
            f'There is no {path.name} beside the checkpoint: accuracy and cost of the run are '
            'left out. A run writes it at its end.'
        )
        return {}
    try:
        summary = json.loads(path.read_text(encoding='utf-8'))
        missing = NEEDED - set(summary)
    except (ValueError, TypeError) as error:
        notes.append(f'{path.name} cannot be read ({error}) and is left out.')
        return {}
    if missing:
        notes.append(f'{path.name} has no {", ".join(sorted(missing))} and is left out.')
        return {}
    return summary


def _read_curves(folder: Path, notes: list[str]) -> dict[str, list]:
    points: dict[str, dict[int, float]] = {}
    damaged = 0
    # The folders are named by the time of their start; a run that was resumed has several.
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        part: dict[int, dict[str, float]] = {}
        for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
            try:
                entry = json.loads(line)
                step = int(entry['step'])
            except (ValueError, TypeError, KeyError):
                damaged += 1
                continue
            found = {key: float(value) for key, value in entry.items() if _is_curve(key)}
            if any('loss' in key for key in found):
                part.setdefault(step, {}).update(found)
        # What a part computes again takes the place of the earlier part's.
        start = next(iter(part), math.inf)
        for key, curve in points.items():
            points[key] = {step: value for step, value in curve.items() if step < start}
        for step, found in part.items():
            for key, value in found.items():
                points.setdefault(key, {})[step] = value
    if damaged:
        notes.append(f'{damaged} line(s) of scalars.json are damaged and were left out.')
    curves = {key: sorted(map(list, curve.items())) for key, curve in points.items() if curve}
    if not curves:
        notes.append(
            'There are no curves of training: no */vis_data/scalars.json with losses lies beside '
            'the checkpoint (the LocalVisBackend writes it).'
        )
    return curves


def _is_curve(key: str) -> bool:
    return key in CURVES or key.startswith('loss_')
