"""Saves checkpoints such that a run can be killed at any moment and resumed."""

from contextlib import suppress
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import Hook

from ...checkpoint import atomic_write_text
from ...errors import SettingError
from ...registry import HOOKS


@HOOKS.register_module()
class GPLQCheckpointHook(Hook):
    """Saves every ``interval`` iterations of Stage 1 and at the end of every stage.

    The order is: new file, then the pointer ``last_checkpoint``, then removal of old files; at
    every moment the pointer names a complete file. mmengine's hook removes first.

    Args:
        interval: Iterations between two checkpoints within Stage 1; -1 saves at its end only.
        max_keep_ckpts: How many of these ``iter_*.pth`` files are kept. Checkpoints of stages
            are never removed.
    """

    priority = 'VERY_LOW'

    def __init__(self, interval: int = 500, max_keep_ckpts: int = 1):
        if max_keep_ckpts < 1:
            raise SettingError(f'max_keep_ckpts={max_keep_ckpts} must be at least 1.')
        self.interval = interval
        self.max_keep_ckpts = max_keep_ckpts
        self._is_due = False

    def before_train(self, runner) -> None:
        """Removes what a run that was killed while it wrote has left half-written."""
        if is_main_process():
            for pattern in ('.*.pth.*', '.last_checkpoint.*', '.summary.json.*'):
                for path in Path(runner.work_dir).glob(pattern):
                    path.unlink(missing_ok=True)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Saves ``iter_N.pth`` where the interval says so."""
        done = runner.iter + 1
        if self.interval > 0 and done % self.interval == 0 and done < runner.max_iters:
            # Schedules by epoch make their step after the epoch's last iteration.
            if self.end_of_epoch(runner.train_dataloader, batch_idx):
                self._is_due = True
            else:
                self._save_iteration(runner, done)

    def after_train_epoch(self, runner, metrics=None) -> None:
        """Saves what fell due with the epoch's last iteration."""
        if self._is_due:
            self._is_due = False
            self._save_iteration(runner, runner.iter)

    def _save_iteration(self, runner, done: int) -> None:
        self.save(runner, f'iter_{done}.pth', done, optimizer=True)
        self._remove_old(runner)

    def after_stage(self, runner, name: str, optimizer: bool) -> None:
        """Saves ``<name>.pth``; called by the loop when a stage is complete."""
        self.save(runner, f'{name}.pth', runner.iter, optimizer)

    def save(self, runner, filename: str, iteration: int, optimizer: bool) -> None:
        """Writes a checkpoint and makes it the one to resume from.

        Args:
            runner: The runner.
            filename: Name inside the work dir.
            iteration: Finished iterations.
            optimizer: Whether to save optimizer and schedulers, needed to go on training.
        """
        runner.save_checkpoint(
            runner.work_dir,
            filename,
            save_optimizer=optimizer,
            save_param_scheduler=optimizer and runner.param_schedulers is not None,
            meta={'epoch': runner.epoch, 'iter': iteration},
            by_epoch=False,
        )
        if is_main_process():
            path = Path(runner.work_dir) / filename
            pointer = Path(runner.work_dir) / 'last_checkpoint'
            atomic_write_text(pointer, str(path))
            runner.logger.info(f'saved {path}')

    def _remove_old(self, runner) -> None:
        if not is_main_process():
            return
        files = sorted(
            Path(runner.work_dir).glob('iter_*.pth'), key=lambda p: int(p.stem.split('_')[1])
        )
        for path in files[: -self.max_keep_ckpts]:
            with suppress(FileNotFoundError):
                path.unlink()
