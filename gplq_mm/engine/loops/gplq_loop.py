"""The two-stage loop: activations first, weights later."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ...checkpoint import CheckpointError
from ...errors import SettingError
from ...layers import weights_disabled
from ...models import Stage, WeightTuning, run_weight_ptq, tuning_settings
from ...ptq import build_weight_ptq
from ...registry import LOOPS
from ..weights import load_act_qat
from .quant_loop import QuantTrainLoop


@LOOPS.register_module()
class GPLQTrainLoop(QuantTrainLoop):
    """Calibration, Act-QAT, Weight-PTQ, compensation; evaluation after each.

    Args:
        runner: The runner.
        dataloader: Training data; its sampler must be a ``gplq_mm.ResumableSampler``.
        weight_ptq: ``dict(type=..., num_images=..., batch_size=..., seed=...)``: the PTQ method
            with its options, and the training images that it sees, by default by the run's seed.
        act_qat_from: Checkpoint ``w32a4.pth`` of another run. This one then begins where that
            one ended Stage 1, with its metrics, but for those of plain PTQ. For comparisons of
            Stage 2 alone: the policies may differ in what they say of weights, and in nothing
            else. Defaults to None, which runs Stage 1.
        weight_tuning: ``dict(iters_per_block=16, lr=1e-5)`` trains, after each block of Stage 2,
            the weights that are still float (:class:`gplq_mm.models.WeightTuning`), with the losses
            and the optimizer of Stage 1 and the training data that follow on it; or None.
        **kwargs: As in :class:`QuantTrainLoop`; ``max_epochs=0`` leaves Stage 1 out (plain PTQ
            with compensation).

    Raises:
        SettingError: If the model is one for direct QAT.
    """

    def __init__(
        self,
        runner,
        dataloader,
        weight_ptq: dict | None = None,
        act_qat_from: str | None = None,
        weight_tuning: dict | None = None,
        **kwargs,
    ):
        settings = {'type': 'GPTQ', 'num_images': 512, 'batch_size': 16, 'seed': None}
        settings.update(weight_ptq or {})
        self.ptq_images = {key: settings.pop(key) for key in ('num_images', 'batch_size', 'seed')}
        self.method = build_weight_ptq(settings)
        self.weight_tuning = tuning_settings(weight_tuning)
        few = {**self.ptq_images, 'num_images': min(64, self.ptq_images['num_images'])}
        super().__init__(runner, dataloader, **{'error_images': few, **kwargs})
        if self.model.direct is not None:
            raise SettingError(
                'GPLQTrainLoop quantizes activations first; for direct QAT set '
                "train_cfg.type='gplq_mm.DirectQATLoop', for GPLQ set model.direct=None."
            )
        self.act_qat_from = act_qat_from

    def run(self) -> torch.nn.Module:
        """Runs what has not been run yet.

        Raises:
            CheckpointError: If ``act_qat_from`` cannot be begun with, or the run that is resumed
                has begun in another way.
        """
        if self.act_qat_from is not None:
            if self.model.stage == Stage.FLOAT:
                self._continue_from(self.act_qat_from)
            elif self.record.act_qat_from is None:
                raise CheckpointError(
                    'train_cfg.act_qat_from is set, but the checkpoint that is resumed is of a '
                    'run with a Stage 1 of its own; choose another work dir, or set it to None.'
                )
        return super().run()

    def _continue_from(self, source: str) -> None:
        checkpoint = load_act_qat(self.model, source)
        self.record.continue_from(checkpoint['gplq']['record'], source)
        self.take_seed(checkpoint['gplq']['seed'])
        self._iter, self._epoch = (checkpoint['meta'][key] for key in ('iter', 'epoch'))
        self.runner.logger.info(f'Stage 1 is that of {source}')

    def _quantize(self) -> None:
        names = self.names
        if self._iter < self._max_iters and names['act'] not in self.record.metrics:
            self.model.advance(Stage.ACT_QAT)
            self._train('act_qat')
        self._finish_act_qat()
        self._run_weight_ptq()

    def _finish_act_qat(self) -> None:
        names, model = self.names, self.model
        if names['act'] in self.record.metrics:
            return
        model.freeze_activations()
        self.evaluation.run(names['act'], weights_disabled(model))
        self._measure_latent()
        self.runner.call_hook('after_stage', name=names['act'], optimizer=False)

    def _run_weight_ptq(self) -> None:
        model = self.model
        model.eval()
        images = self._images(self.ptq_images)
        batches = images.prepared(model.data_preprocessor, 'images for Weight-PTQ')
        tuning = self._tuning()
        with self.record.clock.stage('weight_ptq'):
            scores = run_weight_ptq(model.architecture, batches, self._forward, self.method, tuning)
        model.advance(Stage.WEIGHT_PTQ)
        self.record.weight_ptq = {**images.describe(), 'compensation_r2': scores}
        if tuning is not None:
            self.record.weight_ptq.update(
                tuning_iterations=tuning.iterations, tuning_losses=tuning.losses
            )
        for name, score in scores.items():
            kept = 'kept' if score > 0 else 'dropped'
            self.runner.logger.info(f'compensation of {name}: held-out R^2 {score:.3f}, {kept}')

    def _tuning(self) -> WeightTuning | None:
        """What trains between the blocks: it goes on in the data where Stage 1 has ended."""
        model, settings = self.model, self.weight_tuning
        if settings is None:
            return None

        def loss(data: Mapping) -> Tensor:
            data = model.data_preprocessor(data, True)
            return model.parse_losses(model(**data, mode='loss'))[0]

        wrapper = self.runner.cfg['optim_wrapper']
        start = self._iter
        batches = self._batches_without_end(start)
        return WeightTuning(model, settings, wrapper, loss, batches, self.seed, start)

    def _batches_without_end(self, iteration: int) -> Iterator[dict]:
        while True:
            for batch in self._batches_from(iteration):
                yield batch
                iteration += 1
