"""The two-stage loop: activations first, weights later."""

from ...layers import weights_disabled
from ...models import Stage
from ...ptq import build_weight_ptq, quantize_weights
from ...registry import LOOPS
from ..calibration_set import CalibrationSet
from ..progress import show_weight_ptq
from .quant_loop import QuantTrainLoop

__all__ = ['GPLQTrainLoop']


@LOOPS.register_module()
class GPLQTrainLoop(QuantTrainLoop):
    """Calibration, Act-QAT, Weight-PTQ, compensation; evaluation after each.

    Args:
        runner: The runner.
        dataloader: Training data; its sampler must be a ``gplq_mm.ResumableSampler``.
        weight_ptq: ``dict(type=..., num_images=..., batch_size=..., seed=...)``: the PTQ method
            with its options, and the training images that it sees.
        **kwargs: As in :class:`QuantTrainLoop`; ``max_epochs=0`` leaves Stage 1 out (plain PTQ
            with compensation).

    Raises:
        ValueError: If the model is one for direct QAT.
    """

    def __init__(self, runner, dataloader, weight_ptq: dict | None = None, **kwargs):
        settings = {'type': 'GPTQ', 'num_images': 512, 'batch_size': 16, 'seed': 0}
        settings.update(weight_ptq or {})
        self.ptq_images = {key: settings.pop(key) for key in ('num_images', 'batch_size', 'seed')}
        self.method = build_weight_ptq(settings)
        few = {**self.ptq_images, 'num_images': min(64, self.ptq_images['num_images'])}
        super().__init__(runner, dataloader, **{'error_images': few, **kwargs})
        if self.model.direct is not None:
            raise ValueError(
                'GPLQTrainLoop quantizes activations first; for direct QAT set '
                "train_cfg.type='gplq_mm.DirectQATLoop', for GPLQ set model.direct=None."
            )

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
        model.freeze_activations()
        model.eval()
        images = CalibrationSet.from_runner(self.runner, **self.ptq_images)
        with self.record.clock.stage('weight_ptq'):
            batches = self._prepared(images.batches(description='images for Weight-PTQ'))
            with show_weight_ptq() as report:
                scores = quantize_weights(
                    model.architecture, batches, self._forward, self.method, report
                )
        model.advance(Stage.WEIGHT_PTQ)
        self.record.weight_ptq = {**images.describe(), 'compensation_r2': scores}
        for name, score in scores.items():
            kept = 'kept' if score > 0 else 'dropped'
            self.runner.logger.info(f'compensation of {name}: held-out R^2 {score:.3f}, {kept}')
