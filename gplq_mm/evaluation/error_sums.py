"""Sums behind errors at one place of a model."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..distributed import all_reduce_sum


def decibels(signal: float, noise: float) -> float | None:
    """Signal-to-noise ratio of two powers in dB; None where one of them is zero."""
    return 10.0 * math.log10(signal / noise) if signal > 0 and noise > 0 else None


def with_means(layers: Mapping[str, Mapping[str, float]]) -> dict:
    """``mae`` and ``mse``, means over layers, and those of the ``layers`` themselves."""
    parts = {name: {key: errors[key] for key in ('mae', 'mse')} for name, errors in layers.items()}
    count = max(len(parts), 1)
    means = {key: sum(part[key] for part in parts.values()) / count for key in ('mae', 'mse')}
    return {**means, 'layers': parts}


class ErrorSums:
    """Adds up an error over batches, which may differ in size, in float64."""

    def __init__(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64)

    def add(self, value: Tensor, exact: Tensor) -> None:
        """Adds a batch.

        Args:
            value: What is computed, any shape.
            exact: What it should be, same shape.
        """
        exact = exact.double()
        difference = value.double() - exact
        self.sums += torch.stack(
            (
                difference.abs().sum(),
                difference.square().sum(),
                exact.square().sum(),
                exact.new_tensor(float(exact.numel())),
            )
        ).cpu()

    def reduce(self) -> dict[str, float | None]:
        """The errors over all batches of all ranks; call it once.

        Returns:
            ``mae`` in units of the value, ``mse`` in their square, ``sqnr_db`` (None where there is
            no signal or no error), and ``relative_l2``, the norm of the error by that of the exact
            value.
        """
        absolute, square, signal, count = all_reduce_sum(self.sums).tolist()
        return {
            'mae': absolute / max(count, 1.0),
            'mse': square / max(count, 1.0),
            'sqnr_db': decibels(signal, square),
            'relative_l2': math.sqrt(square / signal) if signal > 0 else None,
        }
