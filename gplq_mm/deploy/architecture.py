"""The architecture config inside a packed file, and building from it.

A file may come from anyone, and some configs of the OpenMMLab packages reach code, files or the
network: a ``type`` that is no registered name is imported by path, a few options are passed to
``eval``, others name a checkpoint, and some classes read what their config names (files, other
configs, model hubs). Without the checks here, reading a packed file could run its author's code,
which the format (safetensors, JSON) is to prevent. So a config from a file is plain data, its types
are looked up in the registries and nowhere else, their classes come from modules that are listed
(:attr:`.Family.scopes`), and its strings are plain words.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import TASK_UTILS as ROOT_TASK_UTILS
from mmengine.registry import TRANSFORMS as ROOT_TRANSFORMS
from mmengine.registry import Registry
from torch import nn

from ..layers import DeployError
from ..layers.family import libraries, scopes
from ..registry import MODELS

MODEL_REGISTRIES = (ROOT_MODELS, ROOT_TASK_UTILS)
# Looked up in mmcv.ops by name, not in a registry.
OPERATORS = ('RoIAlign', 'RoIPool', 'nms', 'soft_nms', 'nms_rotated')
# Modules of mmcv, which registers its classes in mmengine's registries.
MMCV_MODULES = r'(cnn|ops|transforms)\.'
# Entries that name a checkpoint, and those that only training needs (some constructors ask for
# them, so they stay as None).
LEFT_OUT = ('init_cfg', 'pretrained')
TRAINING_ONLY = ('train_cfg', 'batch_augments')
FORBIDDEN_KEYS = (
    *LEFT_OUT,
    *TRAINING_ONLY,
    'checkpoint',
    'checkpoint_path',
    'load_from',
    'ckpt',
    'teacher_ckpt',
    'teacher_config',
)
TYPE = re.compile(r'[A-Za-z_]\w*([./][A-Za-z_]\w*)?', re.ASCII)
WORD = re.compile(r'[\w\- ]{0,200}', re.ASCII)
LARGEST_INTEGER = 2**20
MAX_DEPTH = 40
TUPLE = '__tuple__'


def encode(value: Any, where: str = 'config') -> Any:
    """Nested config as JSON data; a tuple becomes ``{"__tuple__": [...]}``.

    Raises:
        DeployError: For anything else than dicts, lists, tuples, strings, numbers and None.
    """
    if isinstance(value, Mapping):
        return {str(key): encode(item, f'{where}.{key}') for key, item in value.items()}
    if isinstance(value, tuple):
        return {TUPLE: encode(list(value), where)}
    if isinstance(value, list):
        return [encode(item, f'{where}[{i}]') for i, item in enumerate(value)]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise DeployError(
        f'{where} is a {type(value).__name__}, which a file cannot hold; write the config with '
        'plain data and types as strings.'
    )


def decode(value: Any) -> Any:
    """Inverse of :func:`encode`."""
    if isinstance(value, dict):
        if set(value) == {TUPLE} and isinstance(value[TUPLE], list):
            return tuple(decode(item) for item in value[TUPLE])
        return {key: decode(item) for key, item in value.items()}
    return [decode(item) for item in value] if isinstance(value, list) else value


def inference_architecture(config: Any, scope: str) -> Any:
    """Copy of a config without what only training needs.

    A ``gplq_mm.QuantBackbone`` is replaced by the backbone inside it. mmengine marks what a config
    inherits from another package with ``_scope_``; where that is not ``scope`` it becomes a prefix
    of the type.
    """
    if isinstance(config, Mapping):
        if config.get('type') in ('gplq_mm.QuantBackbone', 'QuantBackbone'):
            config = config['backbone']
        found = {
            key: None if key in TRAINING_ONLY else inference_architecture(item, scope)
            for key, item in config.items()
            if key not in (*LEFT_OUT, '_scope_')
        }
        name, given = found.get('type'), config.get('_scope_', scope)
        if given != scope and isinstance(name, str) and name not in OPERATORS and '.' not in name:
            found['type'] = f'{given}.{name}'
        return found
    if isinstance(config, (list, tuple)):
        return type(config)(inference_architecture(item, scope) for item in config)
    return config


def _candidates(registry: Registry, name: str, scope: str) -> Iterator[type]:
    """Registered classes that ``name`` may mean, without mmengine's search by import path."""
    given, _, plain = name.rpartition('.')
    scope = given or scope
    known = scopes()
    if scope not in known and scope not in registry.children:
        return
    # The import runs no code of the file.
    if scope in known and scope != 'mmengine':
        with suppress(ModuleNotFoundError):
            import_module(f'{scope}.registry')
    child = registry.children.get(scope)
    for owner in (child, registry):
        if owner is not None:
            owner.import_from_location()
            if plain in owner.module_dict:
                yield owner.module_dict[plain]


