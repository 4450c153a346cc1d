"""The steps of GPLQ on a plain module and a callable that runs it on a batch.

What they share with nothing of a run: no runner, no config, no data set. The loops and hooks of
:mod:`gplq_mm.engine` and the functions of :mod:`gplq_mm.api` call them.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import broadcast_
from ..evaluation.coverage import measure_coverage
from ..layers import act_quantizers, freeze_activations, weights_disabled
from ..progress import show_weight_ptq
from ..ptq import NormReport, SecondMoment, calibrate_with_norms, quantize_weights
from ..quant import QuantPolicy
from .feature_tap import FeatureTap
from .pca_mimic_loss import PCAMimicLoss, feature_rows
from .weight_tuning import WeightTuning


def first_image(batch: Any) -> Any:
    """The first image of a batch with all that belongs to it: tensors ``(N, ...)`` become
    ``(1, ...)``, lists of annotations those of one image, nested in dicts, tuples and lists."""
    if torch.is_tensor(batch):
        return batch[:1] if batch.dim() else batch
    if isinstance(batch, dict):
        return {key: first_image(value) for key, value in batch.items()}
    if isinstance(batch, tuple) or (isinstance(batch, list) and any(map(torch.is_tensor, batch))):
        return type(batch)(first_image(value) for value in batch)
    return batch[:1] if isinstance(batch, list) else batch


def _shapes(value: Any) -> tuple:
    if torch.is_tensor(value):
        return tuple(value.shape)
    if isinstance(value, dict):
        value = list(value.values())
    return tuple(map(_shapes, value)) if isinstance(value, (list, tuple)) else ()


def _one_of_each_size(batches: Iterable[Any]) -> Iterator[Any]:
    seen = set()
    for batch in batches:
        image = first_image(batch)
        if _shapes(image) not in seen:
            seen.add(_shapes(image))
            yield image


@torch.no_grad()
def calibrate_activations(
    model: nn.Module,
    batches: Callable[[str], Iterable[Any]],
    forward: Callable[[Any], Any],
    tap: FeatureTap | None = None,
) -> NormReport:
    """Fills scales and zero-points of a quantized model from images.

    Args:
        model: Quantized model; left in eval mode.
        batches: ``batches(description)`` gives this rank's batches, the same ones every time.
        forward: Runs the model on a batch, and returns what must not change with its LayerNorms.
        tap: Of the feature that is compared with the teacher's, which must not change either.

    Returns:
        What became of the LayerNorms, where the policy reparametrizes them.

    Raises:
        DataError: If a quantizer saw nothing, or something that is not finite.
    """
    model.eval()

    def run_pass(index: int, passes: int) -> None:
        for batch in batches(f'calibration {index + 1}/{passes}'):
            forward(batch)

    def run_tapped(batch: Any) -> tuple:
        with tap or nullcontext():
            return forward(batch), None if tap is None else tap.feature

    images = _one_of_each_size(batches('what reads the LayerNorms'))
    report = calibrate_with_norms(model, run_pass, images, run_tapped)
    # All ranks have computed the same, but for the last digit on machines of several kinds.
    for quantizer in act_quantizers(model).values():
        broadcast_([*quantizer.parameters(), *quantizer.buffers()])
    return report


def unknown_products(
    model: nn.Module, policy: QuantPolicy, batch: Any, forward: Callable[[Any], Any]
) -> dict[str, float]:
    """What of a calibrated model multiplies in float unasked, see :meth:`.Coverage.unknown`.

    Args:
        model: Left as it is, in eval mode.
        policy: What it was quantized by.
        batch: Any; one image is enough.
        forward: Runs the model on a batch.
    """
    # Learned weight quantizers of direct QAT have no scale yet.
    with torch.random.fork_rng(devices=[]), weights_disabled(model):
        return measure_coverage(model, lambda: forward(batch)).unknown(model, policy)


@torch.no_grad()
def fit_basis(mimic: PCAMimicLoss, features: Iterable[Tensor | tuple[Tensor, ...]]) -> dict:
    """Fits the basis of the mimic loss on the teacher's features.

    They are streamed: what is kept is a ``(D, D)`` sum, whatever their number.

    Args:
        mimic: The loss, filled in place.
        features: Of this rank's batches, as :func:`feature_rows` takes them.

    Returns:
        Result of :meth:`PCAMimicLoss.fit`.
    """
    moment = SecondMoment(mimic.dim)
    for feature in features:
        for rows in feature_rows(feature):
            moment.update(rows)
    moment.reduce()
    result = mimic.fit(moment.mean, moment.covariance())
    # All ranks have computed the same, but for the last digit on machines of several kinds.
    broadcast_(list(mimic.buffers()))
    return result


def run_weight_ptq(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    method: Callable,
    tuning: WeightTuning | None = None,
) -> dict[str, float]:
    """Stage 2 of a model that has ended Stage 1: :func:`gplq_mm.ptq.quantize_weights`, shown.

    Args:
        model: Quantized and calibrated model; its activation quantizers are frozen.
        batches: This rank's batches.
        forward: Runs the model on a batch.
        method: PTQ method.
        tuning: Trains the weights that are still float between the blocks, or None.

    Returns:
        Held-out R^2 of the compensation of every block that has one.
    """
    freeze_activations(model)
    model.eval()
    with show_weight_ptq() as report, tuning or nullcontext():
        return quantize_weights(model, batches, forward, method, report, tuning=tuning)
