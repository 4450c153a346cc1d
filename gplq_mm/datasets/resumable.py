"""Sampling that depends on nothing but the seed, the epoch and the sample.

mmengine seeds one random stream per worker, so that the augmentation of an image depends on how
many workers and ranks there are and on how far they have come; a run that is stopped in the middle
of an epoch cannot continue as if nothing had happened. Here the sampler hands out *sample numbers*
``epoch * len(dataset) + index`` and the dataset seeds the random generators from the number alone.

Used together::

    train_dataloader = dict(
        dataset=dict(type='gplq_mm.SeededDataset', dataset=dict(...)),
        sampler=dict(type='gplq_mm.ResumableSampler', shuffle=True),
        ...)
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from mmengine.dataset import BaseDataset
from mmengine.dist import get_dist_info, sync_random_seed
from torch.utils.data import Dataset, Sampler

from gplq_mm.errors import DataError, SettingError, StateError
from gplq_mm.registry import DATA_SAMPLERS, DATASETS


@contextmanager
def seeded_rng(*key: int) -> Iterator[None]:
    """Seed the random generators of Python, NumPy and torch (CPU), and restore them afterwards.

    Args:
        *key (int): Non-negative integers. Equal keys give equal streams, on every machine.
    """
    for_python, for_numpy, for_torch = np.random.SeedSequence(key).generate_state(3).tolist()
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(for_python)
    np.random.seed(for_numpy)
    # Not torch.manual_seed: it would also reset the GPU generators, which we do not restore.
    torch.default_generator.manual_seed(for_torch)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])


@DATASETS.register_module()
class SeededDataset(Dataset):
    """Makes the augmentation of a sample a function of (seed, epoch, index) alone.

    Whatever the number of workers and ranks, and after any resume, a sample number gives the same
    sample. The random state of the calling process is left as it was.

    Args:
        dataset (dict | BaseDataset): The data set to wrap. When it replaces a sample that its
            pipeline rejects (``None``), the replacement is drawn from the seeded generators too.
        seed (int, optional): Seed of the augmentations, not negative. Defaults to None, which
            takes over the sampler's seed, so that a run has one seed (``randomness.seed``).
        lazy_init (bool): Whether to put off :meth:`full_init`. Defaults to False.
    """

    def __init__(
        self, dataset: dict | BaseDataset, seed: int | None = None, lazy_init: bool = False
    ) -> None:
        self.dataset = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
        self.seed = seed
        self._has_own_seed = seed is not None
        if not lazy_init:
            self.full_init()

    @property
    def metainfo(self) -> dict:
        """The wrapped data set's meta information."""
        return self.dataset.metainfo

    def full_init(self) -> None:
        """Read the wrapped data set's annotations."""
        self.dataset.full_init()

    def take_seed(self, seed: int) -> None:
        """Take over the sampler's seed, unless an own one was given."""
        if not self._has_own_seed:
            self.seed = seed

    def sample_number(self, epoch: int, index: int) -> int:
        """The number under which ``__getitem__`` gives sample ``index`` as seen in ``epoch``."""
        return epoch * len(self) + index

    def get_data_info(self, number: int) -> dict:
        """The annotation of a sample number; an index is the sample number of epoch 0."""
        return self.dataset.get_data_info(number % len(self))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> dict:
        """Fetch a sample.

        Args:
            number (int): See :meth:`sample_number`; an index is the sample number of epoch 0.

        Returns:
            dict: What the wrapped data set gives.

        Raises:
            IndexError: If ``number`` is negative.
            StateError: If no seed is known.
        """
        if number < 0:
            raise IndexError(f'A sample number is not negative, got {number}.')
        if self.seed is None:
            raise StateError(
                'SeededDataset has no seed: give it one (seed=0) or read it with '
                'gplq_mm.ResumableSampler, which hands over its own.'
            )
        epoch, index = divmod(number, len(self))
        with seeded_rng(self.seed, epoch, index):
            return self.dataset[index]

    def __iter__(self) -> Iterator[dict]:
        # Without it a for loop would never end, since any number is a valid sample number.
        return (self[index] for index in range(len(self)))


