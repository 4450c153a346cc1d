"""What is measured of the model at every stage of a run."""

from collections.abc import Iterator
from contextlib import AbstractContextManager

from torch import Tensor

from ..distributed import rank_and_world_size
from ..errors import SettingError
from ..evaluation import feature_distance
from .hooks.decision_hook import DecisionHook
from .output_pairs import OutputPairs
from .run_record import RunRecord
from .transfer import TransferProbe
from .weights import unwrap


class StageEvaluation:
    """Metrics and decisions on the validation set, distance to the teacher, transfer if wanted.

    Args:
        runner: The runner.
        record: Where the results go, and what they cost.
        num_diagnostic_images: Validation images for the feature distance.
        transfer: Arguments of :class:`TransferProbe` beside the model, or None.

    Raises:
        SettingError: If there is no image for the feature distance, or ``transfer`` lacks a part.
        DataError: If ``transfer`` cannot be probed.
    """

    def __init__(
        self, runner, record: RunRecord, num_diagnostic_images: int, transfer: dict | None
    ):
        if num_diagnostic_images < 1:
            raise SettingError(f'num_diagnostic_images={num_diagnostic_images} must be at least 1.')
        self.runner, self.record = runner, record
        self.num_diagnostic_images = num_diagnostic_images
        self.transfer = None
        if transfer is not None:
            wanted = {'train_dataloader', 'val_dataloader'}
            if set(transfer) != wanted:
                raise SettingError(
                    f'train_cfg.transfer must have {sorted(wanted)}, and has {sorted(transfer)}.'
                )
            self.transfer = TransferProbe(unwrap(runner.model), **transfer)
        self._pairs = OutputPairs(unwrap(runner.model))
        self._decisions = DecisionHook()
        runner.register_hook(self._decisions)

    def run(self, name: str, context: AbstractContextManager) -> None:
        """Measures the model as it is inside ``context``, as stage ``name``."""
        clock = self.record.clock
        self.runner.logger.info(f'evaluation of {name}')
        with context:
            with clock.stage(f'evaluation_{name}'):
                self._evaluate(name)
            if self.transfer is not None:
                with clock.stage(f'transfer_{name}'):
                    self.record.transfer[name] = self.transfer.measure()
        self.runner.model.eval()

    def _evaluate(self, name: str) -> None:
        model = unwrap(self.runner.model)
        if self.runner.val_loop is not None:
            self._decisions.state, self._decisions.decisions = name, self.record.decisions
            self.record.metrics[name] = dict(self.runner.val_loop.run())
        else:
            self.record.metrics[name] = {}
        # At the start student and teacher are the same.
        # Maps of a detector are too large to keep, and lead to no single decision to compare.
        measurable = model.has_teacher_features and not model.mimicry.taps_maps
        measurable &= self.runner.val_loop is not None
        if measurable and name != model.stage_names['fp32']:
            model.eval()
            self.record.feature_distance[name] = feature_distance(
                self._pairs.of(self._first_images())
            )

    def _first_images(self) -> Iterator[Tensor]:
        """This rank's share of the first validation images."""
        model = unwrap(self.runner.model)
        loader = self.runner.val_loop.dataloader
        rank, world_size = rank_and_world_size()
        # Samplers deal the images out in turns.
        left = len(range(rank, min(self.num_diagnostic_images, len(loader.dataset)), world_size))
        for batch in loader:
            if left <= 0:
                return
            inputs = model.data_preprocessor(batch, False)['inputs'][:left]
            left -= len(inputs)
            yield inputs
