"""Calibrates the activation quantizers before training."""

from functools import partial

import torch
from mmengine.hooks import Hook

from ...errors import SettingError
from ...evaluation.coverage import warning_of
from ...models import GPLQ, Stage, calibrate_activations, unknown_products
from ...ptq import NormReport
from ...registry import HOOKS
from ..calibration_set import CalibrationSet
from ..weights import unwrap


@HOOKS.register_module()
class CalibrationHook(Hook):
    """Fills scales and zero-points in place from training images; skipped on resume.

    Args:
        num_images: Images over all ranks. Defaults to 128.
        batch_size: Images of a batch, per rank.
        seed: Which images. Defaults to None, the seed of the run.
        dataset: Another data set config than the training set.
    """

    priority = 'HIGH'

    def __init__(
        self,
        num_images: int = 128,
        batch_size: int = 32,
        seed: int | None = None,
        dataset: dict | None = None,
    ):
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.dataset = dataset

    def before_train(self, runner) -> None:
        """Runs the calibration and hands the image ids to the loop."""
        model = unwrap(runner.model)
        if not isinstance(model, GPLQ):
            raise SettingError(
                'CalibrationHook calibrates a GPLQ model; remove it from this config.'
            )
        if model.stage >= Stage.CALIBRATED:
            return
        images = self.images(runner)
        record = getattr(runner.train_loop, 'record', None)
        with record.clock.stage('calibration') if record is not None else torch.no_grad():
            report = self.calibrate(model, images)
        if record is not None:
            record.calibration = images.describe()
        runner.logger.info(f'calibrated on {len(images.indices)} images: {model.quant_report}')
        if report.done or report.left:
            runner.logger.info(f'{report}')
        with torch.random.fork_rng(devices=[]):
            batches = list(images.batches(1))
        for batch in batches:
            data = model.data_preprocessor(batch, False)
            unknown = unknown_products(
                model.architecture, model.policy, data, lambda data: model(**data, mode='tensor')
            )
            if unknown:
                runner.logger.warning(warning_of(unknown, model.architecture))

    def images(self, runner) -> CalibrationSet:
        """The images of the config, in the pipeline of evaluation."""
        return CalibrationSet.from_runner(
            runner,
            self.num_images,
            batch_size=self.batch_size,
            seed=self.seed,
            dataset=self.dataset,
        )

    @staticmethod
    def calibrate(model: GPLQ, images: CalibrationSet) -> NormReport:
        """Fills scales and zero-points of a model from images, and enters the stage.

        Returns:
            What became of its LayerNorms, where the policy reparametrizes them.
        """
        model.eval()
        # Through the wrapper, which refuses images that are not finite.
        report = calibrate_activations(
            model.architecture,
            partial(images.prepared, model.data_preprocessor),
            lambda data: model(**data, mode='tensor'),
            model.mimicry.tap,
        )
        model.advance(Stage.CALIBRATED)
        return report
