"""Random numbers of training that a resumed run has again."""

import random

import numpy as np
import torch


def seed_iteration(seed: int, iteration: int) -> None:
    """Random numbers of an iteration (drop path, mixup) that depend on nothing before it.

    They are the same on all ranks: dropout draws for the images of all of them.
    """
    number = np.random.SeedSequence((seed, iteration)).generate_state(1)[0].item()
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)
