"""Stage 2: weights, one unit at a time, each on the stream that the units before it produce.

A unit is a residual block, or a quantized layer outside of any block. Units are visited in the
order in which the model runs them. To get at the input of a unit the model is run with all
earlier units replayed from what they last gave, so every unit is computed a fixed number of
times, and only its own statistics and the stream are held.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Compensation, QuantWeightLayer, find_blocks, quant_layers, require_frozen
from ..layers.compensation import block_input
from ..quant.reduce import broadcast_
from .statistics import SecondMoment
from .tensor_store import TensorStore

__all__ = ['find_units', 'quantize_weights', 'round_weights']


class _StopForward(Exception):
    """Ends a forward once the wanted input has been seen."""


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    # An instance attribute hides the class's forward; hooks of the module still run, so the
    # compensation must be replayed below them.
    hooks, module._forward_hooks = module._forward_hooks, type(module._forward_hooks)()
    module.__dict__['forward'] = forward
    try:
        yield
    finally:
        del module.__dict__['forward']
        module._forward_hooks = hooks


def find_units(model: nn.Module, run_one: Callable[[], None]) -> list[str]:
    """Blocks, and quantized layers outside of blocks, in the order of their execution.

    Args:
        model: Quantized model.
        run_one: Sends one batch through it.

    Raises:
        ValueError: If a unit is not reached, or is run more than once.
    """
    blocks = find_blocks(model)
    layers = [
        name
        for name in quant_layers(model)
        if not any(name.startswith(f'{block}.') for block in blocks)
    ]
    seen: list[str] = []
    with ExitStack() as stack:
        for name in (*blocks, *layers):
            handle = model.get_submodule(name).register_forward_pre_hook(
                lambda _module, _args, name=name: seen.append(name)
            )
            stack.callback(handle.remove)
        run_one()
    for name in (*blocks, *layers):
        if seen.count(name) != 1:
            raise ValueError(
                f'{name} runs {seen.count(name)} times in a forward; Stage 2 needs exactly once. '
                f'Exclude it with dict(pattern={name!r}, exclude=True).'
            )
    return seen


class _Stream:
    """Inputs and outputs of units for all batches."""

    def __init__(self, model: nn.Module, batches: list, forward: Callable, memory_bytes: int):
        self.model = model
        self.batches = batches
        self.forward = forward
        self.memory_bytes = memory_bytes
        self.outputs: dict[str, TensorStore] = {}
        self.shapes: dict[str, list] = {}

    def store(self) -> TensorStore:
        return TensorStore(self.memory_bytes)

    def capture(self, unit: str, done: list[str], index: int) -> tuple:
        """Arguments with which batch ``index`` reaches ``unit``."""
        captured: list[tuple] = []

        def stop(*args, **kwargs):
            captured.append((args, kwargs))
            raise _StopForward

        with ExitStack() as stack:
            for name in done:
                if name in self.outputs:
                    value = self.outputs[name][index]
                    # A copy: the model may go on with it in place.
                    replay = lambda *_args, value=value, **_kwargs: value.clone()  # noqa: E731
                else:
                    shape, dtype, device = self.shapes[name][index]
                    replay = lambda *_args, meta=(shape, dtype, device), **_kwargs: torch.zeros(  # noqa: E731
                        meta[0], dtype=meta[1], device=meta[2]
                    )
                stack.enter_context(_replaced_forward(self.model.get_submodule(name), replay))
            stack.enter_context(_replaced_forward(self.model.get_submodule(unit), stop))
            with suppress(_StopForward):
                self.forward(self.batches[index])
        return captured[0]

    def finish(self, unit: str, outputs: TensorStore, keep_all: bool) -> None:
        """Files the outputs of ``unit``; older ones are dropped unless somebody reads them."""
        self.shapes[unit] = [(o.shape, o.dtype, o.device) for o in outputs]
        if not keep_all:
            for store in self.outputs.values():
                store.close()
            self.outputs.clear()
        self.outputs[unit] = outputs


def _same(first: Any, second: Any) -> bool:
    if torch.is_tensor(first):
        return torch.equal(first, second)
    if isinstance(first, (list, tuple)):
        return all(_same(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, dict):
        return all(_same(first[key], second[key]) for key in first)
    return first == second


def _is_sequential(model: nn.Module, units: list[str], batch: Any, forward: Callable) -> bool:
    """Whether every unit's input depends on the unit before it alone (no side branches)."""
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, tuple] = {}

    def keep(_module, args, kwargs, output, name):
        inputs[name] = (args, kwargs)
        outputs[name] = output.clone() if torch.is_tensor(output) else output

    with ExitStack() as stack:
        for name in units:
            handle = model.get_submodule(name).register_forward_hook(
                lambda m, a, k, o, name=name: keep(m, a, k, o, name), with_kwargs=True
            )
            stack.callback(handle.remove)
        forward(batch)
    if not all(torch.is_tensor(output) for output in outputs.values()):
        raise ValueError('Stage 2 handles units with a single tensor as output only.')
    probe = _Stream(model, [batch], forward, 0)
    for position in range(2, len(units)):
        done = units[:position]
        probe.shapes = {n: [(outputs[n].shape, outputs[n].dtype, outputs[n].device)] for n in done}
        probe.outputs = {done[-1]: [outputs[done[-1]]]}
        if not _same(probe.capture(units[position], done, 0), inputs[units[position]]):
            return False
    return True


