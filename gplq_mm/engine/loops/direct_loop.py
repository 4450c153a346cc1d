"""Direct QAT, what GPLQ is compared with: weights and activations are quantized together."""

from ...errors import SettingError
from ...layers import weights_are_learned
from ...models import Stage
from ...ptq import init_learned_weights
from ...registry import LOOPS
from .quant_loop import QuantTrainLoop


@LOOPS.register_module()
class DirectQATLoop(QuantTrainLoop):
    """Calibration, then LSQ on weights and activations at once; evaluation before and after.

    The model needs ``direct=dict()``. All else (losses, data, optimizer, files, summary) is that
    of a GPLQ run, so that a comparison differs in the order of the steps alone. There is no
    ``w32a4.pth``; ``w4a4.pth`` holds the integers that the last forward has simulated.

    Args:
        runner: The runner.
        dataloader: Training data; its sampler must be a ``gplq_mm.ResumableSampler``.
        **kwargs: As in :class:`QuantTrainLoop`; ``max_epochs=0`` leaves the training out (plain
            rounding).

    Raises:
        SettingError: If the model is not one for direct QAT.
    """

    def __init__(self, runner, dataloader, **kwargs):
        super().__init__(runner, dataloader, **kwargs)
        if self.model.direct is None:
            raise SettingError(
                'DirectQATLoop needs a model with learned weight quantizers: set '
                'model.direct=dict() and model.compensation=None.'
            )

    def _start(self) -> None:
        if weights_are_learned(self.model.architecture):
            return
        with self.record.clock.stage('calibration'):
            init_learned_weights(self.model.architecture, self.model.direct['init'])

    def _quantize(self) -> None:
        if self._iter < self._max_iters:
            self.model.advance(Stage.DIRECT_QAT)
            self._train('direct_qat')
        self.model.freeze_activations()
        self.model.freeze_learned_weights()
        self.model.advance(Stage.WEIGHT_PTQ)

    def _measure_end(self) -> None:
        if self.names['latent_fp32'] not in self.record.metrics:
            self._measure_latent()
        super()._measure_end()
