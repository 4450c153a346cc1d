"""What training minimises beside the mimic loss, and what it must never do."""

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed import is_finite_everywhere
from ..errors import DataError, GPLQError, SettingError


class NonFiniteLossError(GPLQError, FloatingPointError):
    """The loss became NaN or infinite; the update was not made."""


def completed_settings(name: str, settings: Mapping | None, **defaults: Any) -> dict | None:
    """The settings ``name`` of a model with what they leave out; None where there are none.

    Args:
        name: For the message.
        settings: Some of the keys of ``defaults``, or None.
        **defaults: All keys that are known.

    Raises:
        SettingError: For an unknown key.
    """
    if settings is None:
        return None
    unknown = set(settings) - set(defaults)
    if unknown:
        raise SettingError(f'{name} has unknown key(s) {sorted(unknown)}.')
    return {**defaults, **settings}


def check_count(value: Any, name: str, advice: str = '') -> None:
    """Refuses a setting that is no whole number from 1 on.

    Args:
        value: Of the setting.
        name: For the message.
        advice: Ends the message.

    Raises:
        SettingError: For such a value.
    """
    if not isinstance(value, Integral) or value < 1:
        raise SettingError(f'{name}={value!r} must be a whole number from 1 on{advice}.')


def weigh_task(losses: Mapping, weight: float) -> dict:
    """Losses of the architecture, weighted.

    Args:
        losses: By name, of an OpenMMLab model in mode ``'loss'``; a detector has lists of them, one
            loss for each level of the pyramid. What has no ``loss`` in its name is left alone.
        weight: Factor.

    Returns:
        The same names, but for ``loss``, which becomes ``loss_task``: in a log that is the sum of
        all.
    """

    def weigh(value: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        if isinstance(value, list):
            return [weigh(part) for part in value]
        return value * weight

    return {
        'loss_task' if key == 'loss' else key: weigh(value) if 'loss' in key else value
        for key, value in losses.items()
    }


def distillation_loss(
    student: Tensor, teacher: Tensor, loss_weight: float, temperature: float
) -> Tensor:
    """Kullback-Leibler divergence of the student's class probabilities from the teacher's.

    Args:
        student, teacher: Logits ``(B, classes)``.
        loss_weight: Factor.
        temperature: Both logits are divided by it; its square keeps gradients comparable across
            temperatures (Hinton et al., 2015).

    Returns:
        Mean over the images, in nats times the factors.
    """
    divergence = F.kl_div(
        F.log_softmax(student.float() / temperature, 1),
        F.log_softmax(teacher.float() / temperature, 1),
        reduction='batchmean',
        log_target=True,
    )
    return loss_weight * temperature**2 * divergence


ADVICE = (
    'the last checkpoint is intact. Check the images and the pretrained weights, then continue '
    'with --resume. A resumed run keeps its learning rate: for a smaller '
    'optim_wrapper.optimizer.lr start a new run.'
)


def require_finite(loss: Tensor, parts: Mapping[str, Tensor], advice: str = ADVICE) -> None:
    """Stops before a NaN or an infinity reaches the weights.

    Args:
        loss: Sum of the losses of this rank.
        parts: What the message lists.
        advice: What it ends with: what is safe, and what to do.

    Raises:
        NonFiniteLossError: On all ranks, if any rank's loss is not finite.
    """
    if is_finite_everywhere(loss.detach()):
        return
    listed = ', '.join(f'{key}={float(value.detach()):.4g}' for key, value in parts.items())
    raise NonFiniteLossError(
        f'the loss is not finite ({listed}); the step was not made and {advice}'
    )


def check_images(
    inputs: Tensor, data_samples: list | None = None, batch: str = 'the batch'
) -> None:
    """Refuses images that are not finite.

    Args:
        inputs: ``(N, ...)``, or what is no tensor and not looked at.
        data_samples: Annotations, which may know the paths.
        batch: Which one it is.

    Raises:
        DataError: For a NaN or an infinity.
    """
    # A sum is finite only if all of it is, and is made in one pass.
    if not torch.is_tensor(inputs) or bool(torch.isfinite(inputs.sum())):
        return
    bad = [i for i, image in enumerate(inputs) if not bool(torch.isfinite(image).all())]
    if not bad:
        # The sum alone was too large.
        return
    names = [str(getattr(sample, 'img_path', '?')) for sample in data_samples or []]
    named = ', '.join(names[i] for i in bad) if names else f'position {bad} of {batch}'
    raise DataError(f'image with NaN or infinite pixels: {named}. Remove or repair it.')
