"""Streaming statistics of a layer's input."""

import torch
from torch import Tensor

from ..distributed import all_reduce_sum
from ..errors import DataError

# 2 MB of float64: the copy of a chunk stays in a core's cache.
CHUNK_ELEMENTS = 2**18
# Sums of integers up to it are exact in float32.
EXACT_FLOAT32 = 2**24
# Fewer rows at a time are not worth a product of their own.
LEAST_ROWS = 64


class SecondMoment:
    """Count, sum and sum of outer products of the rows seen so far, in float64.

    float64 throughout, because the mean of a transformer's activations often exceeds their
    spread and a float32 sum then loses the covariance (relative error 1e-4 at a ratio of ten,
    1e-12 here). On a CPU it takes 1.3 to 1.8 times as long; TF32 and autocast do not touch it.
    Memory does not grow with the number of rows.

    Sums of small integers, the codes of a layer, are exact in float64, and those of some rows in
    float32, too: on a CPU such products take less than half of the time, for the same result.

    Args:
        features: Length K of a row.
        mean_only: Leaves the outer products out: ``(K, K)`` is 1.2 GB for the box head of a
            detector, and rounding to nearest does not need them.
        largest_integer: Promises that all values are integers of this magnitude at most; None
            promises nothing.

    Raises:
        ValueError: If ``features`` is not positive.
    """

    def __init__(self, features: int, mean_only: bool = False, largest_integer: int | None = None):
        if features < 1:
            raise ValueError(f'features={features!r} must be at least 1.')
        self.features = features
        self.largest_integer = largest_integer
        self.count = 0
        self.is_reduced = False
        self._sum = torch.zeros(features, dtype=torch.float64)
        self._outer: Tensor | None = None
        if not mean_only:
            self._outer = torch.zeros(features, features, dtype=torch.float64)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Adds rows.

        Args:
            x: ``(..., K)``, real values in any dtype. The statistics move to its device.

        Raises:
            ValueError: If the last dimension is not K, or a value is not finite.
            RuntimeError: After :meth:`reduce`, whose result would be counted once per rank.
        """
        if self.is_reduced:
            raise RuntimeError('these statistics are reduced over ranks already; start new ones.')
        if not x.dim() or x.shape[-1] != self.features:
            raise ValueError(
                f'statistics of {self.features} features got a tensor of shape {tuple(x.shape)}.'
            )
        rows = x.detach().reshape(-1, self.features)
        # A non-finite value makes its column's sum non-finite: a cheap test, before any harm.
        total = sum(chunk.sum(0, dtype=torch.float64) for chunk in self._chunks(rows))
        if not total.isfinite().all():
            raise DataError('the input of the statistics has non-finite values.')
        self.count += len(rows)
        self._sum = self._sum.to(x.device).add_(total)
        if self._outer is None:
            return
        self._outer = self._outer.to(x.device)
        exact = self._exact_rows(rows)
        if exact < LEAST_ROWS:
            for chunk in self._chunks(rows):
                chunk = chunk.double()
                self._outer.addmm_(chunk.T, chunk)
            return
        with torch.autocast('cpu', enabled=False):
            for chunk in rows.split(exact):
                chunk = chunk.float()
                self._outer.add_(chunk.T @ chunk)

    def _chunks(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(max(1, CHUNK_ELEMENTS // self.features))

    def _exact_rows(self, rows: Tensor) -> int:
        """Rows whose products have exact sums in float32; 0 where float64 is to be used: a GPU may
        round float32 to fewer bits before it multiplies."""
        if self.largest_integer is None or rows.device.type != 'cpu':
            return 0
        return EXACT_FLOAT32 // max(1, self.largest_integer**2)

    def reduce(self) -> None:
        """Sums over all ranks, once: later calls change nothing. Collective."""
        if self.is_reduced:
            return
        count = torch.tensor(float(self.count), dtype=torch.float64, device=self._sum.device)
        for tensor in (count, self._sum, self._outer):
            if tensor is not None:
                all_reduce_sum(tensor)
        self.count = int(count.item())
        self.is_reduced = True

    def _require_rows(self) -> None:
        if not self.count:
            raise DataError('the statistics are empty: no row was seen.')

    @property
    def mean(self) -> Tensor:
        """Mean row, float64 ``(K,)``; raises ValueError if no row was seen."""
        self._require_rows()
        return self._sum / self.count

    def second_moment(self) -> Tensor:
        """Uncentered ``E[x x^T]``, float64 ``(K, K)``.

        Raises:
            ValueError: If no row was seen.
            RuntimeError: With ``mean_only``.
        """
        self._require_rows()
        if self._outer is None:
            raise RuntimeError('these statistics were made with mean_only=True.')
        moment = self._outer / self.count
        moment = moment + moment.T
        return moment.div_(2)

    def covariance(self) -> Tensor:
        """Centered ``E[(x - mean)(x - mean)^T]``, divided by the count, float64 ``(K, K)``.

        Raises:
            ValueError: If no row was seen.
        """
        mean = self.mean
        covariance = self.second_moment().addr_(mean, mean, alpha=-1)
        # The variance of a constant column may come out negative by a rounding error.
        covariance.diagonal().clamp_(min=0)
        return covariance
