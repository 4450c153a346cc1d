"""Data sets of a run: a list of images is read once, whoever wants it in whatever pipeline."""

import copy
import inspect
from collections.abc import Mapping

from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS
from torch.utils.data import Dataset

from ..errors import DataError
from ..registry import DATASETS as OUR_DATASETS
from ..registry import registered


class SharedDatasets:
    """Builds data sets; those whose configs differ in the pipeline alone share their annotations.

    mmengine's :class:`BaseDataset` and what is derived from it is shared, also inside a wrapper.
    """

    def __init__(self) -> None:
        self._read: list[tuple[dict, BaseDataset]] = []

    def build(self, cfg: Dataset | Mapping) -> Dataset:
        """The data set of a config.

        Args:
            cfg: Config, not changed; a data set is returned as it is.

        Raises:
            DataError: If there is no image, or none passes the data set's filter.
        """
        if not isinstance(cfg, Mapping):
            return cfg
        cfg = copy.deepcopy(cfg)
        kind = _class_of(cfg)
        if isinstance(cfg.get('dataset'), Mapping):
            inner = cfg['dataset']
            # Other wrappers build a wrapper inside themselves, and take no other object.
            if kind is registered(OUR_DATASETS)['SeededDataset'] or not _is_wrapper(inner):
                cfg['dataset'] = self.build(inner)
        elif isinstance(kind, type) and issubclass(kind, BaseDataset) and _can_wait(kind):
            return self._shared(cfg)
        return DATASETS.build(cfg)

    def _shared(self, cfg: dict) -> BaseDataset:
        made = DATASETS.build({**cfg, 'lazy_init': True})
        content = {key: value for key, value in cfg.items() if key != 'pipeline'}
        for known, dataset in self._read:
            if known == content:
                twin = copy.copy(dataset)
                twin.pipeline = made.pipeline
                return twin
        _read(made, cfg)
        self._read.append((content, made))
        return made


def shared_datasets(runner) -> SharedDatasets:
    """Those of a runner."""
    return vars(runner).setdefault('datasets', SharedDatasets())


def _class_of(cfg: Mapping) -> type | None:
    if not isinstance(cfg.get('type'), str):
        return cfg.get('type')
    with DATASETS.switch_scope_and_registry(cfg.get('_scope_')) as registry:
        return registry.get(cfg['type'])


def _is_wrapper(cfg: Mapping) -> bool:
    return 'dataset' in cfg or 'datasets' in cfg


def _can_wait(kind: type) -> bool:
    """Whether a data set can be made without reading its annotations."""
    parameters = inspect.signature(kind).parameters
    return 'lazy_init' in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _read(dataset: BaseDataset, cfg: Mapping) -> None:
    """Reads the annotations, of which mmengine cannot pack an empty list."""
    packs, dataset.serialize_data = dataset.serialize_data, False
    dataset.full_init()
    if not dataset.data_list:
        raise DataError(
            f'no image is left in the data set of {cfg.get("ann_file") or dict(cfg)}: correct its '
            'paths and metainfo.classes, or add annotations; '
            'filter_cfg=dict(filter_empty_gt=False) keeps images without.'
        )
    dataset.serialize_data = packs
    if packs:
        dataset.data_bytes, dataset.data_address = dataset._serialize_data()
