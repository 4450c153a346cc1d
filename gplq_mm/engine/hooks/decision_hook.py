"""Keeps what a classifier decides on every image that it is scored on."""

import os
from collections.abc import Iterator

from mmengine.dist import collect_results
from mmengine.hooks import Hook
from torch.utils.data import Dataset

from ...errors import SettingError
from ...evaluation import Decisions
from ...registry import HOOKS


@HOOKS.register_module()
class DecisionHook(Hook):
    """Top-1 decisions of every evaluation, gathered from all ranks.

    Args:
        state: What the decisions are of, such as ``'w4a4'``; may be set before each evaluation.
        required: Whether it is an error that a model gives no single decision for an image, as a
            detector does. Defaults to False, which keeps nothing then.

    Attributes:
        decisions: Of all evaluations so far, on rank 0; empty for a model that is no classifier.
    """

    def __init__(self, state: str = 'model', required: bool = False):
        self.state = state
        self.required = required
        self.decisions = Decisions()
        self._rows: list[tuple[str, int, int]] = []

    def before_val_epoch(self, runner) -> None:
        """Begins an evaluation."""
        self._rows = []

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Takes the decisions of a batch."""
        for sample in outputs:
            if (row := _decision(sample)) is not None:
                self._rows.append(row)
            elif self.required:
                raise SettingError(
                    'decisions are kept of classifiers only, which give each image one class and '
                    'know its label; leave --decisions out.'
                )

    def after_val_epoch(self, runner, metrics=None) -> None:
        """Puts those of all ranks into the order of the data set."""
        self._gather(runner.val_loop.dataloader.dataset)

    def before_test_epoch(self, runner) -> None:
        """As in validation."""
        self.before_val_epoch(runner)

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """As in validation."""
        self.after_val_iter(runner, batch_idx, data_batch, outputs)

    def after_test_epoch(self, runner, metrics=None) -> None:
        """As in validation."""
        self._gather(runner.test_loop.dataloader.dataset)

    def _gather(self, dataset: Dataset) -> None:
        if not self._rows:
            return
        rows = collect_results(self._rows, len(dataset), 'cpu')
        # None on other ranks than the first.
        if rows is not None:
            roots = list(_roots(dataset))
            images, labels, classes = map(list, zip(*rows, strict=True))
            images = [_relative(image, roots) for image in images]
            self.decisions.add(Decisions(images, labels, {self.state: classes}))


def _decision(sample) -> tuple[str, int, int] | None:
    label, score = getattr(sample, 'gt_label', None), getattr(sample, 'pred_score', None)
    if label is None or score is None or len(label) != 1:
        return None
    image = sample.get('img_path', sample.get('sample_idx', ''))
    return str(image), int(label), int(score.argmax())


def _roots(dataset: Dataset) -> Iterator[str]:
    for inner in [*getattr(dataset, 'datasets', ()), getattr(dataset, 'dataset', None)]:
        if inner is not None:
            yield from _roots(inner)
    if root := getattr(dataset, 'data_root', None):
        yield str(root)


def _relative(path: str, roots: list[str]) -> str:
    for root in roots:
        if path.startswith(os.path.join(root, '')):
            return os.path.relpath(path, root)
    return path
