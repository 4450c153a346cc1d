"""States of all quantizers of a model at once: calibrate, freeze, switch off."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from ..distributed import ranks_end_together
from ..errors import DataError, SettingError
from ..quant import (
    ActQuantizer,
    LearnedQuantizer,
    LearnedWeightQuantizer,
    MinMaxObserver,
    NotCalibratedError,
    QuantState,
    WeightQuantizer,
)
from .attention import QuantAttention
from .compensation import Compensation
from .weight_layer import QuantWeightLayer


def act_quantizers(model: nn.Module) -> dict[str, ActQuantizer]:
    """All activation quantizers by name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, ActQuantizer)
    }


def learned_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Scales and zero-points of all learned quantizers, of activations and of weights."""
    return [
        parameter
        for module in model.modules()
        if isinstance(module, LearnedQuantizer)
        for parameter in module.parameters(recurse=False)
    ]


def is_calibrated(model: nn.Module) -> bool:
    """Whether every activation quantizer has a scale."""
    return all(q.state >= QuantState.LEARNING for q in act_quantizers(model).values())


def set_saved_bytes(model: nn.Module, saved_bytes: int | None) -> None:
    """Sets what quantized layers keep of an activation for backward.

    Args:
        model: Quantized model; changed in place.
        saved_bytes: 2 or 1 bytes a value (:mod:`gplq_mm.quant.code_state`), or None for the floats
            that plain autograd keeps.

    Raises:
        SettingError: For another number.
    """
    if saved_bytes not in (None, 1, 2):
        raise SettingError(f'saved_bytes={saved_bytes!r} must be 1, 2 or None.')
    for module in model.modules():
        if isinstance(module, (QuantWeightLayer, QuantAttention)):
            module.saves_codes = saved_bytes is not None
        elif isinstance(module, ActQuantizer) and saved_bytes is not None:
            module.saved_bytes = saved_bytes


def _turns(quantizers: list[ActQuantizer], histogram_bytes: int) -> Iterator[list[ActQuantizer]]:
    """Who observes in each pass over the images: all in the first, then as many as memory holds."""
    yield quantizers
    turns: list[list[ActQuantizer]] = [[]]
    for quantizer in quantizers:
        held = sum(q.observer.histogram_bytes for q in (*turns[-1], quantizer))
        if turns[-1] and held > histogram_bytes:
            turns.append([])
        turns[-1].append(quantizer)
    for turn in turns:
        for number in range(1, max((q.observer.num_passes for q in turn), default=1)):
            yield [quantizer for quantizer in turn if quantizer.observer.num_passes > number]


@ranks_end_together()
def calibrate(
    model: nn.Module,
    run_pass: Callable[[int, int], None],
    observers: Mapping[str, MinMaxObserver] | None = None,
    histogram_bytes: int = 2**30,
) -> None:
    """Initialises every activation quantizer from data, in place.

    While it observes, a quantizer passes its input through, and weights are not quantized, so all
    of them see the float model.

    Args:
        model: Quantized model.
        run_pass: ``run_pass(i, n)`` sends the calibration images through the model, pass i of n.
        observers: Name of a quantizer -> what observes in its place. These quantizers are left
            observing: the caller makes a grid of what their observers have seen.
        histogram_bytes: What the observers may hold at a time, if one alone needs no more. Beyond
            it they take turns, in a pass each.

    Raises:
        GPLQError: If a quantizer is frozen, or saw nothing, or something that is not finite.
    """
    observers = observers or {}
    by_name = act_quantizers(model)
    for name, quantizer in by_name.items():
        quantizer.observe(observers.get(name))
    for layer in model.modules():
        if isinstance(layer, QuantWeightLayer) and layer.act_quantizer.format.has_levels:
            layer.act_quantizer.observer.importance = layer.operand_power()
    turns = list(_turns(list(by_name.values()), histogram_bytes))
    for index, turn in enumerate(turns):
        for quantizer in by_name.values():
            quantizer.observer.waits = quantizer not in turn
        with weights_disabled(model):
            run_pass(index, len(turns))
        for quantizer in turn:
            try:
                quantizer.observer.end_pass()
            except (DataError, SettingError) as error:
                raise type(error)(f'{quantizer.site}: {error}') from None
    for name, quantizer in by_name.items():
        if name not in observers:
            quantizer.finish_observing()


def freeze_activations(model: nn.Module) -> None:
    """Freezes every activation quantizer; Stage 2 requires it."""
    for quantizer in act_quantizers(model).values():
        quantizer.freeze()


def learn_weights(model: nn.Module, granularity: str) -> None:
    """Gives every weight a learned quantizer, for direct QAT.

    Args:
        model: Quantized model.
        granularity: ``'row'`` or ``'tensor'``.

    Raises:
        PolicyError: If the granularity does not suit a layout.
    """
    for quantizer in [m for m in model.modules() if isinstance(m, WeightQuantizer)]:
        quantizer.learned = LearnedWeightQuantizer(
            quantizer.spec, quantizer.shape, granularity, quantizer.site
        )


def freeze_learned_weights(model: nn.Module) -> None:
    """Ends direct QAT: every weight becomes the integers that it was trained as.

    Raises:
        NotCalibratedError: Unless all activation quantizers are frozen and all weights learned.
    """
    require_frozen(model)
    for layer in model.modules():
        if isinstance(layer, QuantWeightLayer):
            layer.freeze_learned_weight()


def weights_are_learned(model: nn.Module) -> bool:
    """Whether every learned weight quantizer has a scale."""
    return all(
        module.state >= QuantState.LEARNING
        for module in model.modules()
        if isinstance(module, LearnedWeightQuantizer)
    )


def require_frozen(model: nn.Module) -> None:
    """Raises NotCalibratedError unless every activation quantizer is frozen."""
    for quantizer in act_quantizers(model).values():
        if quantizer.state != QuantState.FROZEN:
            raise NotCalibratedError(
                f'{quantizer.site} is {quantizer.state.name}, but weights are quantized against '
                'frozen activation quantizers only: finish Stage 1 first.'
            )


@contextmanager
def _disabled(model: nn.Module, kinds: tuple[type, ...]) -> Iterator[None]:
    switched = [m for m in model.modules() if isinstance(m, kinds) and m.enabled]
    for module in switched:
        module.enabled = False
    try:
        yield
    finally:
        for module in switched:
            module.enabled = True


def quantizers_disabled(model: nn.Module):
    """Context in which the model computes with its latent FP32 weights and activations."""
    return _disabled(model, (ActQuantizer, WeightQuantizer, Compensation))


def weights_disabled(model: nn.Module):
    """Context in which only activations are quantized (FP32 weights, no compensation)."""
    return _disabled(model, (WeightQuantizer, Compensation))
