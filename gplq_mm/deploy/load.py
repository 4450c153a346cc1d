"""From a packed file to a model that infers."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

from ..layers import (
    DeployError,
    attach_compensation,
    quant_layers,
    unchanged_on_error,
)
from ..layers.attention import OPERANDS
from ..layers.family import entry_of, libraries
from ..layers.replace import kind_of, set_module, twin_of
from ..layers.reproducible import make_reproducible
from ..ops.device import resolve_device
from ..quant import ActSpec, SiteSpec, WeightSpec
from ..quant.spec import SITE_GRANULARITIES
from .architecture import (
    build_architecture,
    build_from_library,
    check_pipeline,
    check_scope,
    decode,
)
from .convert import convert_in_place
from .packed_file import read_file
from .packed_tensors import (
    TensorTable,
    fill_attention,
    fill_compensation,
    fill_layer,
    spec_of,
)
from .save import attentions, other_entries

AGAIN = 'Deploy the checkpoint again.'


def load(
    path: str | os.PathLike, device: str | torch.device = 'cpu', model: nn.Module | None = None
) -> nn.Module:
    """Reads a packed model; needs neither the run's config nor its data.

    Args:
        path: File of :func:`gplq_mm.deploy.save`.
        device: ``'cpu'`` or ``'cuda'``. Without a usable GPU the model stays on the CPU, and a
            warning says so once.
        model: The float model that the file is of, whatever its weights, where the file does not
            say how to build it. It is filled, and returned; after an error it is what it was.

    Returns:
        The model in eval mode, ready for ``model(images)`` and for the inference APIs of
        mmpretrain (``ImageClassificationInferencer(model)``) and mmdet
        (``inference_detector(model, image)``). ``deploy_header`` is the file's header,
        ``deploy_report`` says what computes in integers.

    Raises:
        DeployError: For a file that is missing, truncated, changed, foreign, of another version,
            or that does not describe a model the installed packages can build.
        ValueError: If the device is neither a CPU nor a CUDA device of this machine.
    """
    target = resolve_device(device)
    header, tensors = read_file(path)
    try:
        if model is None:
            packed = _fill_model(_build(header), header, TensorTable(tensors))
        else:
            with unchanged_on_error(model, values=True):
                packed = _fill_model(model, header, TensorTable(tensors))
    except DeployError as error:
        raise DeployError(f'{path}: {error}') from error
    return packed.to(target)


def _section(header: Mapping, key: str, kind: type) -> Any:
    if not isinstance(header.get(key), kind):
        raise DeployError(f'the header has no usable "{key}". {AGAIN}')
    return header[key]


def _build(header: dict) -> nn.Module:
    """The float model that a header describes, with what the inference APIs look for."""
    try:
        config = decode(_section(header, 'architecture', dict))
        pipeline = decode(header.get('test_pipeline'))
        meta = decode(_section(header, 'dataset_meta', dict))
    except RecursionError:
        raise DeployError(f'the header is nested too deep. {AGAIN}') from None
    scope = _section(header, 'scope', str)
    if not scope:
        raise DeployError(
            'the file does not say how its model is built; give the float model: '
            'load(path, model=...).'
        )
    if scope in libraries():
        return build_from_library(config, scope)
    check_scope(scope)
    if pipeline is not None:
        check_pipeline(pipeline, scope)
    model = build_architecture(config, scope)
    _describe(model, config, scope, pipeline, meta)
    return model


def _fill_model(model: nn.Module, header: dict, table: TensorTable) -> nn.Module:
    _swap_layers(model, _section(header, 'layers', dict))
    _swap_attention(model, _section(header, 'attention', dict))
    make_reproducible(model)
    rest = other_entries(model)
    compensation = {
        name: fill_compensation(name, _submodule(model, name), entry, table)
        for name, entry in _section(header, 'compensation', dict).items()
    }
    for name, layer in quant_layers(model).items():
        fill_layer(name, layer, table)
    for name, (_, attention) in attentions(model).items():
        fill_attention(name, attention, table)
    _fill(rest, table)
    for name, module in compensation.items():
        attach_compensation(model.get_submodule(name), module)
    model.deploy_report = convert_in_place(model)
    model.deploy_header = header
    return model


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise DeployError(f'the architecture has no layer {name}. {AGAIN}') from None


def _swap_layers(model: nn.Module, entries: dict) -> None:
    if not entries:
        raise DeployError(f'the header names no quantized layer. {AGAIN}')
    for name, entry in entries.items():
        kind = entry.get('kind') if isinstance(entry, dict) else None
        module = _submodule(model, name)
        if kind is None or kind != kind_of(module):
            raise DeployError(f'{name} is no {kind} layer of the architecture. {AGAIN}')
        act = spec_of(ActSpec, entry.get('activation'), name)
        _check_site(act, kind, name)
        spec = SiteSpec(act, spec_of(WeightSpec, entry.get('weight'), name))
        try:
            set_module(model, name, twin_of(module).from_float(module, spec, name))
        except ValueError as error:
            raise DeployError(f'{error} {AGAIN}') from error


def _check_site(spec, kind: str, name: str) -> None:
    fits = kind in spec.code_format.sites and spec.granularity in SITE_GRANULARITIES[kind]
    if not fits or (spec.row_relative and kind != 'probs'):
        raise DeployError(f'{name}: the header describes no quantizer of this site. {AGAIN}')


def _swap_attention(model: nn.Module, entries: dict) -> None:
    for name, entry in entries.items():
        module = _submodule(model, name)
        known = entry_of(module, 'attentions')
        if known is None or not isinstance(entry, dict) or set(entry) != set(OPERANDS):
            raise DeployError(f'{name} is no known attention of the architecture. {AGAIN}')
        specs = {}
        for operand, spec in entry.items():
            site = f'{name}.{operand}'
            specs[operand] = None if spec is None else spec_of(ActSpec, spec, site)
            if spec is not None:
                _check_site(specs[operand], operand, site)
        try:
            known.quantize(module, specs, name)
        except ValueError as error:
            raise DeployError(f'{error} {AGAIN}') from error


def _fill(entries: dict[str, Tensor], table: TensorTable) -> None:
    integers = (torch.int8, torch.int16, torch.int32, torch.int64)
    for name, target in entries.items():
        dtypes = [target.dtype]
        if target.dtype in integers:
            # A file holds integers in a narrower type where that suffices.
            dtypes = integers[: integers.index(target.dtype) + 1]
        target.copy_(table.take(name, tuple(target.shape), *dtypes))
    if table.tensors:
        raise DeployError(
            f'the file holds {len(table.tensors)} tensors that the architecture does not have, '
            f'for example {next(iter(table.tensors))}. {AGAIN}'
        )


def _describe(
    model: nn.Module, config: dict, scope: str, pipeline: list | None, meta: dict
) -> None:
    """Sets what the inference APIs look for: mmpretrain's under ``_``, mmdet's without."""
    cfg = {'model': config, 'default_scope': scope}
    if pipeline is not None:
        cfg['test_dataloader'] = {'dataset': {'pipeline': pipeline}}
    model.cfg = model._config = Config(cfg)
    model.dataset_meta = model._dataset_meta = meta
