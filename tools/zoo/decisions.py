"""Decisions of runs as a metafile keeps them, a bit a photo, and what is compared by them."""

import base64
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from gplq_mm.evaluation import Decisions, accuracy_difference

__all__ = ['compare', 'difference_text', 'pack', 'ranks', 'same_photos']

Runs = Sequence[Mapping]


def pack(decisions: Decisions) -> dict:
    """Which photos every stage decides right.

    Returns:
        ``images``, their number; ``of``, a digest of names and labels, which is the same for runs
        that are compared in pairs; ``correct``: stage -> bits in base 64 that may stand in a path.
    """
    lines = zip(decisions.images, decisions.labels, strict=True)
    digest = hashlib.sha256('\n'.join(f'{image}\t{label}' for image, label in lines).encode())
    bits = {stage: np.packbits(decisions.correct(stage)) for stage in decisions.predictions}
    return {
        'images': len(decisions.images),
        'of': digest.hexdigest()[:12],
        'correct': {
            stage: base64.urlsafe_b64encode(x.tobytes()).decode() for stage, x in bits.items()
        },
    }


def _correct(run: Mapping, stage: str) -> np.ndarray:
    packed = run['Measured']['decisions']
    data = np.frombuffer(base64.urlsafe_b64decode(packed['correct'][stage]), np.uint8)
    return np.unpackbits(data, count=packed['images']).astype(bool)


def same_photos(*sides: tuple[Runs, str | None]) -> bool:
    """Whether the decisions of all these runs at their stages are known, and of the same photos."""
    found = set()
    for runs, stage in sides:
        for run in runs:
            packed = run['Measured'].get('decisions', {})
            found.add(packed['of'] if stage in packed.get('correct', ()) else None)
    return len(found) == 1 and None not in found


def compare(first: tuple[Runs, str], second: tuple[Runs, str]) -> dict[str, float] | None:
    """:func:`accuracy_difference` of the runs of a model to those of another one, or to a stage.

    Args:
        first: Runs, which differ in the seed, and the stage.
        second: Those that they are compared with.

    Returns:
        None if they cannot be compared.
    """
    if not same_photos(first, second):
        return None
    correct = ([_correct(run, stage) for run in runs] for runs, stage in (first, second))
    return accuracy_difference(*correct)


def difference_text(measured: Mapping, stage: str) -> str:
    """The difference of a stage to FP32 with its interval; empty if it is not known."""
    run = [{'Measured': measured}]
    difference = None if stage == 'fp32' else compare((run, stage), (run, 'fp32'))
    text = ', top-1 to FP32 {points:+.1f} (95 %: {low:+.1f} to {high:+.1f})'
    return text.format(**difference) if difference else ''


def ranks(rows: Sequence[tuple[Runs, str | None]]) -> list[int | None]:
    """The place of every row: one more than there are rows that are better by more than chance.

    So rows whose difference lies within its interval may have the same place.

    Args:
        rows: Runs and stage of each.

    Returns:
        None for a row that is not measured, and for all if those are not scored on the same photos.
    """
    measured = [row for row in rows if row[1] is not None]
    if not same_photos(*measured):
        return [None] * len(rows)
    return [
        None if row[1] is None else 1 + sum(compare(x, row)['low'] > 0 for x in measured)
        for row in rows
    ]
