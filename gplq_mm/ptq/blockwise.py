"""Stage 2: weights, one unit at a time, each on the stream that the units before it produce.

A unit is a residual block, or a quantized layer outside of any block. Units are visited in the
order in which the model runs them. To get at the input of a unit the model is run with all
earlier units replayed from what they last gave, so every unit is computed a fixed number of
times, and only its own statistics and the stream are held: the outputs that a later unit still
reads. Batches may differ in shape, and a unit may run several times in a forward (a detection
head, once a level); its statistics are then those of all its calls.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
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


def find_units(model: nn.Module, run_one: Callable[[], None]) -> dict[str, int]:
    """Blocks, and quantized layers outside of blocks, in the order of their first execution.

    A detection head runs several times in a forward, once for each level of a pyramid.

    Args:
        model: Quantized model.
        run_one: Sends one batch through it.

    Returns:
        Name of the unit -> how often it runs.

    Raises:
        ValueError: If a unit is not reached.
    """
    blocks = find_blocks(model)
    layers = [
        name
        for name in quant_layers(model)
        if not any(name.startswith(f'{block}.') for block in blocks)
    ]
    calls: dict[str, int] = {}
    with ExitStack() as stack:
        for name in (*blocks, *layers):
            handle = model.get_submodule(name).register_forward_pre_hook(
                lambda _module, _args, name=name: calls.__setitem__(name, calls.get(name, 0) + 1)
            )
            stack.callback(handle.remove)
        run_one()
    for name in (*blocks, *layers):
        if name not in calls:
            raise ValueError(
                f'{name} is not reached by a forward, so Stage 2 cannot see its input. '
                f'Exclude it with dict(pattern={name!r}, exclude=True).'
            )
    return calls


class _Replay:
    """Gives the stored outputs of a unit, call by call; or zeros of the same shapes.

    Args:
        name: The unit.
        values: Outputs, or ``(shape, dtype, device)``, one for each call.
        see: Told the number of the call and its arguments.
    """

    def __init__(self, name: str, values: list, see: Callable | None = None):
        self.name = name
        self.values = values
        self.see = see
        self.call = 0

    def __call__(self, *args, **kwargs) -> Tensor:
        if self.call == len(self.values):
            raise ValueError(
                f'{self.name} runs more than {len(self.values)} times in the forward of another '
                f'image; Stage 2 needs a fixed number. Exclude it with '
                f'dict(pattern={self.name!r}, exclude=True).'
            )
        value = self.values[self.call]
        if self.see is not None:
            self.see(self.call, args, kwargs)
        self.call += 1
        if torch.is_tensor(value):
            # A copy: the model may go on with it in place.
            return value.clone()
        shape, dtype, device = value
        return torch.zeros(shape, dtype=dtype, device=device)


class _Stream:
    """Inputs and outputs of units for all batches, a list with one item per call each.

    Args:
        model: The model.
        batches: Its calibration batches.
        forward: Runs it on a batch.
        calls: How often each unit runs, of :func:`find_units`.
        last_reader: Unit -> position of the last unit that reads its output.
        memory_bytes: What each store may hold in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: TensorStore,
        forward: Callable,
        calls: dict[str, int],
        last_reader: dict[str, int],
        memory_bytes: int,
    ):
        self.model = model
        self.batches = batches
        self.forward = forward
        self.calls = calls
        self.last_reader = last_reader
        self.memory_bytes = memory_bytes
        self.outputs: dict[str, TensorStore] = {}
        self.shapes: dict[str, list] = {}

    def store(self) -> TensorStore:
        return TensorStore(self.memory_bytes)

    def capture(self, unit: str, done: list[str], index: int) -> list[tuple]:
        """Arguments of every call with which batch ``index`` reaches ``unit``.

        Between two of its calls the unit gives what its latent weights give.

        Raises:
            ValueError: If this batch reaches the unit less often than the first one.
        """
        module, wanted = self.model.get_submodule(unit), self.calls[unit]
        captured: list[tuple] = []

        def stop(*args, **kwargs):
            captured.append((args, kwargs))
            if len(captured) == wanted:
                raise _StopForward
            return type(module).forward(module, *args, **kwargs)

        with ExitStack() as stack:
            for name in done:
                source = self.outputs if name in self.outputs else self.shapes
                replay = _Replay(name, source[name][index])
                stack.enter_context(_replaced_forward(self.model.get_submodule(name), replay))
            stack.enter_context(_replaced_forward(module, stop))
            with suppress(_StopForward):
                self.forward(self.batches[index])
        if len(captured) != wanted:
            raise ValueError(
                f'{unit} runs {len(captured)} times in the forward of calibration batch {index}, '
                f'in that of the first {wanted} times; Stage 2 needs a fixed number. Exclude it '
                f'with dict(pattern={unit!r}, exclude=True), or choose other calibration images.'
            )
        return captured

    def finish(self, position: int, unit: str, outputs: TensorStore) -> None:
        """Files the outputs of ``unit`` and drops what nobody reads any more."""
        self.shapes[unit] = [[(o.shape, o.dtype, o.device) for o in calls] for calls in outputs]
        self.outputs[unit] = outputs
        for name in list(self.outputs):
            if self.last_reader[name] <= position:
                self.outputs.pop(name).close()

    def close(self) -> None:
        """Drops everything."""
        for store in self.outputs.values():
            store.close()
        self.outputs.clear()


