"""Both stages of GPLQ on a plain module: what :func:`gplq_mm.quantize_` does."""

import copy
import random
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import DataError, SettingError
from ..evaluation.coverage import warning_of
from ..layers import (
    QuantReport,
    freeze_activations,
    quant_layers,
    quantize_model,
    unchanged_on_error,
)
from ..layers.family import libraries
from ..progress import track
from ..ptq import NormReport
from ..ptq.tensor_store import Memory, TensorStore
from ..quant import QuantPolicy
from .batches import first_batches, is_of_openmmlab, prepare, run_on, task_losses
from .iteration_seed import seed_iteration
from .mimicry import Mimicry, prepare_training
from .quantization_settings import (
    MIMICRY,
    TRAINING,
    batches_of,
    calibration_of,
    compensation_of,
    default,
    images_of,
    train_of,
    weight_ptq_of,
)
from .steps import (
    calibrate_activations,
    first_image,
    fit_basis,
    run_weight_ptq,
    unknown_products,
)
from .training_losses import require_finite
from .weight_tuning import WeightTuning

# What batches may hold in memory before they go to disk.
MEMORY = 2**30


@dataclass
class QuantizedReport:
    """What became of a model; ``model.gplq_report``.

    Attributes:
        layers: What was replaced.
        policy: Plain data of the policy.
        unknown: Modules whose own code multiplies in float, since no family knows their products,
            and their share of all multiply-adds.
        norms: What became of LayerNorms, where the policy reparametrizes them.
        compensation_r2: Held-out R^2 of the compensation of every block that has one.
        pca: Basis of the mimic loss, where there was training.
        losses: Losses of every iteration of Stage 1, by name.
        tuning_losses: Mean loss of the training behind each block of Stage 2, where there was any.
        seconds: Duration of each step.
        library: ``(package, data)`` that the float model can be built of again, or None.
    """

    layers: QuantReport
    policy: dict
    unknown: dict[str, float] = field(default_factory=dict)
    norms: NormReport | None = None
    compensation_r2: dict[str, float] = field(default_factory=dict)
    pca: dict = field(default_factory=dict)
    losses: list[dict[str, float]] = field(default_factory=list)
    tuning_losses: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    library: tuple[str, dict] | None = None

    def __str__(self) -> str:
        kept = sum(score > 0 for score in self.compensation_r2.values())
        seconds = ', '.join(f'{step} {value:.0f} s' for step, value in self.seconds.items())
        unknown = f'{sum(self.unknown.values()):.1%} unknown products in float; '
        return f'{self.layers}; {unknown * bool(self.unknown)}{kept} compensations; {seconds}'


