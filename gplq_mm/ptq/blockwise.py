"""Stage 2: weights, one unit at a time, each on the stream that the units before it produce.

Units are visited in the order in which the model runs them (:mod:`.stream`). Memory holds the
statistics of one unit; what flows between units is kept in memory up to a budget and on disk
beyond it. The statistics of a unit that runs several times in a forward are those of all calls.
"""

import time
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, closing
from typing import Any, Protocol

import torch
from torch import nn

from ..distributed import broadcast_, ranks_end_together
from ..errors import DataError
from ..layers import (
    Compensation,
    QuantWeightLayer,
    compiled_products,
    find_blocks,
    quant_layers,
    require_frozen,
)
from ..layers.compensation import block_input
from .forecast import Forecast, Progress
from .statistics import SecondMoment
from .stream import Stream, last_readers, trace_units
from .tensor_store import Memory, TensorStore
from .unit import Unit

# A first guess, corrected while Stage 2 runs: what a batch takes in all, in forwards of a unit,
# and seconds that rounding takes a column and a multiply-add of the Hessian with the weight.
FORWARDS = 2.5
SECONDS_PER_COLUMN = 3e-4
SECONDS_PER_PRODUCT = 5e-10
# An iteration of tuning, in forwards of the model on a calibration batch.
TUNING_FORWARDS = 4.0


class Tuning(Protocol):
    """What trains the weights that are still float, after each residual block."""

    iters_per_block: int

    def run(self, block: str) -> Generator[None]:
        """Iterations behind the block of this name; yields after each."""


def _round(layer: QuantWeightLayer, method: Callable, moment: SecondMoment | None) -> None:
    weight, permutation = layer.foldable()
    second_moment = mean = None
    if moment is not None:
        mean = moment.mean.to(weight.device)
        if method.needs_second_moment:
            # A free bias absorbs the mean error of a folded layer, so only the spread counts.
            second_moment = moment.covariance() if layer.is_folded else moment.second_moment()
    value = method(weight, layer.weight_quantizer.spec, permutation, second_moment)
    layer.set_quantized_weight(value, mean)
    _share(layer)


def _share(layer: QuantWeightLayer) -> None:
    quantizer = layer.weight_quantizer
    broadcast_([quantizer.codes, quantizer.row_scale, quantizer.multiplier, quantizer.bias])


@torch.no_grad()
def round_weights(model: nn.Module, method: Callable) -> None:
    """Rounds all weights without data: plain weight PTQ, the baseline.

    Args:
        model: Quantized model with calibrated activation quantizers.
        method: PTQ method that needs no statistics.

    Raises:
        DataError: If the method needs statistics.
    """
    if method.needs_second_moment:
        raise DataError(f'{type(method).__name__} needs calibration images; use quantize_weights.')
    for layer in quant_layers(model).values():
        _round(layer, method, None)


@ranks_end_together()
@torch.no_grad()
def quantize_weights(
    model: nn.Module,
    batches: Iterable,
    forward: Callable[[Any], Any],
    method: Callable,
    report: Callable[[Progress], None] = lambda _progress: None,
    memory_bytes: int = 2**30,
    tuning: Tuning | None = None,
) -> dict[str, float]:
    """Quantizes all weights of a model unit by unit and fits the compensations.

    Args:
        model: Quantized model in eval mode with frozen activation quantizers.
        batches: This rank's calibration batches.
        forward: ``forward(batch)`` runs the model on one batch.
        method: PTQ method: ``method(weight, spec, permutation, second_moment)`` rounds a layer.
            If it has ``reconstruct(unit)``, that is then called for every :class:`.unit.Unit`.
        report: Told after every step how far it is.
        memory_bytes: What images and activations may hold in memory before they go to disk.
        tuning: Trains the weights that are still float, after each residual block; or None.

    Returns:
        Held-out R^2 of the compensation of every block that has one.

    Raises:
        NotCalibratedError: If an activation quantizer is not frozen.
        DataError: If there is no batch, or the model cannot be cut into units.
    """
    require_frozen(model)
    memory = Memory(memory_bytes)
    kept = TensorStore(memory)
    for batch in batches:
        kept.append(batch)
    if not len(kept):
        raise DataError('Stage 2 got no calibration images; give at least one.')
    for layer in quant_layers(model).values():
        layer.weight_quantizer.clear()
    for module in model.modules():
        if isinstance(module, Compensation):
            module.start()
    stage = _Stage2(model, kept, forward, method, report, memory, tuning)
    scores = {}
    for position, name in enumerate(stage.stream.units):
        score = stage.process(position)
        if score is not None:
            scores[name] = score
    stage.stream.close()
    return scores


