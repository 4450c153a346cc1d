"""What ties a student to the float model that it comes from: features, decisions, losses."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import SettingError, StateError
from ..layers import checkpoint_blocks, learned_parameters, set_saved_bytes
from ..registry import MODELS
from .block_mimicry import BlockMimicry
from .feature_tap import FeatureTap, feature_layer_of, feature_width, tapped_outputs
from .teacher import Teacher
from .training_losses import completed_settings, distillation_loss, weigh_task


def prepare_training(
    student: nn.Module,
    saved_bytes: int | None = 2,
    gradient_checkpointing: bool = False,
    train_weights: bool = True,
) -> None:
    """Makes a quantized model trainable; the arguments are those of :class:`GPLQ`."""
    set_saved_bytes(student, saved_bytes)
    if gradient_checkpointing:
        checkpoint_blocks(student)
    learned = {id(parameter) for parameter in learned_parameters(student)}
    for parameter in () if train_weights else student.parameters():
        parameter.requires_grad_(id(parameter) in learned)


class Mimicry:
    """The student's features beside the teacher's, and the losses made of both.

    It is no module, so that nothing saves or trains the teacher.

    Args:
        student: Quantized model.
        teacher: The float model that it was, or None.
        mimic: Arguments of :class:`PCAMimicLoss`, or None.
        distill: Arguments of :func:`distillation_loss`, or None.
        block_mimic: Settings of :class:`.BlockMimicry`, or None.
        task_weight: Factor on the losses of the architecture.
        feature_layer, teacher_dtype: As in :class:`GPLQ`.
        forward: ``forward(network, batch)``. Defaults to what computes no more than the features,
            for a network of OpenMMLab and its preprocessed images.

    Raises:
        SettingError: For settings that contradict each other, or features that are not there.

    Attributes:
        tap: Of the student's features, or None where nothing can be compared.
        loss: The mimic loss, or None.
        teacher: The :class:`Teacher`, or None.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        mimic: dict | None = None,
        distill: dict | None = None,
        block_mimic: dict | None = None,
        task_weight: float = 1.0,
        feature_layer: str | None = None,
        teacher_dtype: str = 'auto',
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ):
        self.student, self.task_weight = student, task_weight
        self.distill = completed_settings('distill', distill, loss_weight=1.0, temperature=1.0)
        self.tap = self.loss = None
        self.blocks = BlockMimicry(student, teacher, block_mimic)
        self.forward = forward or self._features
        if self.needs_teacher(mimic) or getattr(student, 'head', None) is not None:
            layer = feature_layer_of(student, feature_layer)
            self.tap = FeatureTap(layer)
            self._check_maps(feature_layer, forward is None)
            if mimic is not None:
                dim = feature_width(layer, feature_layer, mimic)
                self.loss = MODELS.build({'type': 'gplq_mm.PCAMimicLoss', **mimic, 'dim': dim})
        self.teacher = None
        if teacher is not None:
            taps = self.tap is not None
            self.teacher = Teacher(teacher, taps, feature_layer, teacher_dtype, self.forward)

    def needs_teacher(self, mimic: Any = None) -> bool:
        """Whether a loss compares with the teacher."""
        losses = (mimic, self.loss, self.distill)
        return self.blocks.is_wanted or any(loss is not None for loss in losses)

    @property
    def taps_maps(self) -> bool:
        """Whether the features are maps of a detector: without one decision for the image."""
        return self.tap is not None and self.tap.of_output

    def _check_maps(self, feature_layer: str | None, asks_extract_feat: bool) -> None:
        if not self.taps_maps:
            return
        if self.distill is not None:
            raise SettingError(
                f'distill needs class logits, and feature_layer={feature_layer!r} gives maps; set '
                'distill=None.'
            )
        if asks_extract_feat and not hasattr(self.student, 'extract_feat'):
            raise SettingError(
                f'feature_layer={feature_layer!r} gives maps, but the architecture has no '
                'extract_feat that computes them; mimic=None trains without.'
            )

    def _features(self, network: nn.Module, images: torch.Tensor) -> Any:
        # The heads of a detector need boxes, and cost more than the maps.
        return network.extract_feat(images) if self.taps_maps else network(images, mode='tensor')

    def outputs(self, batch: Any) -> tuple:
        """Features ``(N, D)`` and logits ``(N, classes)`` of the student; or its maps, twice."""
        return tapped_outputs(self.tap, lambda: self.forward(self.student, batch))

    def losses(self, run_student: Callable[[], Mapping], batch: Any) -> dict:
        """The losses of an iteration by name.

        Args:
            run_student: A forward of the student that gives the losses of the architecture.
            batch: What :attr:`forward` takes.
        """
        if self.tap is None:
            return weigh_task(run_student(), self.task_weight)
        # The teacher first: what it needs on the way is gone before anything is kept for backward.
        feature, logits, targets = None, None, []
        if self.needs_teacher():
            run_teacher = partial(self.need_teacher().targets, batch)
            (feature, logits), targets = self.blocks.of_teacher(run_teacher)
        with self.tap as tap:
            losses, block_loss = self.blocks.of_student(run_student, targets)
            losses = {**weigh_task(losses, self.task_weight), **block_loss}
            if self.loss is not None:
                losses['loss_pca_mimic'] = self.loss(tap.feature, feature)
            if self.distill is not None:
                losses['loss_distill'] = distillation_loss(tap.output, logits, **self.distill)
        return losses

    def remove(self) -> None:
        """Takes all taps off the student."""
        for tap in (self.tap, *self.blocks.student_taps):
            if tap is not None:
                tap.remove()

    def need_teacher(self) -> Teacher:
        """The teacher.

        Raises:
            StateError: If there is none, or its features are not known.
        """
        if self.teacher is None or self.teacher.tap is None:
            raise StateError('this step needs the FP32 teacher; build the model with teacher=True.')
        return self.teacher
