"""Calibration: from activations to the initial scale and offset of a quantizer.

An observer sees the data in one or two passes. Pass one finds the range of every channel, pass
two (percentile, MSE) fills one histogram a channel over that range. What crosses ranks is a
minimum, a maximum and a sum of counts, so the result does not depend on how the images were
dealt out, and memory does not depend on how many there are.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..distributed import all_reduce_max, all_reduce_min, all_reduce_sum
from ..errors import DataError, SettingError
from ..registry import OBSERVERS, registered
from .functional import POSITIONS
from .levels import choose_levels, table_of, uniform_levels
from .spec import ActSpec

# Bins that are worked on together, so that temporary memory is bounded, too.
BLOCK_BINS = 2**22
# Narrower ranges are given bins of this width in all.
TINY_RANGE = 1e-8
# Ranges and levels are searched in turn so often.
LEVEL_ROUNDS = 2


def by_channel(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Views ``x`` as ``(n, channels)`` for a scale of ``shape`` that broadcasts to it.

    ``shape`` has at most one axis longer than 1, the channel axis. Tokens with their channels
    last, the common case, are not copied.
    """
    for axis, size in enumerate(reversed(shape), start=1):
        if size > 1:
            return x.movedim(-axis, -1).reshape(-1, size)
    return x.reshape(-1, 1)


