"""The outputs of a student's residual blocks beside the teacher's."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingError
from ..layers import find_blocks
from .feature_tap import FeatureTap
from .training_losses import completed_settings


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


@contextmanager
def _opened(taps: list[FeatureTap]) -> Iterator[None]:
    """Context in which all taps are open."""
    with ExitStack() as stack:
        for tap in taps:
            stack.enter_context(tap)
        yield


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
        settings = completed_settings('block_mimic', settings, loss_weight=1.0)
        self.is_wanted = settings is not None
        self.student_taps: list[FeatureTap] = []
        self.teacher_taps: list[FeatureTap] = []
        if settings is None:
            return
        self.loss_weight = settings['loss_weight']
        names = find_blocks(student)
        if not names:
            raise SettingError(
                'block_mimic compares residual blocks, and no family knows one in this model; set '
                'block_mimic=None.'
            )
        self.student_taps = [FeatureTap(student.get_submodule(name)) for name in names]
        if teacher is not None:
            self.teacher_taps = [FeatureTap(teacher.get_submodule(name)) for name in names]

    def of_teacher(self, run: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
        """What ``run()`` gives, which runs the teacher, and the outputs of its blocks."""
        with _opened(self.teacher_taps):
            result = run()
            # Autograd refuses to save an inference tensor, a copy is an ordinary one.
            return result, [tap.feature.clone() for tap in self.teacher_taps]

    def of_student(
        self, run: Callable[[], Any], targets: list[Tensor]
    ) -> tuple[Any, dict[str, Tensor]]:
        """What ``run()`` gives, which runs the student, and the loss by its name, if it is wanted:
        the mean over the blocks of their relative errors, times ``loss_weight``."""
        with _opened(self.student_taps):
            result = run()
            pairs = zip(self.student_taps, targets, strict=True)
            errors = [relative_error(tap.feature, target) for tap, target in pairs]
        if not errors:
            return result, {}
        return result, {'loss_block_mimic': self.loss_weight * torch.stack(errors).mean()}
