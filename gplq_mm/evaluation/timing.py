"""Fair timing: candidates take turns, so that whatever disturbs the machine disturbs all of them.

Several engines in one process keep threads that spin for a while after their work. Between two
candidates there is a pause, and the first call of a turn is not counted.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ['Timing', 'interleave']

WARM_UP_CALLS = 3
# Longer than the threads of OpenMP and ONNX Runtime spin.
PAUSE = 0.02


@dataclass(frozen=True)
class Timing:
    """Durations of one candidate.

    Attributes:
        samples: Milliseconds per call, one sample a round.
    """

    samples: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.samples)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        """First and third quartile; the median twice for a single round."""
        if len(self.samples) < 2:
            return self.median_ms, self.median_ms
        first, _, third = statistics.quantiles(self.samples, n=4, method='inclusive')
        return first, third


def _duration(call: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def interleave(
    candidates: dict[str, Callable[[], Any]],
    rounds: int = 15,
    sample_seconds: float = 0.1,
    pause: float = PAUSE,
    track: Callable[[Iterable], Iterator] = iter,
) -> dict[str, Timing]:
    """Times candidates in turns.

    Every round visits all candidates, starting with another one each time. A turn is a pause,
    one call that is not counted, and as many calls as fill ``sample_seconds`` (at least one).

    Args:
        candidates: Name -> a call without arguments.
        rounds: Turns of each candidate.
        sample_seconds: Length of a sample.
        pause: Seconds of rest before a turn.
        track: Wraps the rounds to show progress.

    Returns:
        Name -> timing, in the order of ``candidates``.

    Raises:
        ValueError: If ``rounds`` is below 1.
    """
    if rounds < 1:
        raise ValueError(f'rounds={rounds} must be at least 1.')
    calls = {}
    for name, call in candidates.items():
        for _ in range(WARM_UP_CALLS - 1):
            call()
        calls[name] = max(1, math.ceil(sample_seconds / max(_duration(call, 1), 1e-7)))
    names = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in track(range(rounds)):
        first = index % max(len(names), 1)
        for name in names[first:] + names[:first]:
            time.sleep(pause)
            candidates[name]()
            samples[name].append(1e3 * _duration(candidates[name], calls[name]))
    return {name: Timing(tuple(values)) for name, values in samples.items()}
