"""mmengine's Runner with checkpoints that are never torn and never unpickled."""

import os
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from mmengine.device import get_device
from mmengine.dist import is_distributed
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.runner import BaseLoop, Runner

from ..checkpoint import atomic_write, read_checkpoint, to_plain
from ..distributed import ranks_end_together
from ..registry import RUNNERS
from .data_checks import DataCheckHook
from .shared_datasets import shared_datasets
from .weights import load_run_weights

# Seconds. A rank that died is noticed at once, since its connections close; this is for one that
# hangs. Rank 0 alone computes the metrics of a detector, for a minute or two, while all wait.
TIMEOUT = 600


class AtomicLocalBackend(LocalBackend):
    """Local files that appear complete or not at all."""

    def put(self, obj: bytes | memoryview, filepath: str | os.PathLike) -> None:
        """Writes ``obj`` to a temporary file, syncs it and renames it."""
        atomic_write(filepath, lambda file: file.write(obj))


register_backend('gplq_atomic', AtomicLocalBackend, force=True)


class PlainCheckpointHook(Hook):
    """Turns what is about to be saved into tensors and plain data, and back after loading."""

    priority = 'LOWEST'

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """mmengine's histories are numpy objects, which ``weights_only=True`` refuses."""
        hub = checkpoint['message_hub']
        histories = {}
        for key, buffer in hub['log_scalars'].items():
            values, counts = buffer.data
            histories[key] = {'values': torch.tensor(values), 'counts': torch.tensor(counts)}
        hub['log_scalars'] = histories
        checkpoint.update(to_plain(checkpoint))

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Makes the histories usable again."""
        hub = checkpoint.get('message_hub')
        if hub is None:
            return
        hub['log_scalars'] = {
            key: HistoryBuffer(item['values'].tolist(), item['counts'].tolist())
            if isinstance(item, dict)
            else item
            for key, item in hub['log_scalars'].items()
        }


@RUNNERS.register_module()
class GPLQRunner(Runner):
    """Runner whose checkpoints hold tensors and plain data only and appear all at once.

    Selected by ``runner_type='gplq_mm.GPLQRunner'`` in a config; every other behaviour is
    mmengine's.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_hook(PlainCheckpointHook())
        self.register_hook(DataCheckHook())

    train = ranks_end_together()(Runner.train)
    val = ranks_end_together()(Runner.val)
    test = ranks_end_together()(Runner.test)

    def setup_env(self, env_cfg: dict) -> None:
        """As in mmengine, and ``--launcher pytorch`` works on machines without a GPU, too.

        A rank waits ``dist_cfg.timeout`` seconds for one that does not answer, 600 by default.
        """
        dist_cfg = {'timeout': TIMEOUT, **env_cfg.get('dist_cfg', {})}
        on_cpu = get_device() == 'cpu'
        if self._launcher == 'pytorch' and on_cpu and not is_distributed():
            # mmengine's own initialisation selects a CUDA device whatever the backend.
            dist.init_process_group('gloo', timeout=timedelta(seconds=dist_cfg['timeout']))
        super().setup_env({**env_cfg, 'dist_cfg': dist_cfg})

    def build_dataloader(self, dataloader, *args, **kwargs):
        """As in mmengine; data sets are those of :func:`shared_datasets`.

        Raises:
            DataError: If there is no image, or none passes the data set's filter.
        """
        if isinstance(dataloader, Mapping):
            dataset = shared_datasets(self).build(dataloader['dataset'])
            # mmengine copies a config with all that is in it, except for functions.
            dataloader = {**dataloader, 'dataset': {'type': lambda: dataset}}
        return super().build_dataloader(dataloader, *args, **kwargs)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: torch.nn.Module):
        """As in mmengine, without a device id where there is no GPU."""
        if self.distributed and model_wrapper_cfg is None and get_device() == 'cpu':
            model_wrapper_cfg = dict(
                type='MMDistributedDataParallel',
                device_ids=None,
                broadcast_buffers=False,
                find_unused_parameters=self.cfg.get('find_unused_parameters', False),
            )
        return super().wrap_model(model_wrapper_cfg, model)

    def build_param_scheduler(self, scheduler) -> list | dict:
        """As in mmengine, which refuses a schedule of no iterations: nothing is trained then."""
        if isinstance(self._train_loop, BaseLoop) and self.max_iters == 0:
            return []
        return super().build_param_scheduler(scheduler)

    def save_checkpoint(self, *args, **kwargs) -> None:
        """As in mmengine, but a file appears complete or not at all.

        Raises:
            OSError: If the disk is full; earlier checkpoints stay as they are.
        """
        if kwargs.get('backend_args') is None:
            kwargs['backend_args'] = {'backend': 'gplq_atomic'}
        super().save_checkpoint(*args, **kwargs)

    def load_checkpoint(
        self,
        filename: str,
        map_location: str = 'cpu',
        strict: bool = False,
        revise_keys: list | None = None,
    ) -> dict:
        """Reads a checkpoint of any state into the model, weights only.

        Raises:
            CheckpointError: If the file is missing, damaged or of another architecture.
        """
        checkpoint = read_checkpoint(filename)
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        load_run_weights(self.model, checkpoint, filename)
        self._has_loaded = True
        self.logger.info(f'loaded {filename}')
        return checkpoint
