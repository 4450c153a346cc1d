"""Models of timm and transformers in a packed file: how they are named there and built again.

A model does not keep the arguments that it was made with. They are read off it, and taken only if
a model made of them is the same network, module by module.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..errors import SettingError
from ..layers.family import Family, Library, families, full_name
from ..layers.fused import is_identity_in_eval
from ..registry import FAMILIES

PLAIN = (int, float, str, type(None))
# Arguments of timm's create_model that a file may have: shapes. Others read files, hubs or configs.
TIMM_ARGUMENTS = {
    'depth', 'depths', 'embed_dim', 'global_pool', 'img_size', 'in_chans', 'num_classes',
    'num_heads', 'patch_size', 'window_size',
}  # fmt: skip
# Of a transformers config: where weights and code come from, and what is of training or a label.
LEFT_OUT = re.compile(
    r'^(_.*|architectures|auto_map|transformers_version|dtype|torch_dtype|id2label|label2id|'
    r'quantization_config|model_type)$'
)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN)


def _settings(module: nn.Module) -> dict[str, Any]:
    """What a module computes by, as far as it is plain data."""
    return {
        key: value
        for key, value in vars(module).items()
        if key != 'training' and not key.startswith('_') and _is_plain(value)
    }


def same_network(first: nn.Module, second: nn.Module) -> bool:
    """Whether two float models have the same modules, settings and shapes. Layers that act in
    training alone do not count."""
    mine, other = dict(first.named_modules()), dict(second.named_modules())
    if mine.keys() != other.keys():
        return False
    for name, module in mine.items():
        twin = other[name]
        if is_identity_in_eval(module.eval(), twin.eval()):
            continue
        if full_name(type(module)) != full_name(type(twin)) or _settings(module) != _settings(twin):
            return False
    shapes = [
        {key: value.shape for key, value in model.state_dict().items()} for model in (first, second)
    ]
    return shapes[0] == shapes[1]


def _first(model: nn.Module, *paths: str) -> Any:
    """The first attribute that is there, else None."""
    for path in paths:
        value = model
        for part in path.split('.'):
            value = value[0] if part == '0' and len(value) else getattr(value, part, None)
            if value is None:
                break
        else:
            return value
    return None


def _timm_arguments(model: nn.Module) -> Iterator[dict]:
    """Arguments that may have made a timm model, the fewest first."""
    known: dict[str, Any] = {}
    yield {}
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    head = {'num_classes': model.num_classes, 'in_chans': getattr(conv, 'in_channels', 3)}
    size = _first(model, 'patch_embed.img_size')
    stages = getattr(model, 'layers', None)
    if stages is None:
        shape = {
            'depth': len(getattr(model, 'blocks', ())),
            'embed_dim': getattr(model, 'embed_dim', None),
            'num_heads': _first(model, 'blocks.0.attn.num_heads'),
        }
    else:
        shape = {
            'depths': [len(stage.blocks) for stage in stages if hasattr(stage, 'blocks')],
            'num_heads': [s.blocks[0].attn.num_heads for s in stages if hasattr(s, 'blocks')],
            'embed_dim': _first(model, 'patch_embed.proj.out_channels'),
            'window_size': _first(model, 'layers.0.blocks.0.window_size'),
        }
    size_of_patch = _first(model, 'patch_embed.patch_size')
    for more in (
        head,
        {'img_size': size},
        {'global_pool': getattr(model, 'global_pool', None)},
        {**shape, 'patch_size': None if size_of_patch is None else size_of_patch[0]},
    ):
        known.update({key: value for key, value in more.items() if value is not None})
        yield dict(known)


def _first_that_builds(
    model: nn.Module, build: Callable[[dict], nn.Module], candidates: Iterable[dict]
) -> dict | None:
    """The first description that builds the same network, or None."""
    for data in candidates:
        try:
            with torch.random.fork_rng(devices=[]):
                twin = build(data)
        # A library refuses what it cannot build in errors of any kind.
        except Exception:
            continue
        if same_network(model, twin):
            return data
    return None


def describe_timm(model: nn.Module) -> dict | None:
    """Name and arguments of a model of ``timm.create_model``, or None."""
    cfg = getattr(model, 'pretrained_cfg', None)
    name = (cfg or {}).get('architecture')
    if not name or not type(model).__module__.startswith('timm.'):
        return None
    return _first_that_builds(
        model, build_timm, ({'name': name, 'arguments': found} for found in _timm_arguments(model))
    )


def build_timm(data: dict) -> nn.Module:
    """The model, with random weights.

    Raises:
        SettingError: If timm does not know it, or an argument names something to read.
    """
    import timm

    name, arguments = data['name'], dict(data['arguments'])
    refused = arguments.keys() - TIMM_ARGUMENTS
    if refused or not all(map(_is_plain, arguments.values())) or not timm.is_model(name):
        raise SettingError(f'{name!r} with {sorted(arguments)} is no model of timm alone')
    return timm.create_model(name, pretrained=False, **arguments).eval()


def _transformers_class(name: str) -> type:
    """A model class of a family that we know: others build what their config names."""
    import transformers

    cls = getattr(transformers, name, None)
    known = {key.rpartition('.')[0] for family in families() for key in family.attentions}
    if not isinstance(cls, type) or cls.__module__ not in known:
        raise SettingError(f'{name!r} is no model of a known family of transformers')
    return cls


def _shape_options(config_class: type) -> set[str]:
    """What a file may set of a config. What a config takes beside its own fields names kernels,
    which come from a hub (``attn_implementation``), or nothing that a model computes by."""
    own = config_class().to_dict()
    return {'num_labels', *(key for key in own if not LEFT_OUT.match(key))}


def describe_transformers(model: nn.Module) -> dict | None:
    """Class and config of a model of transformers, or None."""
    if not type(model).__module__.startswith('transformers.models.'):
        return None
    known = _shape_options(type(model.config))
    config = {
        key: value
        for key, value in model.config.to_diff_dict().items()
        if key in known and _is_plain(value)
    }
    if hasattr(model, 'classifier'):
        config['num_labels'] = model.config.num_labels
    data = {'class': type(model).__name__, 'config': config}
    choices = ({}, {'add_pooling_layer': False})
    return _first_that_builds(
        model, build_transformers, ({**data, 'arguments': choice} for choice in choices)
    )


def build_transformers(data: dict) -> nn.Module:
    """The model, with random weights.

    Raises:
        SettingError: If it is of no family that we know, or asks for more than a config does.
    """
    cls = _transformers_class(data['class'])
    config, arguments = dict(data['config']), dict(data['arguments'])
    known = _shape_options(cls.config_class)
    refused = [key for key in config if key not in known or not _is_plain(config[key])]
    if refused or set(arguments) - {'add_pooling_layer'}:
        raise SettingError(f'{data["class"]} with {refused + list(arguments)} is not plain')
    return cls(cls.config_class(**config), **arguments).eval()


@FAMILIES.register_module()
class Libraries(Family):
    """Packages whose models are built by a name and plain arguments."""

    libraries = {
        'timm': Library(describe_timm, build_timm),
        'transformers': Library(describe_transformers, build_transformers),
    }
