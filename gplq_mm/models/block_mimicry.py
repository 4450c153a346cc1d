"""The outputs of a student's residual blocks beside the teacher's."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingError
from ..layers import find_blocks
from .feature_tap import FeatureTap


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error in units of the variance of the teacher's values; of each image, then the mean.

    Every image has a unit of its own, so that the mean over ranks is that of one process.

    Args:
        student: ``(N, ...)``.
        teacher: The same shape.

    Returns:
        Scalar, float32.
    """
    teacher = teacher.float().flatten(1)
    unit = teacher.var(1, correction=0).clamp(min=torch.finfo(teacher.dtype).tiny)
    return ((student.float().flatten(1) - teacher).square().mean(1) / unit).mean()


class _BlockTaps:
    """The outputs of blocks in the last forward, as long as it is open."""

    def __init__(self, network: nn.Module | None, names: list[str]):
        self.taps = [FeatureTap(network.get_submodule(name)) for name in names]
        self.stack = ExitStack()

    def __enter__(self) -> 'list[FeatureTap]':
        for tap in self.taps:
            self.stack.enter_context(tap)
        return self.taps

    def __exit__(self, *exception) -> None:
        self.stack.close()


class BlockMimicry:
    """What keeps every residual block of a student near the teacher's.

    Quantization errors add up from block to block, and the last feature alone says little of where
    they come from. Block reconstruction (BRECQ, Li et al., ICLR 2021) fits one block after the
    other; here all are fitted at once, each on what the quantized blocks before it give.

    Args:
        student: Quantized model.
        teacher: The float model that it was, or None: then nothing can be compared.
        settings: ``dict(loss_weight=1.0)``, or None: there is no such loss.

    Raises:
        SettingError: For an unknown key, or a model without a known residual block.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None, settings: Mapping | None):
        self.is_wanted = settings is not None
        settings = {'loss_weight': 1.0, **(settings or {})}
        unknown = set(settings) - {'loss_weight'}
        if unknown:
            raise SettingError(f'block_mimic has unknown key(s) {sorted(unknown)}.')
        self.loss_weight = settings['loss_weight']
        names = find_blocks(student) if self.is_wanted else []
        if self.is_wanted and not names:
            raise SettingError(
                'block_mimic compares residual blocks, and no family knows one in this model; set '
                'block_mimic=None.'
            )
        self._student = _BlockTaps(student, names)
        self._teacher = _BlockTaps(teacher, [] if teacher is None else names)

    def of_teacher(self, run: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
        """What ``run()`` gives, which runs the teacher, and the outputs of its blocks."""
        with self._teacher as taps:
            result = run()
            # Autograd refuses to save an inference tensor, a copy is an ordinary one.
            return result, [tap.feature.clone() for tap in taps]

    def of_student(
        self, run: Callable[[], Any], targets: list[Tensor]
    ) -> tuple[Any, dict[str, Tensor]]:
        """What ``run()`` gives, which runs the student, and the loss by its name, if it is wanted:
        the mean over the blocks of their relative errors, times ``loss_weight``."""
        with self._student as taps:
            result = run()
            pairs = zip(taps, targets, strict=True)
            errors = [relative_error(tap.feature, target) for tap, target in pairs]
        if not errors:
            return result, {}
        return result, {'loss_block_mimic': self.loss_weight * torch.stack(errors).mean()}
