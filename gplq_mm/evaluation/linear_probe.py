"""How well a linear classifier reads another data set from frozen features."""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from ..distributed import gather_objects, gather_rows, rank_and_world_size
from ..errors import DataError

# Weight of the data against the L2 penalty ||w||^2 / 2, scikit-learn's default.
C = 1.0
MAX_ITERATIONS = 10_000


def linear_probe(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]) -> dict:
    """Multinomial logistic regression on standardised features; collective over ranks.

    Every feature gets mean 0 and variance 1 on the training images, and scikit-learn's
    LogisticRegression minimises the sum of the cross-entropies plus ``||w||^2 / 2``. That has one
    solution, found without random numbers in seconds, so that it can stand beside every stage of a
    run. It is not the paper's protocol (100 epochs of a linear head on augmented images), which
    is a run of its own, and its figures are not comparable with that.

    Args:
        train: This rank's features ``(n, D)`` and labels ``(n,)``; of the ranks' images, dealt
            out in turns.
        val: As ``train``, of other images of the same classes.

    Returns:
        ``top1`` in percent, ``num_train`` and ``num_val``; the same on all ranks.

    Raises:
        DataError: If a feature is not finite, or all training images are of one class.
    """
    features, labels, others, truth = (gather_rows(part).numpy() for part in (*train, *val))
    if not (np.isfinite(features).all() and np.isfinite(others).all()):
        raise DataError('a feature for the linear probe is not finite; check the images.')
    if len(np.unique(labels)) < 2:
        raise DataError('a linear probe needs training images of two classes at least.')
    result = None
    if rank_and_world_size()[0] == 0:
        scaler = StandardScaler().fit(features.astype(np.float64))
        probe = LogisticRegression(C=C, max_iter=MAX_ITERATIONS)
        probe.fit(scaler.transform(features.astype(np.float64)), labels)
        found = probe.predict(scaler.transform(others.astype(np.float64)))
        result = {
            'top1': 100.0 * float((found == truth).mean()),
            'num_train': len(labels),
            'num_val': len(truth),
        }
    return gather_objects(result)[0]