class MinMaxObserver:
    """Range of every channel; the scale covers it.

    What a grid is, the format of ``spec`` says (:meth:`gplq_mm.quant.Format.cover`).

    Args:
        spec: What to initialise.
        shape: Shape of the scale, broadcastable to the activations.
    """

    num_passes = 1

    def __init__(self, spec: ActSpec, shape: tuple[int, ...]):
        self.spec = spec
        self.format = spec.code_format
        self.shape = tuple(shape)
        # The range of nothing. A rank without data (a RoI head without proposals) takes part in the
        # reductions with it.
        channels = math.prod(self.shape)
        self.low = torch.full((channels,), math.inf)
        self.high = torch.full((channels,), -math.inf)
        self.finished_passes = 0
        # Chosen levels, uint8 (rows, 2**bits), where the format has them.
        self.levels: Tensor | None = None
        # What a squared error counts in the choice of levels, by channel (channels,).
        self.importance = torch.ones(channels)
        # Whether it looks away, since it is not its turn to hold a histogram.
        self.waits = False

    @property
    def histogram_bytes(self) -> int:
        """What it holds from its second pass on until it has seen all."""
        return 0

    def to(self, device: torch.device) -> None:
        """Puts the range to where the data will be and ranks communicate."""
        self.low, self.high = self.low.to(device), self.high.to(device)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Sees one batch.

        Args:
            x: Activations, any shape that ``shape`` broadcasts to.

        Raises:
            DataError: For a NaN or an infinity.
        """
        # Observers with fewer passes wait for the others.
        if self.waits or x.numel() == 0 or self.finished_passes == self.num_passes:
            return
        rows = by_channel(x.detach().float(), self.shape)
        if self.finished_passes == 0:
            low, high = rows.aminmax(dim=0)
            if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
                raise DataError(
                    'calibration met a NaN or an infinite activation; check the checkpoint and '
                    'the calibration images.'
                )
            self.low = torch.minimum(self.low.to(low.device), low)
            self.high = torch.maximum(self.high.to(high.device), high)
        else:
            self._count(rows)

    def _count(self, rows: Tensor) -> None:
        raise AssertionError('a min-max observer has one pass')

    def end_pass(self) -> None:
        """Closes a pass and reduces it across ranks.

        Raises:
            SettingError: On all ranks, if none has seen an activation.
        """
        if self.finished_passes == 0:
            all_reduce_min(self.low)
            all_reduce_max(self.high)
            if not torch.isfinite(self.low).all():
                raise SettingError(
                    'an activation quantizer saw no data in calibration; its layer is never '
                    'reached by the forward pass. Exclude it with a policy rule.'
                )
        self.finished_passes += 1

    def compute(self) -> tuple[Tensor, Tensor]:
        """Scale and offset, float32, both of the scale's shape.

        The offset of a symmetric spec is zero.
        """
        scale, offset = self.format.cover(*self._limits())
        return scale.reshape(self.shape), offset.reshape(self.shape)

    def _limits(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high


OBSERVERS.register_module(name='minmax', module=MinMaxObserver)


class _HistogramObserver(MinMaxObserver):
    """Adds one histogram a channel, filled in the second pass over the range of the first."""

    num_passes = 2
    bins_per_step = 32

    def __init__(self, spec: ActSpec, shape: tuple[int, ...]):
        super().__init__(spec, shape)
        self.counts: Tensor | None = None
        self._covered: tuple[Tensor, Tensor] | None = None

    @property
    def bins(self) -> int:
        """Bins a channel: a grid that uses a quarter of the range still has 8 a step, or 2 a
        position of levels."""
        least = 8 * POSITIONS if self.format.has_levels else 0
        return max(self.bins_per_step * 2**self.spec.bits, least)

    @property
    def histogram_bytes(self) -> int:
        """float64 counts of all channels."""
        return self.low.numel() * self.bins * 8

    def end_pass(self) -> None:
        super().end_pass()
        if self.finished_passes == 1:
            self.width = ((self.high - self.low) / self.bins).clamp(min=TINY_RANGE / self.bins)
            return
        all_reduce_sum(self._histogram())
        if self.format.has_levels:
            self.levels = uniform_levels(self.spec.bits).to(self.low.device)
            for _ in range(LEVEL_ROUNDS):
                self._cover()
                self.levels = choose_levels(self._count_positions(), self.spec.bits)
        self._cover()
        self.counts = None

    def _cover(self) -> None:
        """Searches the range of every channel, for the present levels."""
        parts = (self._histogram(), self.low, self.high, self.width)
        channels = max(1, BLOCK_BINS // self.bins)
        if self.levels is not None:
            parts += (table_of(self.levels).expand(len(self.low), -1),)
        blocks = zip(*(part.split(channels) for part in parts), strict=True)
        found = [self._search(*block) for block in blocks]
        self._covered = tuple(torch.cat(ends) for ends in zip(*found, strict=True))

    def _centers(self, low: Tensor, width: Tensor) -> Tensor:
        steps = torch.arange(self.bins, device=low.device) + 0.5
        return low[:, None] + width[:, None] * steps

    def _count_positions(self) -> Tensor:
        """How much the values at each position count, float64 ``(1, 64)``; with granularity
        ``'head'`` ``(heads, 64)``."""
        scale, offset = self.format.cover(*self._covered)
        positions = self.format.codes(
            self._centers(self.low, self.width), scale[:, None], offset[:, None]
        ).long()
        counts = self._histogram()
        weight = scale.double().square() * self.importance.to(scale.device, torch.float64)
        counts = counts / counts.sum(1, keepdim=True) * weight[:, None]
        sums = counts.new_zeros(len(counts), POSITIONS).scatter_add_(1, positions, counts)
        return sums if self.spec.granularity == 'head' else sums.sum(0, keepdim=True)

    def _histogram(self) -> Tensor:
        if self.counts is None:
            shape = (self.low.numel(), self.bins)
            self.counts = torch.zeros(shape, dtype=torch.float64, device=self.low.device)
        return self.counts

    def _count(self, rows: Tensor) -> None:
        blocks = self._blocks(rows.T, self.low, self.width, self._histogram())
        for part, low, width, counts in blocks:
            index = (part.T - low).div_(width).to(torch.int32).clamp_(0, self.bins - 1)
            index += torch.arange(len(low), device=rows.device, dtype=torch.int32) * self.bins
            counts += torch.bincount(index.flatten(), minlength=counts.numel()).view_as(counts)

    def _blocks(self, *by_channel: Tensor) -> Iterable[tuple[Tensor, ...]]:
        channels = max(1, BLOCK_BINS // self.bins)
        return zip(*(tensor.split(channels) for tensor in by_channel), strict=True)

    def _limits(self) -> tuple[Tensor, Tensor]:
        return self._covered

    def _search(
        self, counts: Tensor, low: Tensor, high: Tensor, width: Tensor, *table: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Ends of the range that is to be covered, of some channels ``(c,)``.

        Args:
            counts: Histogram, float64 ``(c, bins)``.
            low, high: Ends of the range of all values.
            width: Width of a bin.
            table: Level of every position, ``(c, 64)``, where there are levels.
        """
        raise NotImplementedError