def _check_type(name: Any, scope: str, registries: tuple[Registry, ...], where: str) -> None:
    if not isinstance(name, str) or not TYPE.fullmatch(name):
        raise DeployError(f'{where}: type {name!r} is no name of a registered class.')
    if name in OPERATORS:
        return
    for registry in registries:
        for cls in _candidates(registry, name, scope):
            package, _, module = getattr(cls, '__module__', '').partition('.')
            modules = {'mmcv': MMCV_MODULES, **scopes()}.get(package)
            # Of another package, it was registered by the program that reads the file.
            if modules is not None and not re.match(modules, module):
                raise DeployError(
                    f'{where}: {name} is not built from a file, since {cls.__module__} may hold '
                    'classes that read other files or a model hub; this architecture cannot be '
                    'deployed.'
                )
            return
    raise DeployError(
        f'{where}: {name!r} is in none of the registries of {", ".join(scopes())}. Install the '
        'package that defines it, import the module that registers it, or get another file.'
    )


def check_config(
    config: Any,
    scope: str,
    registries: tuple[Registry, ...] = MODEL_REGISTRIES,
    where: str = 'architecture',
    depth: int = 0,
) -> None:
    """Raises DeployError unless a decoded config is safe to build.

    Args:
        config: Nested data.
        scope: Scope of types without one.
        registries: Root registries that may hold the types.
        where: Path of this part, for messages.
        depth: Nesting so far.
    """
    if depth > MAX_DEPTH:
        raise DeployError(f'{where}: nested more than {MAX_DEPTH} deep.')
    if isinstance(config, dict):
        for key, value in config.items():
            if not isinstance(key, str) or not WORD.fullmatch(key) or key == '_scope_':
                raise DeployError(f'{where}: {key!r} is no name of an option.')
            if key in FORBIDDEN_KEYS and value is not None:
                raise DeployError(f'{where}: option {key!r} is not taken from a file.')
            if key == 'type':
                _check_type(value, scope, registries, where)
            else:
                check_config(value, scope, registries, f'{where}.{key}', depth + 1)
    elif isinstance(config, (list, tuple)):
        for index, value in enumerate(config):
            check_config(value, scope, registries, f'{where}[{index}]', depth + 1)
    elif isinstance(config, str):
        if not WORD.fullmatch(config):
            raise DeployError(f'{where}: {config[:60]!r} is more than a word.')
    elif isinstance(config, bool) or config is None:
        return
    elif isinstance(config, int):
        if abs(config) > LARGEST_INTEGER:
            raise DeployError(f'{where}: {config} is too large.')
    elif not isinstance(config, float):
        raise DeployError(f'{where}: a {type(config).__name__} is no plain data.')


def check_pipeline(pipeline: Any, scope: str) -> None:
    """Raises DeployError unless a list of transforms is safe to build."""
    if not isinstance(pipeline, list):
        raise DeployError('test_pipeline is no list.')
    check_config(pipeline, scope, (ROOT_TRANSFORMS,), 'test_pipeline')


def check_scope(scope: str) -> None:
    """Raises DeployError unless a scope is one that a file may name."""
    if scope not in scopes():
        raise DeployError(f'scope {scope!r} is none of {", ".join(scopes())}.')


def build_architecture(config: dict, scope: str) -> nn.Module:
    """Builds the float model of a checked config; the global random state stays as it is.

    Args:
        config: Decoded config of a model.
        scope: Scope of types without one.

    Raises:
        DeployError: If the config is not safe to build, or does not build.
    """
    check_scope(scope)
    check_config(config, scope)
    try:
        with torch.random.fork_rng(devices=[]):
            # Detectors read their config by attribute, and write into it.
            return MODELS.build(ConfigDict({**copy.deepcopy(config), '_scope_': scope}))
    except Exception as error:
        raise DeployError(
            'the architecture in the header cannot be built with the installed packages '
            f'({type(error).__name__}: {str(error).partition(chr(10))[0]}). Install the versions '
            'named in the header, or deploy the checkpoint again.'
        ) from error


def build_from_library(config: dict, name: str) -> nn.Module:
    """As :func:`build_architecture`, of a package without a registry
    (:class:`gplq_mm.layers.family.Library`)."""
    check_config(config, 'mmengine')
    try:
        with torch.random.fork_rng(devices=[]):
            return libraries()[name].build(copy.deepcopy(config))
    except Exception as error:
        raise DeployError(
            f'the model in the header cannot be built with the installed {name} '
            f'({type(error).__name__}: {str(error).partition(chr(10))[0]}). Install the version '
            'named in the header, or give the float model: load(path, model=...).'
        ) from error
