"""Transfer as a diagnostic: every stage of a run, probed on another labelled data set."""

import copy
from collections.abc import Iterator
from numbers import Integral

import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..distributed import rank_and_world_size
from ..errors import DataError
from ..evaluation import feature_distance, linear_probe
from ..models import GPLQ
from ..progress import track
from .output_pairs import OutputPairs

LOADER_KEYS = {'dataset', 'batch_size', 'num_workers'}


class TransferProbe:
    """Linear probe on penultimate features of the student, and their distance to the teacher's.

    Both data sets are read once for every stage, each image by one rank.

    Args:
        model: Classifier.
        train_dataloader: ``dict(dataset=..., batch_size=32, num_workers=0)``: the images that the
            probe is fitted on, with labels.
        val_dataloader: As before, the images that it is scored on, of the same classes.

    Raises:
        DataError: If the model has no penultimate features, or a data set is missing, empty,
            without labels, of one class, or of other classes than the other one.
    """

    def __init__(self, model: GPLQ, train_dataloader: dict, val_dataloader: dict):
        if model.mimicry.tap is None or model.mimicry.taps_maps:
            raise DataError(
                'train_cfg.transfer probes the penultimate features of a classifier, and this '
                'model has none (a detector, or a feature_layer with maps); set '
                'train_cfg.transfer=None.'
            )
        self.model = model
        self._loaders: dict[str, DataLoader] = {}
        self._labels: dict[str, Tensor] = {}
        self._output_pairs = OutputPairs(model)
        classes = []
        for split, cfg in (('train', train_dataloader), ('val', val_dataloader)):
            dataset = self._build(split, cfg)
            labels = self._labels_of(split, dataset)
            classes.append((dataset.metainfo or {}).get('classes'))
            rank, world_size = rank_and_world_size()
            own = range(rank, len(dataset), world_size)
            self._labels[split] = labels[rank::world_size]
            self._loaders[split] = DataLoader(
                Subset(dataset, own),
                batch_size=cfg.get('batch_size', 32),
                num_workers=cfg.get('num_workers', 0),
                collate_fn=pseudo_collate,
            )
            if split == 'train' and len(labels.unique()) < 2:
                raise DataError(
                    'all images of transfer.train_dataloader are of one class; give at least two.'
                )
        if classes[0] != classes[1]:
            raise DataError(
                f'the data sets of train_cfg.transfer have different classes ({classes[0]} and '
                f'{classes[1]}), so that their labels do not mean the same; give both the same '
                'folders, or the same metainfo.'
            )

    @staticmethod
    def _build(split: str, cfg: dict) -> Dataset:
        name = f'transfer.{split}_dataloader'
        unknown = set(cfg) - LOADER_KEYS
        if unknown or 'dataset' not in cfg:
            raise DataError(
                f'{name} needs a dataset, and may have batch_size and num_workers; every image is '
                f'read once, in order. It has {sorted(cfg)}.'
            )
        try:
            dataset = DATASETS.build(copy.deepcopy(cfg['dataset']))
            size = len(dataset)
        except (OSError, RuntimeError, AssertionError, ValueError) as error:
            # mmpretrain's data sets raise any of these for a missing or an empty folder.
            reason = ' '.join(str(error).split())
            raise DataError(
                f'the data set of {name} is missing or empty ({reason}): correct its path, or set '
                'train_cfg.transfer=None.'
            ) from error
        _, world_size = rank_and_world_size()
        if size < world_size:
            raise DataError(
                f'{name} has {size} image(s) for {world_size} rank(s); give at least one for each.'
            )
        return dataset

    @staticmethod
    def _labels_of(split: str, dataset: Dataset) -> Tensor:
        labels = [dataset.get_data_info(index).get('gt_label') for index in range(len(dataset))]
        if not all(isinstance(label, Integral) and label >= 0 for label in labels):
            raise DataError(
                f'transfer.{split}_dataloader has images without a label, or with several; a '
                'linear probe needs one class for each. Set with_label=True, or give another data '
                'set.'
            )
        return torch.tensor(labels)

    @torch.no_grad()
    def measure(self) -> dict:
        """The model as it is now; collective over ranks.

        Returns:
            Result of :func:`linear_probe`; of a model with a teacher also ``relative_l2``,
            ``cosine`` and ``agreement`` of :func:`feature_distance` on the validation images.
        """
        self.model.eval()
        train = torch.cat(self._features('train'))
        val: list[Tensor] = []
        result = {}
        if self.model.has_teacher_features:
            distance = feature_distance(self._pairs(val))
            result = {key: distance[key] for key in ('relative_l2', 'cosine', 'agreement')}
        else:
            val += self._features('val')
        probe = linear_probe((train, self._labels['train']), (torch.cat(val), self._labels['val']))
        return {**probe, **result}

    def _inputs(self, split: str) -> Iterator[Tensor]:
        loader = self._loaders[split]
        for batch in track(loader, len(loader), f'transfer, {split} images'):
            # Labels of another data set may be no classes of this model.
            yield self.model.data_preprocessor({'inputs': batch['inputs']}, False)['inputs']

    def _features(self, split: str) -> list[Tensor]:
        return [_row(self.model.student_outputs(inputs)[0]) for inputs in self._inputs(split)]

    def _pairs(self, features: list[Tensor]) -> Iterator[tuple]:
        """Pairs of outputs on the validation images, whose student features are kept."""
        for student, teacher in self._output_pairs.of(self._inputs('val')):
            features.append(_row(student[0]))
            yield student, teacher


def _row(feature: Tensor) -> Tensor:
    """Features ``(n, D)``, float32 on the CPU."""
    return feature.flatten(1).float().cpu()