class PercentileObserver(_HistogramObserver):
    """Covers from the low to the high percentile of every channel (paper: 1st and 99th)."""

    def _search(
        self, counts: Tensor, low: Tensor, high: Tensor, width: Tensor, *table: Tensor
    ) -> tuple[Tensor, Tensor]:
        share = counts.cumsum(1) / counts.sum(1, keepdim=True)
        low_q, high_q = self.spec.percentile
        first = (share > low_q).double().argmax(1)
        last = (share >= high_q).double().argmax(1)
        return (low + first * width).float(), (low + (last + 1) * width).float()


OBSERVERS.register_module(name='percentile', module=PercentileObserver)


class MSEObserver(_HistogramObserver):
    """Clips where the squared error over the histogram is smallest.

    The two ends of an asymmetric range are searched in turn, each over ``num_candidates``
    positions between the other end and the extreme value, ``num_rounds`` times.
    """

    num_candidates = 24
    num_rounds = 2

    def _search(
        self, counts: Tensor, low: Tensor, high: Tensor, width: Tensor, *table: Tensor
    ) -> tuple[Tensor, Tensor]:
        centers = self._centers(low, width)[:, :, None]
        # float32 is enough to rank candidates, and twice as fast.
        weights = (counts / counts.sum(1, keepdim=True)).float()[:, :, None]
        lowest, highest = low, high
        best = self._error(centers, weights, low, high, *table)
        symmetric = self.spec.zero_point == 'none'
        shares = torch.linspace(0, 1, self.num_candidates + 1)[1:-1].tolist()
        for _ in range(1 if symmetric else self.num_rounds):
            for end in ('high',) if symmetric else ('high', 'low'):
                # The end that stays, fixed while the other moves through its candidates.
                fixed_low, fixed_high = low, high
                for share in shares:
                    if symmetric:
                        trial_low, trial_high = lowest * share, highest * share
                    elif end == 'high':
                        trial_low = fixed_low
                        trial_high = fixed_low + (highest - fixed_low) * share
                    else:
                        trial_low = fixed_high + (lowest - fixed_high) * share
                        trial_high = fixed_high
                    error = self._error(centers, weights, trial_low, trial_high, *table)
                    better = error < best
                    best = torch.where(better, error, best)
                    low = torch.where(better, trial_low, low)
                    high = torch.where(better, trial_high, high)
        return low, high

    def _error(
        self, centers: Tensor, weights: Tensor, low: Tensor, high: Tensor, *table: Tensor
    ) -> Tensor:
        """Squared error ``(c,)`` of values ``(c, bins, 1)``, which count as weights say."""
        grid = (value[:, None, None] for value in self.format.cover(low, high))
        values = self.format.nearest(centers, *grid, *table)
        return values.sub_(centers).square_().mul_(weights).sum((1, 2))


OBSERVERS.register_module(name='mse', module=MSEObserver)


def build_observer(spec: ActSpec, shape: tuple[int, ...]) -> MinMaxObserver:
    """Observer that ``spec`` names, for a scale of ``shape``."""
    return registered(OBSERVERS)[spec.observer](spec, shape)
