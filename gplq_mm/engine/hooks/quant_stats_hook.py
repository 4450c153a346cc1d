"""Watches the activation quantizers while they learn."""

import torch
from mmengine.hooks import Hook
from torch import Tensor

from ...distributed import all_reduce_sum
from ...evaluation import quantizer_statistics, quantizer_sums
from ...layers import act_quantizers
from ...quant import QuantState
from ...registry import HOOKS
from ..weights import unwrap


@HOOKS.register_module()
class QuantStatsHook(Hook):
    """Logs clip rate, scale and SQNR of the quantizers every ``interval`` iterations.

    They are of the images of all ranks. The mean over quantizers goes to the log; every quantizer's
    own values go to the visualizer backends as ``quant/<layer>/<value>``.

    Args:
        interval: Iterations between two measurements. Defaults to 100.
        per_layer: Whether to send every quantizer's values too. Defaults to True.
    """

    priority = 'NORMAL'

    def __init__(self, interval: int = 100, per_layer: bool = True):
        self.interval = interval
        self.per_layer = per_layer
        self._handles: list = []
        self._sums: dict[str, Tensor] = {}

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Listens to the quantizers for the coming iteration, if it is one to measure."""
        if runner.iter % self.interval:
            return

        def measure(module, args, output, name):
            # A detection head runs once for each level of the pyramid.
            if module.enabled and module.state >= QuantState.LEARNING:
                self._sums[name] += quantizer_sums(module, args[0], output)

        for name, quantizer in act_quantizers(unwrap(runner.model)).items():
            self._sums[name] = torch.zeros(4, dtype=torch.float64)
            self._handles.append(
                quantizer.register_forward_hook(
                    lambda module, args, output, name=name: measure(module, args, output, name)
                )
            )

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Logs what was measured."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        quantizers = act_quantizers(unwrap(runner.model))
        sums = all_reduce_sum(torch.stack(list(self._sums.values())))
        statistics = {
            name: quantizer_statistics(quantizers[name], part)
            for name, part in zip(self._sums, sums, strict=True)
            # Without values it was not reached, or does not learn.
            if part[-1] > 0
        }
        self._sums = {}
        for key in ('clip_rate', 'scale', 'sqnr_db'):
            values = [value[key] for value in statistics.values()]
            if values:
                runner.message_hub.update_scalar(f'train/quant_{key}', sum(values) / len(values))
        if self.per_layer:
            runner.visualizer.add_scalars(
                {
                    f'quant/{name.removeprefix("architecture.")}/{key}': number
                    for name, value in statistics.items()
                    for key, number in value.items()
                },
                step=runner.iter + 1,
            )
