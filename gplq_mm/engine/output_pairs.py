"""Outputs of student and teacher for the same images."""

from collections.abc import Iterable, Iterator

from torch import Tensor

from ..models import GPLQ


class OutputPairs:
    """Pairs for :func:`gplq_mm.evaluation.feature_distance`.

    The teacher never changes, so its outputs (a few MB) are computed once a run.

    Args:
        model: A model with a teacher whose features can be asked for.
    """

    def __init__(self, model: GPLQ):
        self.model = model
        self._teacher_outputs: list[tuple] = []

    def of(self, batches: Iterable[Tensor]) -> Iterator[tuple[tuple, tuple]]:
        """Outputs of the student as it is now, and of the teacher.

        Args:
            batches: Preprocessed images; on every call the same ones, or the first of them.
        """
        known = self._teacher_outputs
        for index, inputs in enumerate(batches):
            if index == len(known):
                known.append(self.model.teacher_outputs(inputs))
            yield self.model.student_outputs(inputs), known[index]
