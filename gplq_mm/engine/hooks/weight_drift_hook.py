"""Follows how far training moves the weights."""

import torch
from mmengine.hooks import Hook

from ...errors import SettingError
from ...evaluation import weight_drift
from ...models import GPLQ
from ...registry import HOOKS
from ..weights import unwrap

KEYS = ('mae', 'mse')


@HOOKS.register_module()
class WeightDriftHook(Hook):
    """Deviation of the latent weights from the original ones, at chosen iterations and at the end.

    It goes into the run's record, so into checkpoints and ``summary.json``
    (``weight_drift_history``: iteration -> ``mae``, ``mse``, ``layers`` of
    :func:`gplq_mm.evaluation.weight_drift`), and to the visualizer backends as
    ``weight_drift/<layer>/mae`` and so on. A model without a teacher has nothing to compare with,
    and is left alone.

    Args:
        interval: Measures after every so many iterations; 0 for the chosen ones only. Defaults
            to 200.
        iterations: Measures after these, too; the paper shows 100 and 1000. Defaults to a few
            early ones, since most of the way is made there.

    Raises:
        SettingError: For a negative interval or an iteration below 1.
    """

    # The record must be complete when a checkpoint is saved.
    priority = 'NORMAL'

    def __init__(self, interval: int = 200, iterations: tuple[int, ...] = (1, 10, 50, 100)):
        if interval < 0:
            raise SettingError(f'interval={interval} must not be negative.')
        self.interval = interval
        self.iterations = frozenset(iterations)
        if any(iteration < 1 for iteration in self.iterations):
            raise SettingError(f'iterations={tuple(iterations)} must all be at least 1.')

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Measures, if the iteration is one to measure at."""
        done = runner.iter + 1
        due = done in self.iterations or done == runner.max_iters
        if due or (self.interval and done % self.interval == 0):
            self._measure(runner, done)

    @torch.no_grad()
    def _measure(self, runner, done: int) -> None:
        model = unwrap(runner.model)
        record = getattr(runner.train_loop, 'record', None)
        if record is None or not isinstance(model, GPLQ) or model.teacher is None:
            return
        drift = weight_drift(model.architecture, model.teacher.state_dict())
        record.weight_drift_history[done] = drift
        named = {'weight_drift': drift}
        named |= {f'weight_drift/{name}': value for name, value in drift['layers'].items()}
        scalars = {f'{name}/{key}': value[key] for name, value in named.items() for key in KEYS}
        runner.visualizer.add_scalars(scalars, step=done)
