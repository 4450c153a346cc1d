"""What all quantization loops share: resumable training, evaluation, the record and the summary."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop

from ...checkpoint import atomic_write_text
from ...distributed import make_rank_invariant
from ...errors import SettingError
from ...evaluation import layer_output_error, weight_drift
from ...layers import quant_layers, quantizers_disabled
from ...models import GPLQ, Stage, seed_iteration
from ...ptq import build_weight_ptq, round_weights
from ...quant import NotCalibratedError
from ..calibration_set import CalibrationSet
from ..run_record import RunRecord, print_summary, write_summary
from ..stage_evaluation import StageEvaluation
from ..training_data import TrainingData
from ..weights import unwrap


class _RunStateHook(Hook):
    """Carries the loop's record and the model's policy in every checkpoint."""

    priority = 'HIGHEST'

    def __init__(self, loop: 'QuantTrainLoop'):
        self.loop = loop

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        model = self.loop.model
        checkpoint['gplq'] = {
            'stage': model.stage.name,
            'policy': model.policy.to_dict(),
            'direct': model.direct,
            'seed': self.loop.seed,
            'data': self.loop.data.state_dict(),
            'record': self.loop.record.state_dict(),
        }

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        if 'gplq' in checkpoint:
            state = checkpoint['gplq']
            self.loop.record.load_state_dict(state['record'])
            self.loop.take_seed(state['seed'])
            if 'optimizer' in checkpoint:
                self.loop.data.require_same(state['data'])


class QuantTrainLoop(EpochBasedTrainLoop):
    """Calibration, then what a subclass does, with evaluation before, between and after.

    Every step is done once and recorded in the next checkpoint, so that a resumed run goes on
    where the last complete checkpoint stands, on as many ranks as there are then. While it trains,
    data order and random numbers depend on the seed and the iteration alone.

    Args:
        runner: The runner.
        dataloader: Training data; its sampler must be a ``gplq_mm.ResumableSampler``.
        max_epochs: Epochs of training; 0 leaves it out.
        max_iters: Stops training after so many iterations. Defaults to all of the epochs.
        baseline: PTQ method (a name or config) without data that stands beside the result as
            plain W4A4 PTQ, or None.
        num_diagnostic_images: Validation images for the feature distance.
        error_images: Which training images the PTQ error is measured on: ``num_images``,
            ``batch_size``, ``seed`` (the run's by default).
        transfer: ``dict(train_dataloader=..., val_dataloader=...)`` of another labelled data set,
            on which every stage is probed (:class:`gplq_mm.engine.transfer.TransferProbe`), or
            None.

    Raises:
        SettingError: If the sampler cannot resume within an epoch, a batch sampler is set, a
            number is out of its range, or the model is not a GPLQ model.
    """

    def __init__(
        self,
        runner,
        dataloader,
        max_epochs: int = 1,
        max_iters: int | None = None,
        baseline: dict | str | None = 'RoundToNearest',
        num_diagnostic_images: int = 512,
        error_images: dict | None = None,
        transfer: dict | None = None,
    ):
        super().__init__(runner, dataloader, max_epochs=max(max_epochs, 1))
        name = type(self).__name__
        if not isinstance(unwrap(runner.model), GPLQ):
            raise SettingError(f'{name} trains a model of type gplq_mm.GPLQ.')
        if self.dataloader.batch_size is None:
            raise SettingError(
                f'{name} counts batches of one size; set train_dataloader.batch_sampler=None.'
            )
        if not hasattr(self.dataloader.sampler, 'set_position'):
            raise SettingError(
                f'{name} resumes within an epoch; set train_dataloader.sampler='
                "dict(type='gplq_mm.ResumableSampler', shuffle=True) and wrap the data set in "
                "dict(type='gplq_mm.SeededDataset', dataset=...)."
            )
        self._max_epochs = max_epochs
        self._max_iters = max_epochs * len(self.dataloader)
        if max_iters is not None:
            if max_iters < 0:
                raise SettingError(f'max_iters={max_iters} must not be negative.')
            self._max_iters = min(max_iters, self._max_iters)
        if isinstance(baseline, str):
            baseline = {'type': baseline}
        self.baseline = None if baseline is None else build_weight_ptq(baseline)
        self.error_images = {
            'num_images': 64,
            'batch_size': 32,
            'seed': None,
            **(error_images or {}),
        }
        self.data = TrainingData.of(self.dataloader)
        self.seed = runner.seed or 0
        make_rank_invariant(self.model.architecture)
        self.record = RunRecord()
        self.evaluation = StageEvaluation(runner, self.record, num_diagnostic_images, transfer)
        runner.register_hook(_RunStateHook(self))

    @property
    def model(self) -> GPLQ:
        """The GPLQ model inside any wrapper."""
        return unwrap(self.runner.model)

    def take_seed(self, seed: int) -> None:
        """Continues the order of images and the random numbers of the run that is resumed."""
        if seed != self.seed:
            self.seed = seed
            self.dataloader.sampler.set_seed(seed)

    @property
    def names(self) -> dict[str, str]:
        """Row of the result table -> name of the stage."""
        return self.model.stage_names

    # -- the run --------------------------------------------------------------------------

    def run(self) -> torch.nn.Module:
        """Runs what has not been run yet."""
        self.runner.call_hook('before_train')
        if self.model.stage < Stage.CALIBRATED:
            raise NotCalibratedError(
                'the activation quantizers are not calibrated; add '
                "dict(type='gplq_mm.CalibrationHook') to custom_hooks."
            )
        if self.model.stage == Stage.CALIBRATED and self._iter == 0:
            self._start()
            self._measure_start()
        if self.model.stage != Stage.WEIGHT_PTQ:
            self._quantize()
            self.runner.call_hook('after_stage', name=self.names['final'], optimizer=False)
        self._measure_end()
        self.runner.call_hook('after_train')
        return self.runner.model

    def _start(self) -> None:
        """What follows calibration and comes before anything is measured or saved."""

    def _quantize(self) -> None:
        """From the calibrated model to quantized weights (``Stage.WEIGHT_PTQ``)."""
        raise NotImplementedError

    def _measure_start(self) -> None:
        names, record = self.names, self.record
        if names['fp32'] in record.metrics:
            return
        if self.model.backbone_from is not None:
            # The heads of the new task are untrained: neither row would say anything.
            self.runner.call_hook('after_stage', name='calibrated', optimizer=False)
            return
        self.evaluation.run(names['fp32'], quantizers_disabled(self.model))
        if self.baseline is not None:
            # The latent weights are untouched, so the baseline needs no copy of the model.
            with record.clock.stage('baseline'):
                round_weights(self.model.architecture, self.baseline)
            self.evaluation.run(names['ptq'], nullcontext())
            with record.clock.stage('diagnostics'):
                record.ptq_error['without_stage1'] = self._ptq_error(False)
            for layer in quant_layers(self.model).values():
                layer.weight_quantizer.clear()
        self.runner.call_hook('after_stage', name='calibrated', optimizer=False)

    def _train(self, step: str) -> None:
        """All iterations that are left, booked as ``step``."""
        with self.record.clock.stage(step):
            while self._iter < self._max_iters and not self.stop_training:
                self._epoch = self._iter // len(self.dataloader)
                self.run_epoch()

    def _measure_latent(self) -> None:
        """Accuracy of the trained FP32 weights, and how far they have moved."""
        name, record, model = self.names['latent_fp32'], self.record, self.model
        self.evaluation.run(name, quantizers_disabled(model))
        if model.teacher is not None:
            with record.clock.stage('diagnostics'):
                reference = model.teacher.state_dict()
                record.weight_drift = weight_drift(model.architecture, reference)

    def _measure_end(self) -> None:
        names, record = self.names, self.record
        if names['final'] not in record.metrics:
            self.evaluation.run(names['final'], nullcontext())
            with record.clock.stage('diagnostics'):
                record.ptq_error['with_stage1'] = self._ptq_error(True)
            self.runner.call_hook('after_stage', name=names['final'], optimizer=False)
        if is_main_process():
            path = Path(self.runner.work_dir) / 'summary.json'
            extra = {
                'stages': names,
                'policy': self.model.policy.to_dict(),
                'direct': self.model.direct,
                'checkpoint': str(Path(self.runner.work_dir) / f'{names["final"]}.pth'),
                'seed': self.seed,
                'act_qat_iterations': self._iter,
                'images': record.images(self.data.images_in(self._iter + record.tuning_iterations)),
            }
            if record.decisions.predictions:
                atomic_write_text(path.with_name('decisions.csv'), record.decisions.to_csv())
            print_summary(write_summary(path, record, extra))
            self.runner.logger.info(f'summary: {path}')

    # -- training -------------------------------------------------------------------------

    def run_epoch(self) -> None:
        """The rest of the current epoch."""
        length = len(self.dataloader)
        done = self._iter - self._epoch * length
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        for index, data_batch in enumerate(self._batches_from(self._iter), start=done):
            seed_iteration(self.seed, self._iter)
            self.run_iter(index, data_batch)
            if self._iter >= self._max_iters:
                break
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def _batches_from(self, iteration: int) -> Iterator[dict]:
        """Batches of the rest of the epoch that an iteration belongs to, begun by its own."""
        epoch, done = divmod(iteration, len(self.dataloader))
        self.dataloader.sampler.set_position(epoch, done * self.data.batch)
        yield from self.dataloader

    # -- diagnostics ----------------------------------------------------------------------

    def _images(self, settings: dict) -> CalibrationSet:
        """Training images that a step of the loop reads, by the run's seed if it names none."""
        seed = self.seed if settings['seed'] is None else settings['seed']
        return CalibrationSet.from_runner(self.runner, **{**settings, 'seed': seed})

    @property
    def _forward(self) -> Callable[[dict], object]:
        architecture = self.model.architecture
        return lambda data: architecture(**data, mode='tensor')

    def _ptq_error(self, activations_quantized: bool) -> dict:
        images = self._images(self.error_images)
        with torch.no_grad():
            return layer_output_error(
                self.model.architecture,
                images.prepared(self.model.data_preprocessor),
                self._forward,
                activations_quantized,
            )
