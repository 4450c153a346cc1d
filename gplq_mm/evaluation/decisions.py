"""What classifiers decide image by image, and how sure a difference of their accuracies is."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from ..errors import DataError

RESAMPLES = 9999


@dataclass
class Decisions:
    """Top-1 decisions of one or several states of a model on the same images.

    Attributes:
        images: Paths, relative to the root of the data.
        labels: Class of each.
        predictions: State, such as ``'fp32'`` or ``'w4a4'`` -> the class that it decides for.
    """

    images: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    predictions: dict[str, list[int]] = field(default_factory=dict)

    def add(self, other: 'Decisions') -> None:
        """Takes over the states of another one. If it is of other images, its own are dropped."""
        if (other.images, other.labels) != (self.images, self.labels):
            self.images, self.labels, self.predictions = other.images, other.labels, {}
        self.predictions = {**self.predictions, **other.predictions}

    def correct(self, state: str) -> np.ndarray:
        """Which images a state decides right, boolean, shape ``(n,)``."""
        return np.asarray(self.predictions[state]) == np.asarray(self.labels)

    def state_dict(self) -> dict:
        """Plain data, arguments of the class."""
        return asdict(self)

    def to_csv(self) -> str:
        """A table with the columns ``image``, ``label`` and one for each state."""
        text = io.StringIO(newline='')
        # Names in quotes, since one may hold a line break.
        writer = csv.writer(text, lineterminator='\n', quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(['image', 'label', *self.predictions])
        writer.writerows(zip(self.images, self.labels, *self.predictions.values(), strict=True))
        return text.getvalue()

    @classmethod
    def from_csv(cls, text: str) -> 'Decisions':
        """Reads :meth:`to_csv`.

        Raises:
            DataError: If the text is not of that form.
        """
        rows = list(csv.reader(io.StringIO(text, newline='')))
        header = rows[0] if rows else []
        if header[:2] != ['image', 'label'] or any(len(row) != len(header) for row in rows):
            raise DataError(
                'a table of decisions has the columns image, label and one for each state; let '
                'tools/test.py --decisions write it again.'
            )
        columns = list(zip(*rows[1:], strict=True)) or [()] * len(header)
        try:
            numbers = [list(map(int, column)) for column in columns[1:]]
        except ValueError as error:
            raise DataError(
                f'a table of decisions has class numbers in all columns but the first: {error}; '
                'let tools/test.py --decisions write it again.'
            ) from error
        return cls(list(columns[0]), numbers[0], dict(zip(header[2:], numbers[1:], strict=True)))


def accuracy_difference(
    correct: Sequence, reference: Sequence, confidence: float = 0.95
) -> dict[str, float]:
    """By how much an accuracy is above another one on the same images, with an interval.

    The paired bootstrap over images (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
    percentile interval): what the difference would be on other images of the same kind. It is the
    same in every call.

    Args:
        correct: Which images a model decides right, shape ``(n,)``; or of several runs of it, such
            as with several seeds, ``(runs, n)``, of which the mean is compared.
        reference: The same of the model that it is compared with; runs need not be as many.
        confidence: Probability that the interval holds the difference.

    Returns:
        ``points``, the difference in percent of the images, and the bounds ``low`` and ``high``.

    Raises:
        DataError: If there is no image, or the numbers of images differ.
    """
    correct, reference = (np.atleast_2d(np.asarray(x, float)) for x in (correct, reference))
    count = correct.shape[1]
    if count == 0 or count != reference.shape[1]:
        raise DataError(
            f'decisions on {count} and {reference.shape[1]} images cannot be compared in pairs; '
            'score both models on the same images.'
        )
    # Images with the same difference are interchangeable, so that only their numbers are drawn.
    values, numbers = np.unique(correct.mean(0) - reference.mean(0), return_counts=True)
    generator = np.random.default_rng(0)
    draws = generator.multinomial(count, numbers / count, RESAMPLES) @ values / count
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    points = values @ numbers / count
    return {
        name: 100.0 * float(x) for name, x in (('points', points), ('low', low), ('high', high))
    }
