"""Fair timing: candidates take turns, so that whatever disturbs the machine disturbs all of them.

Several engines in one process keep threads that spin for a while after their work. Between two
candidates there is a pause, and the first calls of a turn are not counted.
"""

import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

# What is timed: it takes no arguments.
Call = Callable[[], Any]
# Prepares a call; what it returns takes a sample, in milliseconds per call.
Clock = Callable[[Call], Callable[[], float]]
# Longer than the threads of OpenMP and ONNX Runtime spin.
PAUSE = 0.02


class Timing(NamedTuple):
    """Milliseconds per call of one candidate, over the rounds."""

    median_ms: float
    quartile1_ms: float
    quartile3_ms: float
    rounds: int

    @classmethod
    def of(cls, samples: list[float]) -> 'Timing':
        """Statistics of milliseconds, one sample a round."""
        first, median, third = np.percentile(samples, (25, 50, 75)).tolist()
        return cls(median, first, third, len(samples))


def bound(function: Callable, *args) -> Call:
    """``function(*args)`` in inference mode."""
    return torch.inference_mode()(partial(function, *args))


def wall_clock(call: Call, sample_seconds: float = 0.1) -> Callable[[], float]:
    """Clock of all that a call does, on the threads that torch has now.

    A sample is the mean of as many calls as fill ``sample_seconds`` (at least one), behind two
    that are not counted. It begins and ends when the GPU, if there is one, has nothing to do.
    """
    # Warns on a machine with nvcc and no GPU, so that who needs no clock does without.
    from torch.utils.benchmark import Timer

    timer = Timer('call()', globals={'call': call}, num_threads=torch.get_num_threads())
    number = max(1, math.ceil(sample_seconds / max(timer.timeit(1).median, 1e-7)))
    return lambda: 1e3 * timer.timeit(number).median


def gpu_clock(call: Call) -> Callable[[], float]:
    """Clock of a GPU's own time: a median over calls, each with an empty L2 cache."""
    from triton.testing import do_bench

    # Compiles and tunes.
    call()
    return partial(do_bench, call, warmup=10, rep=60, return_mode='median')


def interleave(
    candidates: dict[str, Call],
    rounds: int = 15,
    clock: Clock = wall_clock,
    pause: float = PAUSE,
    track: Callable[[Iterable], Iterable] = iter,
) -> dict[str, Timing]:
    """Times candidates in turns.

    Every round visits all candidates, starting with another one each time. A turn is a pause and
    a sample.

    Args:
        candidates: Name -> a call without arguments.
        rounds: Turns of each candidate.
        clock: Takes the samples.
        pause: Seconds of rest before a turn.
        track: Wraps the rounds to show progress.

    Returns:
        Name -> timing, in the order of ``candidates``.

    Raises:
        ValueError: If ``rounds`` is below 1.
    """
    if rounds < 1:
        raise ValueError(f'rounds={rounds} must be at least 1.')
    clocks = {name: clock(call) for name, call in candidates.items()}
    names, samples = list(clocks), {name: [] for name in clocks}
    for index in track(range(rounds)):
        first = index % max(len(names), 1)
        for name in names[first:] + names[:first]:
            time.sleep(pause)
            samples[name].append(clocks[name]())
    return {name: Timing.of(values) for name, values in samples.items()}