def _same(first: Any, second: Any) -> bool:
    if torch.is_tensor(first):
        return torch.is_tensor(second) and torch.equal(first, second)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(
            _same(a, b) for a, b in zip(first, second, strict=True)
        )
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[k], second[k]) for k in first)
    return first == second


def _copied(value: Any) -> Any:
    if torch.is_tensor(value):
        return value.clone()
    if isinstance(value, (list, tuple)):
        return [_copied(item) for item in value]
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value


def _last_readers(
    model: nn.Module, units: dict[str, int], batch: Any, forward: Callable
) -> dict[str, int]:
    """Unit -> position of the last unit whose input depends on its output directly.

    Directly: by what the model computes between units. Found by changing one output after the
    other while all other units are replayed. That costs one forward without any unit for each of
    them, and sees through everything (skip connections, pyramids, boxes that decide which
    features are read).
    """
    inputs: dict[str, list] = {name: [] for name in units}
    outputs: dict[str, list] = {name: [] for name in units}

    def keep(_module, args, kwargs, output, name):
        if not torch.is_tensor(output):
            raise ValueError(f'{name}: Stage 2 handles units with a single tensor as output only.')
        inputs[name].append(_copied((args, kwargs)))
        outputs[name].append(output.clone())

    with ExitStack() as stack:
        for name in units:
            handle = model.get_submodule(name).register_forward_hook(
                lambda m, a, k, o, name=name: keep(m, a, k, o, name), with_kwargs=True
            )
            stack.callback(handle.remove)
        forward(batch)

    last, order = {}, list(units)
    for position, changed in enumerate(order):
        same = dict.fromkeys(order, 0)

        def see(call: int, args: tuple, kwargs: dict, name: str, same: dict = same) -> None:
            same[name] += _same(_copied((args, kwargs)), inputs[name][call])

        with ExitStack() as stack:
            for name in order:
                # Changed such that neither a value nor, for scores and boxes, the order stays.
                values = [1 - v for v in outputs[name]] if name == changed else outputs[name]
                replay = _Replay(name, values, partial(see, name=name))
                stack.enter_context(_replaced_forward(model.get_submodule(name), replay))
            # Other boxes may lead the model another way, or nowhere; what it does not reach then
            # counts as reading this output, and an error of its own comes back in `capture`.
            with suppress(Exception):
                forward(batch)
        readers = [i for i, name in enumerate(order) if same[name] < len(inputs[name])]
        last[changed] = max((i for i in readers if i > position), default=position)
    return last


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
    calls = find_units(model, lambda: forward(kept[0]))
    units = list(calls)
    last_reader = _last_readers(model, calls, kept[0], forward)
    stream = _Stream(model, kept, forward, calls, last_reader, memory_bytes)
    scores: dict[str, float] = {}
    for position, name in enumerate(track(units, len(units), 'Weight-PTQ')):
        unit = model.get_submodule(name)
        inputs = stream.store()
        for index in range(len(kept)):
            inputs.append(stream.capture(name, units[:position], index))
        score, outputs = _process_unit(unit, inputs, method, stream)
        if score is not None:
            scores[name] = score
        stream.finish(position, name, outputs)
        inputs.close()
    stream.close()
    kept.close()
    return scores


def _process_unit(
    unit: nn.Module, inputs: TensorStore, method: Callable, stream: _Stream
) -> tuple[float | None, TensorStore]:
    """Quantizes the layers of one unit, fits its compensation, and gives its outputs."""
    layers = _rank_layers(unit)
    moments = {
        name: SecondMoment(layer.weight_quantizer.shape[1], not method.needs_second_moment)
        for name, layer in layers.items()
    }
    compensation = getattr(unit, 'compensation', None)
    targets = stream.store()
    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(
                lambda module, args, name=name: moments[name].update(module.operand_rows(args[0]))
            )
            stack.callback(handle.remove)
        for calls in inputs:
            values = [unit(*args, **kwargs) for args, kwargs in calls]
            if compensation is not None:
                targets.append(values)
    for name, layer in layers.items():
        moments[name].reduce()
        _round(layer, method, moments.pop(name))
    outputs = stream.store()
    for calls in inputs:
        outputs.append([unit(*args, **kwargs) for args, kwargs in calls])
    if compensation is None or block_input(*inputs[0][0]).shape != targets[0][0].shape:
        # A block that changes the shape has no parallel linear map.
        targets.close()
        return None, outputs
    compensation.start()
    for calls, wanted, given in zip(inputs, targets, outputs, strict=True):
        for (args, kwargs), target, output in zip(calls, wanted, given, strict=True):
            compensation.update(block_input(args, kwargs), target - output)
    score = compensation.fit()
    targets.close()
    if compensation.is_fitted:
        broadcast_([compensation.weight, compensation.bias])
        corrected = stream.store()
        for calls, given in zip(inputs, outputs, strict=True):
            corrected.append(
                [
                    output + compensation.correction(block_input(args, kwargs))
                    for (args, kwargs), output in zip(calls, given, strict=True)
                ]
            )
        outputs.close()
        outputs = corrected
    return score, outputs