class _Stage2:
    """The steps of :func:`quantize_weights`, whose arguments it takes."""

    def __init__(self, model, kept, forward, method, report, memory, tuning):
        self.model, self.method, self.report = model, method, report
        self.tuning = tuning
        self.reconstructs = hasattr(method, 'reconstruct')
        self.start = time.monotonic()

        def run_one() -> None:
            forward(kept[0])

        trace = trace_units(model, run_one)
        last_reader = last_readers(model, trace, run_one)
        self.stream = Stream(model, kept, forward, trace.calls, last_reader, memory)
        # Seconds of the steps of each unit.
        self.estimates = {
            name: {'forward': FORWARDS / 2 * seconds, 'rounding': self._rounding_seconds(name)}
            for name, seconds in trace.seconds.items()
        }
        forwards = sum(2 * len(kept) * e['forward'] for e in self.estimates.values())
        rounding = sum(e['rounding'] for e in self.estimates.values())
        totals = {'forward': forwards, 'rounding': rounding}
        # Behind the last unit there is nothing left to train.
        tuned = [] if tuning is None else set(find_blocks(model)) & set(self.stream.units[:-1])
        for name in tuned:
            self.estimates[name]['tuning'] = TUNING_FORWARDS * sum(trace.seconds.values())
        totals['tuning'] = sum(
            self.tuning.iters_per_block * self.estimates[name]['tuning'] for name in tuned
        )
        self.forecast = Forecast(totals)
        self._tell('', 0)

    def _rounding_seconds(self, name: str) -> float:
        seconds = 0.0
        for layer in quant_layers(self.model.get_submodule(name)).values():
            rows, columns = layer.weight_quantizer.shape
            seconds += SECONDS_PER_COLUMN * columns + SECONDS_PER_PRODUCT * rows * columns**2
        return seconds

    def _done(self, position: int, kind: str) -> None:
        name = self.stream.units[position]
        self.forecast.book(kind, self.estimates[name][kind])
        self._tell(name, position + 1)

    def _tell(self, name: str, number: int) -> None:
        elapsed = time.monotonic() - self.start
        left = self.forecast.remaining()
        self.report(Progress(name, number, len(self.stream.units), elapsed, left))

    def process(self, position: int) -> float | None:
        """Quantizes the layers of a unit and fits its compensation, whose R^2 it returns."""
        unit = self.model.get_submodule(self.stream.units[position])
        compensation = getattr(unit, 'compensation', None)
        inputs, results = self.stream.store(), self.stream.store()
        moments, compensates = self._observe(position, unit, inputs, results)
        layers, means = quant_layers(unit), {}
        for name, layer in layers.items():
            moment = moments.pop(name)
            moment.reduce()
            means[name] = moment.mean.to(layer.weight.device)
            _round(layer, self.method, moment)
        if self.reconstructs:
            with torch.enable_grad():
                self.method.reconstruct(Unit(unit, layers, means, inputs, results))
            for layer in layers.values():
                _share(layer)
        self._done(position, 'rounding')
        self._run(position, unit, inputs, results, compensates)
        score = None
        if compensates:
            score = compensation.fit()
            if compensation.is_fitted:
                broadcast_([compensation.weight, compensation.bias])
                self._correct(compensation, inputs, results)
        inputs.close()
        self.stream.finish(position, results)
        self._tune(position)
        return score

    def _tune(self, position: int) -> None:
        """Lets the weights that are still float make up for those that no longer are."""
        name = self.stream.units[position]
        if 'tuning' in self.estimates[name]:
            with closing(self.tuning.run(name)) as iterations:
                for _ in iterations:
                    self._done(position, 'tuning')

    def _observe(
        self, position: int, unit: nn.Module, inputs: TensorStore, targets: TensorStore
    ) -> tuple[dict[str, SecondMoment], bool]:
        """Runs the unit with latent weights: statistics of its layers, its inputs, and its targets
        if they are needed.

        Also says whether it is compensated: a block that changes the shape has no parallel linear
        map.
        """
        layers = quant_layers(unit)
        moments = {
            name: SecondMoment(
                layer.weight_quantizer.shape[1],
                not self.method.needs_second_moment,
                layer.largest_operand(),
            )
            for name, layer in layers.items()
        }
        compensates = hasattr(unit, 'compensation')
        with ExitStack() as stack:
            for name, layer in layers.items():
                handle = layer.register_forward_pre_hook(
                    lambda module, args, name=name: moments[name].update(
                        module.operand_rows(args[0])
                    )
                )
                stack.callback(handle.remove)
            stack.enter_context(compiled_products(unit))
            for index in range(len(self.stream)):
                calls = self.stream.capture(position, index)
                inputs.append(calls)
                values = [unit(*args, **kwargs) for args, kwargs in calls]
                if index == 0:
                    compensates &= block_input(*calls[0]).shape == values[0].shape
                if compensates or self.reconstructs:
                    targets.append(values)
                self._done(position, 'forward')
        return moments, compensates

    def _run(
        self,
        position: int,
        unit: nn.Module,
        inputs: TensorStore,
        results: TensorStore,
        compensates: bool,
    ) -> None:
        """Runs the unit with quantized weights; its outputs take the place of the targets."""
        if compensates:
            unit.compensation.start()
        with compiled_products(unit):
            for index, calls in enumerate(inputs):
                outputs = [unit(*args, **kwargs) for args, kwargs in calls]
                if compensates:
                    for (args, kwargs), target, output in zip(
                        calls, results[index], outputs, strict=True
                    ):
                        unit.compensation.update(block_input(args, kwargs), target - output)
                if index < len(results):
                    results[index] = outputs
                else:
                    results.append(outputs)
                self._done(position, 'forward')

    @staticmethod
    def _correct(compensation: Compensation, inputs: TensorStore, results: TensorStore) -> None:
        """Adds the fitted map to the outputs."""
        for index, calls in enumerate(inputs):
            results[index] = [
                output + compensation.correction(block_input(args, kwargs))
                for (args, kwargs), output in zip(calls, results[index], strict=True)
            ]