@DATA_SAMPLERS.register_module()
class ResumableSampler(Sampler[int]):
    """:class:`mmengine.dataset.DefaultSampler` that can begin in the middle of an epoch.

    The order of an epoch's samples depends on the seed and the epoch only; ranks take turns in it,
    so that after ``k`` iterations exactly the first ``k * batch_size * world_size`` samples are
    consumed. :meth:`set_position` continues from there, with any other world size.

    It yields the sample numbers of :class:`SeededDataset` and not indices.

    Args:
        dataset (SeededDataset): The data set, also as a slice of it (``num_batch_per_epoch``).
        shuffle (bool): Defaults to True.
        seed (int, optional): The same on all ranks. Defaults to None, which draws one and shares
            it among the ranks.
        round_up (bool): Whether to repeat samples so that all ranks get equally many.
            Defaults to True.

    Raises:
        SettingError: If the data set does not understand sample numbers.
    """

    def __init__(
        self,
        dataset: SeededDataset,
        shuffle: bool = True,
        seed: int | None = None,
        round_up: bool = True,
    ) -> None:
        if not hasattr(dataset, 'sample_number'):
            raise SettingError(
                f'ResumableSampler yields sample numbers, which {type(dataset).__name__} does not '
                "understand: wrap it as dict(type='gplq_mm.SeededDataset', dataset=...)."
            )
        self.dataset = dataset
        self.rank, self.world_size = get_dist_info()
        self.shuffle = shuffle
        self.seed = sync_random_seed() if seed is None else seed
        self.round_up = round_up
        self.epoch = 0
        self.start_sample = 0
        dataset.take_seed(self.seed)

    def _order(self) -> list[int]:
        """The indices of the whole epoch, the same on all ranks."""
        if not self.shuffle:
            return list(range(len(self.dataset)))
        generator = torch.Generator()
        generator.manual_seed(self.seed + self.epoch)
        return torch.randperm(len(self.dataset), generator=generator).tolist()

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's sample numbers, from the position on."""
        order = self._order()
        rest = order[self.start_sample :]
        if self.round_up:
            missing = -len(rest) % self.world_size
            # Repeats begin with the epoch's first samples, as in mmengine.
            rest += [order[i % len(order)] for i in range(missing)]
        for index in islice(rest, self.rank, None, self.world_size):
            yield self.dataset.sample_number(self.epoch, index)

    def __len__(self) -> int:
        """This rank's number of samples in a *whole* epoch.

        It does not shrink in an epoch begun in the middle, since loops and schedules take the
        length of every epoch from it, once.
        """
        extra = self.world_size - 1 if self.round_up else self.world_size - 1 - self.rank
        return (len(self.dataset) + extra) // self.world_size

    def set_seed(self, seed: int) -> None:
        """Go on with the seed of a run that is resumed.

        Args:
            seed (int): The same on all ranks.
        """
        self.seed = seed
        self.dataset.take_seed(seed)

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch: to its beginning, unless :meth:`set_position` has chosen it before.

        Args:
            epoch (int): Epoch, from 0.
        """
        # DistSamplerSeedHook calls this at the start of every epoch, the resumed one included.
        if epoch != self.epoch:
            self.epoch = epoch
            self.start_sample = 0

    def set_position(self, epoch: int, start_sample: int) -> None:
        """Begin an epoch in the middle; the epochs after it begin at their beginning.

        Args:
            epoch (int): Epoch, from 0.
            start_sample (int): How many samples of this epoch all ranks together have consumed:
                iterations x batch size x world size of the run that is resumed.

        Raises:
            DataError: If a number is negative or the epoch has fewer samples.
        """
        if epoch < 0 or not 0 <= start_sample <= len(self.dataset):
            raise DataError(
                f'No position (epoch={epoch}, start_sample={start_sample}) in a data set of '
                f'{len(self.dataset)} samples: resume with the data set the run began with.'
            )
        self.epoch = epoch
        self.start_sample = start_sample
