"""Which images a run had, said without the place where they lie."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DefaultScope

from ..registry import DATASETS

__all__ = ['describe_data']


def describe_data(cfg: Config) -> dict[str, dict[str, Any]]:
    """Builds the data sets of a config and counts their images.

    Args:
        cfg: Config of a run.

    Returns:
        ``training`` and ``validation`` (where the config has them) to ``type`` of the data set,
        ``folder`` (last part of its path; missing for data that comes with the package) and
        ``images``.

    Raises:
        OSError, ValueError: What the data set raises if its files are missing or damaged.
    """
    described = {}
    scope = cfg.get('default_scope') or 'mmengine'
    with DefaultScope.overwrite_default_scope(scope):
        for name, key in (('training', 'train_dataloader'), ('validation', 'val_dataloader')):
            loader = cfg.get(key)
            if loader is None:
                continue
            leaves = list(_leaves(loader['dataset']))
            entry = {'type': '+'.join(_once(leaf['type'].split('.')[-1] for leaf in leaves))}
            folders = _once(folder for leaf in leaves if (folder := _folder(leaf)))
            if folders:
                entry['folder'] = '+'.join(folders)
            described[name] = {**entry, 'images': len(DATASETS.build(loader['dataset']))}
    return described


def _once(items) -> list[str]:
    return list(dict.fromkeys(items))


def _leaves(dataset: Mapping) -> Iterator[Mapping]:
    """The data sets inside wrappers."""
    inner = dataset.get('datasets') or ([dataset['dataset']] if 'dataset' in dataset else [])
    for item in inner:
        yield from _leaves(item)
    if not inner:
        yield dataset


def _folder(dataset: Mapping) -> str:
    prefix = dataset.get('data_prefix')
    place = dataset.get('data_root') or (prefix if isinstance(prefix, str) else '')
    return Path(place).name
