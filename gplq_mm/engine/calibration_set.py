"""The images that calibration, PCA and Stage 2 see: a fixed sample of the training set."""

import copy
from collections.abc import Callable, Iterator, Mapping

import torch
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from torch.utils.data import DataLoader, Dataset, Subset

from ..distributed import rank_and_world_size
from ..errors import DataError
from ..progress import track
from .scored_images import ScoredImages, scored_images
from .shared_datasets import SharedDatasets, shared_datasets


def _image_id(dataset, index: int) -> str:
    info = dataset.get_data_info(index)
    return str(info.get('img_path', info.get('img_id', info.get('sample_idx', index))))


def _innermost(cfg: dict) -> dict:
    """Dataset config without wrappers such as SeededDataset."""
    while 'pipeline' not in cfg and 'dataset' in cfg:
        cfg = cfg['dataset']
    return cfg


class CalibrationSet:
    """The first ``num_images`` of a seeded permutation of a training set, in evaluation's pipeline.

    Every rank takes its share of them; every user of the set that asks for fewer images gets the
    first ones.

    Args:
        dataset: Data set, or its config.
        num_images: How many images, over all ranks.
        batch_size: Images of a batch, per rank.
        seed: Seed of the permutation.
        num_workers: Loader processes.
        scored: Images that must not be among the chosen ones.

    Raises:
        DataError: If the set is empty, smaller than the number of ranks, or has scored images.
    """

    def __init__(
        self,
        dataset: Dataset | Mapping,
        num_images: int,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
        scored: ScoredImages | None = None,
    ):
        self.dataset = SharedDatasets().build(dataset)
        self.seed = seed
        self.batch_size = batch_size
        self.num_workers = num_workers
        size = len(self.dataset)
        _, world_size = rank_and_world_size()
        if num_images < 1 or size == 0:
            raise DataError(
                f'the calibration set is empty (num_images={num_images}, the data set has {size}); '
                'give at least one training image.'
            )
        if num_images > size:
            MMLogger.get_current_instance().info(
                f'calibration asks for {num_images} images, the training set has {size}: all used'
            )
            num_images = size
        if num_images < world_size:
            raise DataError(
                f'{num_images} calibration image(s) cannot be dealt out to {world_size} ranks; '
                'use at least one for each.'
            )
        generator = torch.Generator().manual_seed(seed)
        self.indices = torch.randperm(size, generator=generator)[:num_images].tolist()
        self.image_ids = [_image_id(self.dataset, index) for index in self.indices]
        if scored is not None:
            scored.refuse(self.dataset, 'calibration', self.indices)

    @classmethod
    def from_runner(cls, runner, num_images: int, **kwargs) -> 'CalibrationSet':
        """The runner's training set with the pipeline of its validation set.

        Args:
            runner: mmengine runner.
            num_images: As in the class.
            **kwargs: ``batch_size``, ``seed`` (the run's by default, or for None), ``num_workers``,
                or ``dataset`` for another set.
        """
        datasets, dataset = shared_datasets(runner), kwargs.pop('dataset', None)
        if dataset is None:
            dataset = copy.deepcopy(_innermost(runner.cfg.train_dataloader['dataset']))
            if runner.cfg.get('val_dataloader'):
                evaluation = _innermost(runner.cfg.val_dataloader['dataset'])
                dataset['pipeline'] = copy.deepcopy(evaluation['pipeline'])
        if kwargs.get('seed') is None:
            kwargs['seed'] = runner.seed
        kwargs.setdefault('num_workers', runner.cfg.train_dataloader.get('num_workers', 0))
        return cls(datasets.build(dataset), num_images, scored=scored_images(runner), **kwargs)

    def batches(self, num_images: int | None = None, description: str = '') -> Iterator[dict]:
        """This rank's raw batches, before the data preprocessor.

        Args:
            num_images: Only the first ones, counted over all ranks. Defaults to all.
            description: Shown with the progress; silent if empty.
        """
        loader = DataLoader(
            Subset(self.dataset, self._own(num_images)),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=pseudo_collate,
        )
        return track(loader, len(loader), description) if description else iter(loader)

    def prepared(self, data_preprocessor: Callable, description: str = '') -> Iterator[dict]:
        """:meth:`batches` of all images, behind a model's data preprocessor."""
        for batch in self.batches(description=description):
            yield data_preprocessor(batch, False)

    def _own(self, num_images: int | None = None) -> list[int]:
        """This rank's share of the first images."""
        rank, world_size = rank_and_world_size()
        return self.indices[: num_images or len(self.indices)][rank::world_size]

    @property
    def num_batches(self) -> int:
        """How many batches of all images this rank has."""
        return -(-len(self._own()) // self.batch_size)

    def describe(self) -> dict:
        """Plain data for checkpoints and summaries."""
        return {'seed': self.seed, 'num_images': len(self.indices), 'image_ids': self.image_ids}
