"""The stages of a run, and their order."""

from enum import IntEnum

from ..errors import StateError


class Stage(IntEnum):
    """How far a model has come; saved with it.

    Either ``FLOAT, CALIBRATED, ACT_QAT, WEIGHT_PTQ`` (GPLQ), or ``FLOAT, CALIBRATED, DIRECT_QAT,
    WEIGHT_PTQ`` (direct QAT: weights and activations are learned together, and the last step
    only writes the integers down). Training may be left out. The numbers are those of files.
    """

    FLOAT = 0
    CALIBRATED = 1
    ACT_QAT = 2
    WEIGHT_PTQ = 3
    DIRECT_QAT = 4


def check_order(current: Stage, wanted: Stage, direct: bool) -> None:
    """Refuses a step back, or one of the other method.

    Args:
        current: Where the model is.
        wanted: Where it is to go.
        direct: Whether it is quantized by direct QAT.

    Raises:
        StateError: If that step must not be made.
    """
    training = Stage.DIRECT_QAT if direct else Stage.ACT_QAT
    order = (Stage.FLOAT, Stage.CALIBRATED, training, Stage.WEIGHT_PTQ)
    if wanted not in order:
        raise StateError(
            f'{wanted.name} is no stage of this model; with direct={direct} they are '
            f'{", ".join(stage.name for stage in order)}.'
        )
    if order.index(wanted) < order.index(current):
        raise StateError(f'the model is at {current.name} and cannot go back to {wanted.name}.')