def _rank_layers(unit: nn.Module) -> dict[str, QuantWeightLayer]:
    if isinstance(unit, QuantWeightLayer):
        return {'': unit}
    return quant_layers(unit)


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
    quantizer = layer.weight_quantizer
    broadcast_([quantizer.codes, quantizer.row_scale, quantizer.multiplier, quantizer.bias])


@torch.no_grad()
def round_weights(model: nn.Module, method: Callable) -> None:
    """Rounds all weights without data: plain weight PTQ, the baseline.

    Args:
        model: Quantized model with calibrated activation quantizers.
        method: PTQ method that needs no statistics.

    Raises:
        ValueError: If the method needs statistics.
    """
    if method.needs_second_moment:
        raise ValueError(f'{type(method).__name__} needs calibration images; use quantize_weights.')
    for layer in quant_layers(model).values():
        _round(layer, method, None)


@torch.no_grad()
def quantize_weights(
    model: nn.Module,
    batches: Iterable,
    forward: Callable[[Any], Any],
    method: Callable,
    track: Callable[[list, int, str], Iterable] = lambda items, _total, _text: items,
    memory_bytes: int = 2**30,
) -> dict[str, float]:
    """Quantizes all weights of a model unit by unit and fits the compensations.

    Args:
        model: Quantized model in eval mode with frozen activation quantizers.
        batches: This rank's calibration batches.
        forward: ``forward(batch)`` runs the model on one batch.
        method: PTQ method: ``method(weight, spec, permutation, second_moment)``.
        track: Shows progress: ``track(items, total, description)`` yields the items.
        memory_bytes: What each stored stream may hold in memory before it goes to disk.

    Returns:
        Held-out R^2 of the compensation of every block that has one.

    Raises:
        NotCalibratedError: If an activation quantizer is not frozen.
        ValueError: If there is no batch, or the model cannot be cut into units.
    """
    require_frozen(model)
    kept = TensorStore(memory_bytes)
    for batch in batches:
        kept.append(batch)
    if not len(kept):
        raise ValueError('Stage 2 got no calibration images; give at least one.')
    for layer in quant_layers(model).values():
        layer.weight_quantizer.clear()
    for module in model.modules():
        if isinstance(module, Compensation):
            module.start()
    units = find_units(model, lambda: forward(kept[0]))
    keep_all = not _is_sequential(model, units, kept[0], forward)
    stream = _Stream(model, kept, forward, memory_bytes)
    scores: dict[str, float] = {}
    for position, name in enumerate(track(units, len(units), 'Weight-PTQ')):
        unit = model.get_submodule(name)
        inputs = stream.store()
        for index in range(len(kept)):
            inputs.append(stream.capture(name, units[:position], index))
        score, outputs = _process_unit(unit, inputs, method, stream)
        if score is not None:
            scores[name] = score
        stream.finish(name, outputs, keep_all)
        inputs.close()
    for store in stream.outputs.values():
        store.close()
    kept.close()
    return scores


def _process_unit(
    unit: nn.Module, inputs: TensorStore, method: Callable, stream: _Stream
) -> tuple[float | None, TensorStore]:
    """Quantizes the layers of one unit, fits its compensation, and gives its outputs."""
    layers = _rank_layers(unit)
    moments = {
        name: SecondMoment(layer.weight_quantizer.shape[1]) for name, layer in layers.items()
    }
    compensation = getattr(unit, 'compensation', None)
    targets = stream.store()
    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(
                lambda module, args, name=name: moments[name].update(module.operand_rows(args[0]))
            )
            stack.callback(handle.remove)
        for args, kwargs in inputs:
            output = unit(*args, **kwargs)
            if compensation is not None:
                targets.append(output)
    for name, layer in layers.items():
        moments[name].reduce()
        _round(layer, method, moments.pop(name))
    outputs = stream.store()
    for args, kwargs in inputs:
        outputs.append(unit(*args, **kwargs))
    if compensation is None or block_input(*inputs[0]).shape != targets[0].shape:
        # A block that changes the shape has no parallel linear map.
        targets.close()
        return None, outputs
    compensation.start()
    for (args, kwargs), target, output in zip(inputs, targets, outputs, strict=True):
        compensation.update(block_input(args, kwargs), target - output)
    score = compensation.fit()
    targets.close()
    if compensation.is_fitted:
        broadcast_([compensation.weight, compensation.bias])
        corrected = stream.store()
        for (args, kwargs), output in zip(inputs, outputs, strict=True):
            corrected.append(output + compensation.correction(block_input(args, kwargs)))
        outputs.close()
        outputs = corrected
    return score, outputs
