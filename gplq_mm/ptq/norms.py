"""Calibration with RepQ-ViT's reparametrization of LayerNorms, where the policy asks for it.

Sites with ``ActSpec.reparametrize`` have one scale and zero-point a tensor, from construction on.
While a model is calibrated nothing is quantized yet, so a scale for every channel is needed by
the observer alone: the LayerNorm and its readers take it over before the quantizer gets its one
scale. Shapes never change, so an optimizer, a distributed wrapper and a checkpoint need to know
nothing of it, and where training follows, it learns the one scale.

The float function stays what it was. What the per-channel calibration found stays with the
quantizer (``channel_scale``, ``channel_offset``), so that latent weights can be compared with the
original ones.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import broadcast_
from ..errors import StateError
from ..layers import QuantLinear, calibrate, quant_layers, quantizers_disabled
from ..quant import ActSpec, MinMaxObserver, PolicyError, build_observer
from .norm_readers import find_norm_readers
from .reparam import reparametrize


@dataclass(frozen=True)
class NormReport:
    """What became of the LayerNorms in front of layers that ask for reparametrization.

    Attributes:
        done: LayerNorm -> its readers.
        padded: Those among them without a shift.
        left: LayerNorms that are left alone, since something else reads them, too.
    """

    done: dict[str, tuple[str, ...]] = field(default_factory=dict)
    padded: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f'{len(self.done)} LayerNorms reparametrized'
        if self.padded:
            text += (
                f', {len(self.padded)} of them without a shift, because zeros are padded behind '
                f'them (as behind {self.padded[0]})'
            )
        if self.left:
            text += (
                f'; {len(self.left)} left alone, because not only layers with '
                f'reparametrize=True read them (as {self.left[0]})'
            )
        return text


def calibrate_with_norms(
    model: nn.Module,
    run_pass: Callable[[int, int], None],
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
) -> NormReport:
    """Calibrates a model as :func:`gplq_mm.layers.calibrate`, and reparametrizes its LayerNorms.

    A LayerNorm is reparametrized if layers with ``reparametrize=True`` read its output and nothing
    else does; otherwise it is left alone, and its readers get one scale from the whole tensor, as
    all other layers do. Where zeros are padded between a LayerNorm and a reader (Swin's windows),
    they must stay zeros: channels are then calibrated symmetrically, so that there is no
    zero-point to move.

    Args:
        model: Quantized model in eval mode; changed in place.
        run_pass: As in ``calibrate``.
        batches: As in :func:`find_norm_readers`; not touched where the policy asks for nothing.
        forward: Runs the model on one of them and returns everything that must not change.

    Raises:
        PolicyError: If readers of one LayerNorm have different specs.
        StateError: If the model has been reparametrized before, or a quantizer is frozen.
        StateError: As in ``calibrate``.
    """
    layers = {
        name: layer
        for name, layer in quant_layers(model).items()
        if isinstance(layer, QuantLinear) and layer.act_quantizer.spec.reparametrize
    }
    if not layers:
        calibrate(model, run_pass)
        return NormReport()
    for name, layer in layers.items():
        if layer.act_quantizer.channel_scale is not None:
            raise StateError(
                f'{name}: the LayerNorm in front is reparametrized already; start from the FP32 '
                'weights to calibrate again.'
            )
    with quantizers_disabled(model):
        found = find_norm_readers(model, list(layers), batches, forward)
    specs = {norm: _spec_of(norm, names, layers) for norm, names in found.readers.items()}
    observed = {norm: _observed(spec, norm in found.padded) for norm, spec in specs.items()}
    observers = {
        name: build_observer(observed[norm], (layers[name].in_features,))
        for norm, names in found.readers.items()
        for name in names
    }
    calibrate(model, run_pass, {f'{name}.act_quantizer': o for name, o in observers.items()})
    for norm, names in found.readers.items():
        spec = observed[norm]
        scale, offset = _common_grid([observers[name] for name in names], spec)
        if spec != specs[norm]:
            # The codes of the quantizer begin at 0, those that were calibrated below it.
            offset = scale * spec.code_range[0]
        _reparametrize(model.get_submodule(norm), [layers[n] for n in names], scale, offset)
    return NormReport(
        found.readers, tuple(n for n in found.readers if n in found.padded), tuple(found.left)
    )


def _spec_of(norm: str, names: tuple[str, ...], layers: dict[str, QuantLinear]) -> ActSpec:
    specs = {layers[name].act_quantizer.spec for name in names}
    if len(specs) > 1:
        raise PolicyError(
            f'{", ".join(names)} read the output of {norm} with different specs, and it can be '
            'brought to one scale only; give them the same, or reparametrize=False.'
        )
    return specs.pop()


def _observed(spec: ActSpec, padded: bool) -> ActSpec:
    """How channels are calibrated."""
    if padded and spec.zero_point != 'none':
        return replace(spec, zero_point='none', signed=True)
    return spec


def _common_grid(observers: list[MinMaxObserver], spec: ActSpec) -> tuple[Tensor, Tensor]:
    """The grid of every channel ``(K,)`` that covers what all readers want, usually one."""
    grids = [observer.compute() for observer in observers]
    scales, offsets = (torch.stack(parts) for parts in zip(*grids, strict=True))
    if len(observers) == 1 or spec.zero_point == 'none':
        return scales.amax(0), offsets[0]
    qmin, qmax = spec.code_range
    low, high = (offsets + qmin * scales).amin(0), (offsets + qmax * scales).amax(0)
    scale = (high - low) / (qmax - qmin)
    return scale, low - qmin * scale


@torch.no_grad()
def _reparametrize(
    norm: nn.LayerNorm, readers: list[QuantLinear], scale: Tensor, offset: Tensor
) -> None:
    # All ranks have computed the same, but for the last digit on machines of several kinds.
    broadcast_([scale, offset])
    one_scale, one_offset = reparametrize(norm, readers, scale, offset)
    for module in (norm, *readers):
        broadcast_(list(module.parameters(recurse=False)))
    for layer in readers:
        quantizer = layer.act_quantizer
        quantizer.set_grid(one_scale, one_offset)
        quantizer.channel_scale, quantizer.channel_offset = scale.clone(), offset.clone()
