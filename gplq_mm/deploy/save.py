"""Writing a packed file from a simulated model.

The header holds ``architecture`` (config of the float model), ``scope`` (of its types),
``test_pipeline``, ``dataset_meta``, ``policy``, ``accuracy`` (stage -> metrics, as the run
measured them), ``versions``, and what is quantized how: ``layers``, ``attention`` and
``compensation``, by full name. What the tensors hold stands in :mod:`.packed_tensors`; everything
else of the model is there under its own name, integers in the smallest type that holds them.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

from ..layers import (
    Compensation,
    DeployError,
    Int4Attention,
    Int4WeightLayer,
    QuantAttention,
    QuantWeightLayer,
)
from ..layers.attention import OPERANDS
from ..layers.family import libraries
from ..layers.int4_weight import check_packable
from ..models import GPLQ, QuantBackbone
from ..version import __version__
from .architecture import check_config, check_pipeline, encode, inference_architecture
from .convert import NOTHING, strip_wrappers
from .packed_file import write_file
from .packed_tensors import attention_record, compensation_record, layer_record

PACKAGES = ('torch', 'onedl-mmengine', 'onedl-mmcv', 'onedl-mmpretrain', 'onedl-mmdetection')


@dataclass(frozen=True)
class SizeReport:
    """Bytes of a packed file.

    Attributes:
        parts: Name of a part -> bytes.
        file: Bytes of the whole file.
        fp32: Bytes of the same model's FP32 checkpoint (its tensors).
    """

    parts: dict[str, int]
    file: int
    fp32: int

    @property
    def ratio(self) -> float:
        """Whole file against FP32."""
        return self.file / self.fp32

    @property
    def ratio_without_compensation(self) -> float:
        """File less compensation against FP32."""
        return (self.file - self.parts.get('compensation', 0)) / self.fp32


def attentions(model: nn.Module) -> dict[str, tuple[str, QuantAttention | Int4Attention]]:
    """Name of an attention layer -> name of its child that multiplies, and that child."""
    return {
        name: (key, child)
        for name, module in model.named_modules()
        for key, child in module.named_children()
        if isinstance(child, QuantAttention | Int4Attention)
    }


def other_entries(model: nn.Module) -> dict[str, Tensor]:
    """Entries of the state that are not part of a quantized layer, a grid or a compensation."""
    prefixes = []
    # A module that is used in two places has its entries under both names.
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantWeightLayer | Compensation | Int4WeightLayer | Int4Attention):
            prefixes.append(f'{name}.')
        elif isinstance(module, QuantAttention):
            prefixes += [f'{name}.{operand}.' for operand in OPERANDS]
    owned = tuple(prefixes)
    return {key: value for key, value in model.state_dict().items() if not key.startswith(owned)}


def _narrowed(tensor: Tensor) -> Tensor:
    """Integers in the smallest type that holds them."""
    if tensor.dtype not in (torch.int64, torch.int32, torch.int16) or not tensor.numel():
        return tensor
    low, high = int(tensor.min()), int(tensor.max())
    for dtype in (torch.int8, torch.int16, torch.int32):
        info = torch.iinfo(dtype)
        if info.min <= low and high <= info.max and info.bits < torch.iinfo(tensor.dtype).bits:
            return tensor.to(dtype)
    return tensor


def _model_config(cfg: Mapping) -> tuple[dict, str]:
    """Config of the float model, and the scope of its types."""
    if 'model' not in cfg:
        raise DeployError('the config has no "model"; give the config of the run.')
    model = cfg['model']
    architecture = model
    if str(model.get('type')).rpartition('.')[2] == 'GPLQ':
        architecture = model['architecture']
    scope = cfg.get('default_scope') or 'mmengine'
    architecture = dict(inference_architecture(architecture, scope))
    for owner in (model, cfg):
        preprocessor = owner.get('data_preprocessor')
        if preprocessor is not None:
            architecture.setdefault(
                'data_preprocessor', inference_architecture(preprocessor, scope)
            )
    return architecture, scope


def _test_pipeline(cfg: Mapping, scope: str) -> list | None:
    loader = cfg.get('test_dataloader') or cfg.get('val_dataloader') or {}
    dataset = loader.get('dataset')
    while isinstance(dataset, Mapping):
        if 'pipeline' in dataset:
            return inference_architecture(list(dataset['pipeline']), scope)
        dataset = dataset.get('dataset')
    return None


def _versions(scope: str) -> dict[str, str]:
    found = {'gplq_mm': __version__}
    for package in (*PACKAGES, scope) if scope in libraries() else PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _policy(model: nn.Module) -> dict:
    for module in model.modules():
        if isinstance(module, GPLQ | QuantBackbone):
            return module.policy.to_dict()
    report = getattr(model, 'gplq_report', None)
    return report.policy if report else getattr(model, 'deploy_header', {}).get('policy', {})


def save(
    model: nn.Module,
    cfg: Config | Mapping,
    path: str | os.PathLike,
    dataset_meta: Mapping | None = None,
    accuracy: Mapping[str, Any] | None = None,
) -> SizeReport:
    """Writes a model after Stage 2 as a packed file.

    Args:
        model: Simulated model: a :class:`GPLQ`, or a model with a :class:`QuantBackbone`; or what
            :func:`convert` has made of one.
        cfg: Config of the run; its model, ``data_preprocessor``, ``default_scope`` and the
            pipeline of its test set go into the file.
        path: The file to write.
        dataset_meta: Meta information of the data set, with ``classes``.
        accuracy: What was measured of the model, JSON data.

    Returns:
        The sizes.

    Raises:
        DeployError: Before Stage 2, for layout ``raw``, or an architecture that a file cannot
            describe.
        OSError: If the file cannot be written.
    """
    policy = _policy(model)
    if not is_deployed(model):
        model = strip_wrappers(model)
    architecture, scope = _model_config(cfg)
    check_config(architecture, scope)
    pipeline = _test_pipeline(cfg, scope)
    if pipeline is not None:
        check_pipeline(pipeline, scope)
    header = {
        'architecture': encode(architecture, 'architecture'),
        'scope': scope,
        'test_pipeline': encode(pipeline, 'test_pipeline'),
        'dataset_meta': encode(dict(dataset_meta or {}), 'dataset_meta'),
        'policy': encode(policy, 'policy'),
        'accuracy': encode(dict(accuracy or {}), 'accuracy'),
    }
    return write_model(model, header, path)


def write_model(model: nn.Module, header: dict, path: str | os.PathLike) -> SizeReport:
    """Writes a model after Stage 2 or its packed twin, which stays as it is.

    Args:
        model: Without wrappers.
        header: What the file says beside versions and what is quantized how.
        path: The file to write.

    Raises:
        DeployError: For a float model, before Stage 2, or for layout ``raw``.
        OSError: If the file cannot be written.
    """
    empty = {'layers': {}, 'attention': {}, 'compensation': {}}
    header = {**header, 'versions': _versions(header['scope']), **empty}
    tensors: dict[str, Tensor] = {}
    state = {key: value.cpu().clone() for key, value in other_entries(model).items()}
    elements = 0
    for name, layer in model.named_modules():
        if isinstance(layer, QuantWeightLayer):
            check_packable(layer)
        if isinstance(layer, QuantWeightLayer | Int4WeightLayer):
            header['layers'][name], parts = layer_record(name, layer)
            tensors.update(parts)
            rows, columns = len(parts[f'{name}.row_scale']), len(parts[f'{name}.permutation'])
            elements += rows * columns + (0 if layer.bias is None else rows)
    if not header['layers']:
        raise DeployError(NOTHING)
    for name, (_, attention) in attentions(model).items():
        header['attention'][name], parts = attention_record(attention)
        tensors.update({f'{name}.{key}': value for key, value in parts.items()})
    for name, module in model.named_modules():
        if isinstance(module, Compensation) and module.is_fitted:
            block = name.removesuffix('.compensation')
            header['compensation'][block], parts = compensation_record(block, module)
            tensors.update(parts)
    float_bytes = 4 * elements + sum(value.nbytes for value in state.values())
    clash = set(tensors) & set(state)
    if clash:
        raise DeployError(f'the architecture has an entry of the reserved name {clash.pop()}.')
    tensors = {key: value.cpu() for key, value in tensors.items()}
    tensors.update({key: _narrowed(value) for key, value in state.items()})
    write_file(path, header, tensors)
    return SizeReport(_parts(tensors, state, header), Path(path).stat().st_size, float_bytes)


def is_deployed(model: nn.Module) -> bool:
    """Whether the layers of a model are packed."""
    return any(isinstance(module, Int4WeightLayer) for module in model.modules())


def _parts(tensors: dict[str, Tensor], state: dict, header: dict) -> dict[str, int]:
    """Bytes by part of the file, the largest first."""
    names = {
        'codes': 'weight codes',
        'multiplier': 'group multipliers',
        'row_scale': 'row scales and biases',
        'bias': 'row scales and biases',
        'permutation': 'permutations',
    }
    layers = header['layers']
    parts: dict[str, int] = {}
    for name, tensor in tensors.items():
        owner, _, last = name.rpartition('.')
        if name in state:
            part = 'float parameters'
        elif owner.endswith('.compensation'):
            part = 'compensation'
        elif owner in layers:
            part = names[last]
        else:
            part = 'activation grids'
        parts[part] = parts.get(part, 0) + tensor.nbytes
    return dict(sorted(parts.items(), key=lambda item: -item[1]))
