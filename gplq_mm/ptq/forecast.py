"""How long Stage 2 will still take."""

import time
from dataclasses import dataclass

# Share of an estimate that counts as if it had been measured to be right.
TRUST = 0.05


@dataclass(frozen=True)
class Progress:
    """How far Stage 2 is.

    Attributes:
        unit: Name of the unit that is worked on, empty before the first.
        position: Its number, from 1; 0 when the units are known and the first begins.
        units: How many there are.
        elapsed: Seconds since the beginning.
        remaining: Seconds to the end, an estimate.
    """

    unit: str
    position: int
    units: int
    elapsed: float
    remaining: float


class Forecast:
    """Remaining seconds of work of several kinds.

    What a kind of work took so far, in comparison with its estimate, corrects the estimate of
    what is left of it. Units differ by more than a factor of ten, so counting them says little.

    Args:
        estimates: Kind of work -> estimated seconds of all of it.
    """

    def __init__(self, estimates: dict[str, float]):
        self._left = dict(estimates)
        self._estimated = {kind: TRUST * seconds for kind, seconds in estimates.items()}
        self._spent = dict(self._estimated)
        self._last = time.monotonic()

    def book(self, kind: str, estimate: float) -> None:
        """Ends a piece of work that began when the last one ended.

        Args:
            kind: Kind of work.
            estimate: Its share of the estimate.
        """
        now = time.monotonic()
        self._left[kind] = max(0.0, self._left[kind] - estimate)
        self._estimated[kind] += estimate
        self._spent[kind] += now - self._last
        self._last = now

    def remaining(self) -> float:
        """Seconds."""
        return sum(
            left * self._spent[kind] / self._estimated[kind]
            for kind, left in self._left.items()
            if left > 0
        )
