"""Fits the PCA basis of the mimic loss on teacher features before training."""

import torch
from mmengine.hooks import Hook

from ...models import fit_basis
from ...registry import HOOKS
from ..calibration_set import CalibrationSet
from ..weights import unwrap


@HOOKS.register_module()
class PCABasisHook(Hook):
    """Mean and principal components of the teacher's features, or of its maps' places.

    Skipped where the model has no mimic loss, and on resume.

    Args:
        num_images: Training images over all ranks. Defaults to 1024.
        batch_size: Images of a batch, per rank.
        seed: Which images. Defaults to None, the seed of the run.
    """

    priority = 'ABOVE_NORMAL'

    def __init__(self, num_images: int = 1024, batch_size: int = 32, seed: int | None = None):
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed

    @torch.no_grad()
    def before_train(self, runner) -> None:
        """Fits the basis and logs the explained variance."""
        model = unwrap(runner.model)
        mimic = getattr(model, 'mimic_loss', None)
        if mimic is None or mimic.is_fitted:
            return
        images = CalibrationSet.from_runner(
            runner, self.num_images, batch_size=self.batch_size, seed=self.seed
        )
        record = getattr(runner.train_loop, 'record', None)
        with record.clock.stage('pca') if record is not None else torch.no_grad():
            batches = images.prepared(model.data_preprocessor, 'PCA of teacher features')
            features = (model.teacher_outputs(data['inputs'])[0] for data in batches)
            result = fit_basis(mimic, features)
        if record is not None:
            record.pca = {**result, 'num_images': len(images.indices)}
        runner.logger.info(
            f'PCA basis: {result["num_components"]} of {mimic.dim} components explain '
            f'{result["explained_variance"]:.1%} of the variance'
        )
