"""The units of Stage 2, and the stream that runs between them.

A unit is a residual block, or a quantized layer outside of any block. To get at the input of a
unit the model is run with all earlier units replayed from what they last gave, so every unit is
computed a fixed number of times, and only the stream is held: the outputs that a later unit still
reads. Batches may differ in shape, and a unit may run several times in a forward (a detection
head, once a level).
"""

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingError
from ..layers import compiled_products, patched_forward, quant_units
from .tensor_store import Memory, TensorStore


class _StopForward(Exception):
    """Ends a forward once the wanted input has been seen."""


@dataclass
class Trace:
    """What one forward did with the units, in the order of their first execution.

    Attributes:
        inputs: Unit -> arguments ``(args, kwargs)`` of each of its calls, copied.
        outputs: Unit -> output of each call, copied.
        seconds: Unit -> duration of its calls.
    """

    inputs: dict[str, list] = field(default_factory=dict)
    outputs: dict[str, list] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def calls(self) -> dict[str, int]:
        """Unit -> how often it ran."""
        return {name: len(calls) for name, calls in self.inputs.items()}


def trace_units(model: nn.Module, run_one: Callable[[], Any]) -> Trace:
    """Runs one batch and watches blocks, and quantized layers outside of blocks.

    Args:
        model: Quantized model.
        run_one: Sends one batch through it.

    Raises:
        SettingError: If a unit is not reached, or gives something else than one tensor.
    """
    units = quant_units(model)
    trace = Trace()

    def enter(_module, args, kwargs, name: str) -> None:
        trace.inputs.setdefault(name, []).append(_copied((args, kwargs)))
        trace.seconds[name] = trace.seconds.get(name, 0.0) - _now()

    def leave(_module, _args, output, name: str) -> None:
        if not torch.is_tensor(output):
            raise SettingError(
                f'{name}: Stage 2 handles units with a single tensor as output only.'
            )
        trace.seconds[name] += _now()
        trace.outputs.setdefault(name, []).append(output.clone())

    with ExitStack() as stack:
        for name in units:
            unit = model.get_submodule(name)
            before, after = partial(enter, name=name), partial(leave, name=name)
            stack.callback(unit.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(unit.register_forward_hook(after).remove)
        stack.enter_context(compiled_products(model))
        run_one()
    for name in units:
        if name not in trace.inputs:
            raise SettingError(
                f'{name} is not reached by a forward, so Stage 2 cannot see its input. '
                f'Exclude it with dict(pattern={name!r}, exclude=True).'
            )
    return trace


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def find_units(model: nn.Module, run_one: Callable[[], Any]) -> dict[str, int]:
    """Blocks, and quantized layers outside of blocks, in the order of their first execution.

    A detection head runs several times in a forward, once for each level of a pyramid.

    Args:
        model: Quantized model.
        run_one: Sends one batch through it.

    Returns:
        Name of the unit -> how often it runs.

    Raises:
        SettingError: If a unit is not reached.
    """
    return trace_units(model, run_one).calls


class _Replay:
    """Gives the stored outputs of a unit, call by call; or zeros of the same shapes.

    Args:
        name: The unit.
        values: Outputs, or ``(shape, dtype, device)``, one for each call.
        see: Told the number of the call and its arguments.
        copies: Whether to give copies: the model may go on with a tensor in place.
    """

    def __init__(self, name: str, values: list, see: Callable | None = None, copies: bool = True):
        self.name = name
        self.values = values
        self.see = see
        self.copies = copies
        self.call = 0

    def __call__(self, *args, **kwargs) -> Tensor:
        if self.call == len(self.values):
            raise SettingError(
                f'{self.name} runs more than {len(self.values)} times in the forward of another '
                f'image; Stage 2 needs a fixed number. Exclude it with '
                f'dict(pattern={self.name!r}, exclude=True).'
            )
        value = self.values[self.call]
        if self.see is not None:
            self.see(self.call, args, kwargs)
        self.call += 1
        if torch.is_tensor(value):
            return value.clone() if self.copies else value
        shape, dtype, device = value
        return torch.zeros(shape, dtype=dtype, device=device)


class Stream:
    """Calibration batches, and outputs of units for all of them, a list with one item per call.

    Args:
        model: The model.
        batches: Its calibration batches.
        forward: Runs it on a batch.
        calls: How often each unit runs, of :func:`find_units`.
        last_reader: Unit -> position of the last unit that reads its output.
        memory: What all stores may hold in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: TensorStore,
        forward: Callable,
        calls: dict[str, int],
        last_reader: dict[str, int],
        memory: Memory,
    ):
        self.model = model
        self.batches = batches
        self.forward = forward
        self.calls = calls
        self.units = list(calls)
        self.last_reader = last_reader
        self.memory = memory
        self.outputs: dict[str, TensorStore] = {}
        self.shapes: dict[str, list] = {}

    def __len__(self) -> int:
        return len(self.batches)

    def store(self) -> TensorStore:
        return TensorStore(self.memory)

    def capture(self, position: int, index: int) -> list[tuple]:
        """Arguments of every call with which batch ``index`` reaches the unit at ``position``.

        Between two of its calls the unit gives what its latent weights give. Outputs that no
        later unit reads are forgotten: each unit can be captured once for each batch.

        Raises:
            SettingError: If this batch reaches the unit less often than the first one.
        """
        unit = self.units[position]
        module, wanted = self.model.get_submodule(unit), self.calls[unit]
        captured: list[tuple] = []

        def stop(*args, **kwargs):
            captured.append((args, kwargs))
            if len(captured) == wanted:
                raise _StopForward
            return type(module).forward(module, *args, **kwargs)

        with ExitStack() as stack:
            for name in self.units[:position]:
                source = self.outputs if name in self.outputs else self.shapes
                replay = _Replay(name, source[name][index], copies=not self._ends(name, position))
                stack.enter_context(patched_forward(self.model.get_submodule(name), replay))
            stack.enter_context(patched_forward(module, stop))
            with suppress(_StopForward):
                self.forward(self.batches[index])
        if len(captured) != wanted:
            raise SettingError(
                f'{unit} runs {len(captured)} times in the forward of calibration batch {index}, '
                f'in that of the first {wanted} times; Stage 2 needs a fixed number. Exclude it '
                f'with dict(pattern={unit!r}, exclude=True), or choose other calibration images.'
            )
        for name, outputs in self.outputs.items():
            if self._ends(name, position):
                outputs.drop(index)
        return captured

    def _ends(self, name: str, position: int) -> bool:
        """Whether the unit at ``position`` is the last that reads the output of ``name``."""
        return self.last_reader[name] <= position

    def finish(self, position: int, outputs: TensorStore) -> None:
        """Files the outputs of a unit and drops what nobody reads any more."""
        unit = self.units[position]
        self.shapes[unit] = [[(o.shape, o.dtype, o.device) for o in calls] for calls in outputs]
        self.outputs[unit] = outputs
        for name in list(self.outputs):
            if self._ends(name, position):
                self.outputs.pop(name).close()

    def close(self) -> None:
        """Drops everything."""
        for store in self.outputs.values():
            store.close()
        self.outputs.clear()
        self.batches.close()


def same_values(first: Any, second: Any) -> bool:
    """Whether nested lists, tuples and dicts of tensors are equal, bit by bit."""
    if torch.is_tensor(first):
        return torch.is_tensor(second) and torch.equal(first, second)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(
            same_values(a, b) for a, b in zip(first, second, strict=True)
        )
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            same_values(first[k], second[k]) for k in first
        )
    return first == second


def _copied(value: Any) -> Any:
    if torch.is_tensor(value):
        return value.clone()
    if isinstance(value, (list, tuple)):
        return [_copied(item) for item in value]
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value


def last_readers(model: nn.Module, trace: Trace, run_one: Callable[[], Any]) -> dict[str, int]:
    """Unit -> position of the last unit whose input depends on its output directly.

    Directly: by what the model computes between units. Found by changing one output after the
    other while all other units are replayed. That costs one forward without any unit for each of
    them, and sees through everything (skip connections, pyramids, boxes that decide which
    features are read).

    Args:
        model: Quantized model.
        trace: Its units, of :func:`trace_units`.
        run_one: Sends the same batch through it.
    """
    last, order = {}, list(trace.inputs)
    for position, changed in enumerate(order):
        same = dict.fromkeys(order, 0)

        def see(call: int, args: tuple, kwargs: dict, name: str, same: dict = same) -> None:
            same[name] += same_values((args, kwargs), trace.inputs[name][call])

        with ExitStack() as stack:
            for name in order:
                values = trace.outputs[name]
                if name == changed:
                    # Such that neither a value nor, for scores and boxes, the order stays.
                    values = [1 - value for value in values]
                replay = _Replay(name, values, partial(see, name=name))
                stack.enter_context(patched_forward(model.get_submodule(name), replay))
            # Other boxes may lead the model another way, or nowhere; what it does not reach then
            # counts as reading this output, and an error of its own comes back in `capture`.
            with suppress(Exception):
                run_one()
        readers = [i for i, name in enumerate(order) if same[name] < len(trace.inputs[name])]
        last[changed] = max((i for i in readers if i > position), default=position)
    return last
