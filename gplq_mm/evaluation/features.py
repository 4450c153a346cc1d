"""How close the student's features and decisions are to the teacher's."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..distributed import all_reduce_sum
from ..errors import DataError


@torch.no_grad()
def feature_distance(pairs: Iterable[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]) -> dict:
    """Compares penultimate features and logits.

    Args:
        pairs: For every batch ``(student, teacher)``, each ``(features (N, D), logits (N, C))``.

    Returns:
        ``relative_l2``: ``||f_s - f_t|| / ||f_t||`` over all images; ``cosine``: mean cosine;
        ``agreement``: share of images (percent) with the same most likely class; ``num_images``.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    for (student, student_logits), (teacher, teacher_logits) in pairs:
        student, teacher = student.double().flatten(1), teacher.double().flatten(1)
        cosine = torch.nn.functional.cosine_similarity(student, teacher, dim=1)
        same = student_logits.argmax(1) == teacher_logits.argmax(1)
        sums += torch.stack(
            (
                (student - teacher).square().sum(),
                teacher.square().sum(),
                cosine.sum(),
                same.double().sum(),
                torch.tensor(float(len(same)), dtype=torch.float64, device=same.device),
            )
        ).cpu()
    difference, energy, cosine, same, count = all_reduce_sum(sums).tolist()
    if count == 0:
        raise DataError('feature_distance needs at least one image.')
    return {
        'relative_l2': (difference / max(energy, 1e-30)) ** 0.5,
        'cosine': cosine / count,
        'agreement': 100.0 * same / count,
        'num_images': int(count),
    }
