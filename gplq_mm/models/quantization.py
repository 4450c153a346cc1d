"""Both stages of GPLQ on a plain module: what :func:`gplq_mm.quantize_` does."""

import copy
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from torch import nn

from ..distributed import rank_and_world_size
from ..errors import DataError, SettingError
from ..layers import (
    QuantReport,
    freeze_activations,
    quant_layers,
    quantize_model,
    unchanged_on_error,
)
from ..layers.family import libraries
from ..progress import track
from ..ptq import NormReport, build_weight_ptq
from ..ptq.tensor_store import Memory, TensorStore
from ..quant import QuantPolicy
from .batches import first_batches, is_of_openmmlab, prepare, run_on, task_losses
from .mimicry import Mimicry, prepare_training
from .steps import calibrate_activations, fit_basis, run_weight_ptq, seed_iteration
from .training_losses import require_finite

# What batches may hold in memory before they go to disk.
MEMORY = 2**30
MIMICRY = ('mimic', 'distill', 'task_weight', 'feature_layer', 'teacher_dtype')
TRAINING = ('saved_bytes', 'gradient_checkpointing', 'train_weights')
TRAIN_KEYS = ('loader', 'epochs', 'max_iters', 'optim_wrapper', 'loss', *MIMICRY, *TRAINING)


@cache
def _base() -> Config:
    """The base config of all runs, which holds the defaults."""
    package = Path(__file__).resolve().parents[1]
    places = (package / '.mim', package.parent)
    path = next(p / 'configs/_base_/gplq.py' for p in places if (p / 'configs').is_dir())
    return Config.fromfile(path)


def default(name: str) -> Any:
    """A copy of a setting of ``configs/_base_/gplq.py``, such as ``'gplq_policy'``."""
    value = copy.deepcopy(_base()[name])
    return value.to_dict() if hasattr(value, 'to_dict') else value


def _hook(kind: str) -> dict:
    return next(hook for hook in default('gplq_hooks') if hook['type'] == f'gplq_mm.{kind}')