@contextmanager
def _random_state(seed: int) -> Iterator[None]:
    """Context with random numbers of a seed; those of the caller go on behind it."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        seed_iteration(seed, 0)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _described(model: nn.Module) -> tuple[str, dict] | None:
    for name, library in libraries().items():
        if (data := library.describe(model)) is not None:
            return name, data
    return None


class Quantization:
    """Settings and steps of a call, checked before the model is touched.

    The arguments are those of :func:`gplq_mm.quantize_`.

    Raises:
        PolicyError, SettingError: For a setting that cannot be used.
        DataError: For a loader that is known to be empty.
    """

    def __init__(self, model, calibration, train, policy, weight_ptq, compensation, forward, seed):
        self.model, self.seed = model, seed
        self.forward = forward or run_on
        self.policy = QuantPolicy.of(default('gplq_policy') if policy is None else policy)
        self.method, self.ptq_images = weight_ptq_of(weight_ptq)
        self.compensation = compensation_of(compensation)
        self.train = None if train is None else train_of(train)
        self.loader, self.calibration_images = calibration_of(calibration, self.train)

    # -- the steps ------------------------------------------------------------------------

    def run(self) -> QuantizedReport:
        """Quantizes the model; one that cannot be quantized is what it was before."""
        model = self.model
        kept = TensorStore(Memory(MEMORY))
        with unchanged_on_error(model, values=True), _random_state(self.seed):
            if self.train is not None:
                # What earlier training has left would be added to the first gradients.
                model.zero_grad()
            float_model = copy.deepcopy(model).eval() if self.train is not None else None
            library = None if quant_layers(model) else _described(model)
            self.report = QuantizedReport(
                quantize_model(model, self.policy, self.compensation), self.policy.to_dict()
            )
            self.report.library = library
            mimicry = None if float_model is None else self._mimicry(float_model)
            try:
                self._read(kept)
                self._calibrate(kept, mimicry)
                if mimicry is not None:
                    self._train(kept, mimicry)
                tuning = None if mimicry is None else self._tuning(mimicry)
                with self._step('weight_ptq'):
                    images = self._first(kept, self.ptq_images)
                    self.report.compensation_r2 = run_weight_ptq(
                        model, images, self._run, self.method, tuning
                    )
                if tuning is not None:
                    self.report.tuning_losses = tuning.losses
            finally:
                kept.close()
            if mimicry is not None:
                mimicry.remove()
            model.gplq_report = self.report
        return self.report

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.report.seconds[name] = time.monotonic() - start

    def _run(self, batch: Any) -> Any:
        return self.forward(self.model, batch)

    def _mimicry(self, float_model: nn.Module) -> Mimicry:
        settings = {key: self.train[key] for key in MIMICRY if key in self.train}

        def features(network: nn.Module, batch: Any) -> Any:
            # The heads of a detector cost more than its maps, and do without short floats.
            maps = self.forward is run_on and mimicry.taps_maps
            if maps and is_of_openmmlab(network, batch) and hasattr(network, 'extract_feat'):
                return network.extract_feat(batch['inputs'])
            return self.forward(network, batch)

        mimicry = Mimicry(self.model, float_model, **settings, forward=features)
        prepare_training(self.model, **{k: self.train[k] for k in TRAINING if k in self.train})
        return mimicry

    def _read(self, kept: TensorStore) -> None:
        """Keeps the images of all steps: a loader may shuffle, or give them once only."""
        wanted = max(self.calibration_images, self.ptq_images)
        if self.train is not None and self.train['mimic'] is not None:
            wanted = max(wanted, images_of('PCABasisHook'))
        with self._step('images'), torch.no_grad():
            total = len(self.loader) if hasattr(self.loader, '__len__') else None
            for batch in track(first_batches(self.loader, wanted), total, 'images'):
                # As a loader gives them, on the CPU. A store sees the tensors of plain dicts.
                kept.append(dict(batch) if isinstance(batch, Mapping) else batch)
            if not len(kept):
                raise DataError('the calibration loader yields no images; give at least one batch.')

    def _first(self, kept: TensorStore, num_images: int) -> Iterator[Any]:
        for number, batch in enumerate(first_batches(kept, num_images), start=1):
            yield prepare(self.model, batch, f'batch {number} of the calibration images')

    def _calibrate(self, kept: TensorStore, mimicry: Mimicry | None) -> None:
        count = len(list(first_batches(kept, self.calibration_images)))

        def batches(description: str) -> Iterator[Any]:
            return track(self._first(kept, self.calibration_images), count, description)

        tap = None if mimicry is None else mimicry.tap
        with self._step('calibration'):
            self.report.norms = calibrate_activations(self.model, batches, self._run, tap)
            batch = next(self._first(kept, 1))
            lengths = {len(x) for x in tree_leaves(batch) if torch.is_tensor(x) and x.dim()}
            # Not where a tensor may be anything but one of images.
            batch = first_image(batch) if len(lengths) == 1 else batch
            unknown = unknown_products(self.model, self.policy, batch, self._run)
        if unknown:
            self.report.unknown = unknown
            warnings.warn(warning_of(unknown, self.model), stacklevel=4)

    def _train(self, kept: TensorStore, mimicry: Mimicry) -> None:
        if mimicry.loss is not None:
            mimicry.loss.to(next(self.model.parameters()).device)
            teacher = mimicry.need_teacher()
            with self._step('pca'):
                features = (
                    teacher.outputs(batch)[0]
                    for batch in self._first(kept, images_of('PCABasisHook'))
                )
                self.report.pca = fit_basis(mimicry.loss, features)
        wrapper = build_optim_wrapper(self.model, self.train['optim_wrapper'])
        with self._step('act_qat'):
            for iteration, (place, batch) in enumerate(self._iterations()):
                seed_iteration(self.seed, iteration)
                batch = prepare(self.model, batch, place, training=True)
                self.report.losses.append(self._train_iteration(mimicry, wrapper, batch, place))
        freeze_activations(self.model)

    def _iterations(self) -> Iterator[tuple[str, Any]]:
        loader, epochs, left = (self.train[key] for key in ('loader', 'epochs', 'max_iters'))
        total = len(loader) * epochs if hasattr(loader, '__len__') else None
        total = left if total is None else min(total, total if left is None else left)
        self.model.train()
        yield from track(islice(batches_of(loader, epochs, left is None), left), total, 'Act-QAT')

    def _train_iteration(
        self, mimicry: Mimicry, wrapper, batch: Any, place: str
    ) -> dict[str, float]:
        with wrapper.optim_context(self.model):
            total, log = self._loss(mimicry, batch, place)
        wrapper.update_params(total)
        return {key: float(value.detach()) for key, value in log.items()}

    def _loss(self, mimicry: Mimicry, batch: Any, place: str) -> tuple[Tensor, dict]:
        run = partial(task_losses, self.model, batch, self.forward, self.train['loss'])
        losses = mimicry.losses(run, batch)
        if not losses:
            raise SettingError(
                'there is nothing to train for: the loader yields no labels, and mimic, '
                'distill and block_mimic are None.'
            )
        total, log = BaseModel.parse_losses(self.model, losses)
        advice = (
            f'the model is what it was before. It was {place}: check the images and the weights, '
            'or train with a smaller optim_wrapper.optimizer.lr.'
        )
        require_finite(total, log, advice)
        return total, log

    def _tuning(self, mimicry: Mimicry) -> WeightTuning | None:
        settings = self.train['weight_tuning']
        if settings is None:
            return None

        def loss(batch: tuple[str, Any]) -> Tensor:
            place, batch = batch
            batch = prepare(self.model, batch, place, training=True)
            return self._loss(mimicry, batch, place)[0]

        wrapper, start = self.train['optim_wrapper'], len(self.report.losses)
        batches = batches_of(self.train['loader'], None, False)
        return WeightTuning(self.model, settings, wrapper, loss, batches, self.seed, start)
