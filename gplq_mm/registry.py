"""Registries of gplq_mm.

Children of mmengine's registries, so that ``type='gplq_mm.X'`` works in any OpenMMLab config
without ``custom_imports``: the first look-up imports the modules named in ``locations``.
"""

import inspect
from typing import Any

from mmengine.registry import DATA_SAMPLERS as MMENGINE_DATA_SAMPLERS
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import (
    OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
)
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import RUNNERS as MMENGINE_RUNNERS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

from .errors import SettingError

MODELS = Registry('model', parent=MMENGINE_MODELS, locations=['gplq_mm.models'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, locations=['gplq_mm.engine'])
LOOPS = Registry('loop', parent=MMENGINE_LOOPS, locations=['gplq_mm.engine'])
RUNNERS = Registry('runner', parent=MMENGINE_RUNNERS, locations=['gplq_mm.engine'])
OPTIM_WRAPPERS = Registry(
    'optim_wrapper', parent=MMENGINE_OPTIM_WRAPPERS, locations=['gplq_mm.models']
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    locations=['gplq_mm.models'],
)
DATASETS = Registry('dataset', parent=MMENGINE_DATASETS, locations=['gplq_mm.datasets'])
DATA_SAMPLERS = Registry(
    'data sampler', parent=MMENGINE_DATA_SAMPLERS, locations=['gplq_mm.datasets']
)
TRANSFORMS = Registry('transform', parent=MMENGINE_TRANSFORMS, locations=['gplq_mm.datasets'])

# Concepts that mmengine does not know.
OBSERVERS = Registry('observer', scope='gplq_mm', locations=['gplq_mm.quant'])
FORMATS = Registry('format', scope='gplq_mm', locations=['gplq_mm.quant'])
WEIGHT_PTQ = Registry('weight ptq', scope='gplq_mm', locations=['gplq_mm.ptq'])
COMPENSATORS = Registry('compensator', scope='gplq_mm', locations=['gplq_mm.layers'])
FAMILIES = Registry('model family', scope='gplq_mm', locations=['gplq_mm.families'])


def registered(registry: Registry) -> dict[str, type]:
    """Entries of a registry by name.

    ``Registry.get`` imports what it does not know by its path. Names that come from a file of
    someone else are looked up here instead.
    """
    registry.import_from_location()
    return registry.module_dict


def build_registered(registry: Registry, cfg: dict) -> Any:
    """Builds what a config asks for of a registry that mmengine does not know.

    Args:
        registry: One without a parent.
        cfg: ``dict(type=NAME, ...)`` with options. Not changed.

    Raises:
        SettingError: For an unknown type or option.
    """
    kind = cfg.get('type')
    made = registry.get(kind) if isinstance(kind, str) else kind
    if made is None:
        names = ', '.join(registered(registry))
        raise SettingError(f'{registry.name} {kind!r} is not one of {names}.')
    try:
        inspect.signature(made).bind(**{key: cfg[key] for key in cfg if key != 'type'})
    except TypeError as error:
        raise SettingError(f'{registry.name} {cfg["type"]!r}: {error}.') from error
    # A runner's default scope (mmpretrain, mmdet) has no such registry; without a scope of its
    # own the look-up would warn about that on every build.
    return registry.build({'_scope_': 'gplq_mm', **cfg})