@dataclass
class QuantizedReport:
    """What became of a model; ``model.gplq_report``.

    Attributes:
        layers: What was replaced.
        policy: Plain data of the policy.
        norms: What became of LayerNorms, where the policy reparametrizes them.
        images: Images of each step.
        compensation_r2: Held-out R^2 of the compensation of every block that has one.
        pca: Basis of the mimic loss, where there was training.
        losses: Losses of every iteration of training, by name.
        seconds: Duration of each step.
        library: ``(package, data)`` that the float model can be built of again, or None.
    """

    layers: QuantReport
    policy: dict
    norms: NormReport | None = None
    compensation_r2: dict[str, float] = field(default_factory=dict)
    pca: dict = field(default_factory=dict)
    losses: list[dict[str, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    library: tuple[str, dict] | None = None

    def __str__(self) -> str:
        kept = sum(score > 0 for score in self.compensation_r2.values())
        seconds = ', '.join(f'{step} {value:.0f} s' for step, value in self.seconds.items())
        return f'{self.layers}; {kept} compensations; {seconds}'


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
    """

    def __init__(self, model, calibration, train, policy, weight_ptq, compensation, forward, seed):
        self.model, self.seed = model, seed
        self.forward = forward or run_on
        settings = default('gplq_policy') if policy is None else policy
        self.policy = settings if isinstance(settings, QuantPolicy) else QuantPolicy(**settings)
        ptq = default('gplq_train_cfg')['weight_ptq']
        # Of the images that a run reads itself; here they come in the loader's batches.
        ptq.pop('batch_size')
        ptq.update(weight_ptq or {})
        self.ptq_images = ptq.pop('num_images')
        self.method = build_weight_ptq(ptq)
        use_default = compensation == 'default'
        self.compensation = default('gplq_compensation') if use_default else compensation
        self.train = None if train is None else self._check_train(dict(train))
        self.loader, self.calibration_images = self._check_calibration(calibration)

    def _check_calibration(self, calibration: Any) -> tuple[Iterable, int]:
        images = _hook('CalibrationHook')['num_images']
        if isinstance(calibration, Mapping):
            unknown = set(calibration) - {'loader', 'num_images'}
            if unknown or 'loader' not in calibration:
                raise SettingError(
                    f'calibration must be a loader, or have a loader and may have num_images; it '
                    f'has {sorted(calibration)}.'
                )
            images = calibration.get('num_images', images)
            calibration = calibration['loader']
        if calibration is None and self.train is not None:
            calibration = self.train['loader']
            if isinstance(calibration, Iterator):
                raise SettingError(
                    'train.loader is an iterator, whose images would be gone after calibration; '
                    'give calibration a loader of its own.'
                )
        if not isinstance(calibration, Iterable):
            raise SettingError(
                'calibration must be a loader of images, as of torch.utils.data.DataLoader; got '
                f'{type(calibration).__name__}.'
            )
        return calibration, images

    @staticmethod
    def _check_train(train: dict) -> dict:
        unknown = set(train) - set(TRAIN_KEYS)
        if unknown or not isinstance(train.get('loader'), Iterable):
            raise SettingError(
                f'train must have a loader, and may have {", ".join(TRAIN_KEYS[1:])}; it has '
                f'{", ".join(sorted(train))}.'
            )
        if rank_and_world_size()[1] > 1:
            raise SettingError(
                'quantize_(train=...) trains in one process; for several use tools/train.py.'
            )
        train = {
            'epochs': default('gplq_train_cfg')['max_epochs'],
            'max_iters': None,
            'loss': None,
            'mimic': default('gplq_mimic'),
            **train,
        }
        loader = train['loader']
        if train['epochs'] > 1 and isinstance(loader, Iterator):
            raise SettingError(
                f'train.loader is an iterator, which gives its images once, and epochs='
                f'{train["epochs"]}; give a loader that starts again for each epoch.'
            )
        wrapper = default('gplq_optim_wrapper')
        for key, value in train.get('optim_wrapper', {}).items():
            merges = isinstance(value, Mapping) and isinstance(wrapper.get(key), Mapping)
            wrapper[key] = {**wrapper[key], **value} if merges else value
        return {**train, 'optim_wrapper': wrapper}

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
                with self._step('weight_ptq'):
                    self.report.compensation_r2 = run_weight_ptq(
                        model, self._first(kept, self.ptq_images), self._run, self.method
                    )
            finally:
                kept.close()
            if mimicry is not None and mimicry.tap is not None:
                mimicry.tap.remove()
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
            wanted = max(wanted, _hook('PCABasisHook')['num_images'])
        with self._step('images'), torch.no_grad():
            total = len(self.loader) if hasattr(self.loader, '__len__') else None
            for batch in track(first_batches(self.loader, wanted), total, 'images'):
                # As a loader gives them, on the CPU. A store sees the tensors of plain dicts.
                kept.append(dict(batch) if isinstance(batch, Mapping) else batch)
            if not len(kept):
                raise DataError('the calibration loader yields no images; give at least one batch.')

    def _first(self, kept: TensorStore, num_images: int) -> Iterator[Any]:
        for batch in first_batches(kept, num_images):
            yield prepare(self.model, batch)

    def _calibrate(self, kept: TensorStore, mimicry: Mimicry | None) -> None:
        count = len(list(first_batches(kept, self.calibration_images)))

        def batches(description: str) -> Iterator[Any]:
            return track(self._first(kept, self.calibration_images), count, description)

        tap = None if mimicry is None else mimicry.tap
        with self._step('calibration'):
            self.report.norms = calibrate_activations(self.model, batches, self._run, tap)

    def _train(self, kept: TensorStore, mimicry: Mimicry) -> None:
        if mimicry.loss is not None:
            mimicry.loss.to(next(self.model.parameters()).device)
            images = _hook('PCABasisHook')['num_images']
            teacher = mimicry.need_teacher()
            with self._step('pca'):
                features = (teacher.outputs(batch)[0] for batch in self._first(kept, images))
                self.report.pca = fit_basis(mimicry.loss, features)
        wrapper = build_optim_wrapper(self.model, self.train['optim_wrapper'])
        with self._step('act_qat'):
            for iteration, batch in enumerate(self._iterations()):
                seed_iteration(self.seed, iteration)
                batch = prepare(self.model, batch, training=True)
                self.report.losses.append(self._train_iteration(mimicry, wrapper, batch))
        if not self.report.losses and self.train['epochs'] and self.train['max_iters'] != 0:
            raise DataError('the loader of train yields no images; give at least one batch.')
        freeze_activations(self.model)

    def _iterations(self) -> Iterator[Any]:
        loader, epochs, left = (self.train[key] for key in ('loader', 'epochs', 'max_iters'))
        total = len(loader) * epochs if hasattr(loader, '__len__') else None
        total = left if total is None else min(total, total if left is None else left)
        batches = (batch for _ in range(epochs) for batch in loader)
        self.model.train()
        for number, batch in enumerate(track(batches, total, 'Act-QAT')):
            if number == left:
                return
            yield batch

    def _train_iteration(self, mimicry: Mimicry, wrapper, batch: Any) -> dict[str, float]:
        run = partial(task_losses, self.model, batch, self.forward, self.train['loss'])
        with wrapper.optim_context(self.model):
            losses = mimicry.losses(run, batch)
            if not losses:
                raise SettingError(
                    'there is nothing to train for: the loader yields no labels, and mimic and '
                    'distill are None.'
                )
            total, log = BaseModel.parse_losses(self.model, losses)
        require_finite(total, log)
        wrapper.update_params(total)
        return {key: float(value.detach()) for key, value in log.items()}
