"""The front door: quantize, pack, save and load any ``nn.Module``, without a config or a run."""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from . import deploy
from .deploy.save import SizeReport, write_model
from .evaluation.coverage import Coverage, measure_coverage
from .models.batches import prepare, run_on
from .models.quantization import Quantization
from .quant import QuantPolicy


def quantize_(
    model: nn.Module,
    calibration: Iterable | dict | None = None,
    *,
    train: dict | None = None,
    policy: dict | str | QuantPolicy | None = None,
    weight_ptq: dict | str | None = None,
    compensation: dict | str | None = 'default',
    forward: Callable[[nn.Module, Any], Any] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> nn.Module:
    """Quantizes a trained float model in place: calibration, Weight-PTQ, compensation.

    Settings have the names and, where they are left out, the values that they have in configs
    (``configs/_base_/gplq.py``). After an error the model is what it was before.

    Args:
        model: Any module whose attentions are of a known family; in eval mode afterwards.
        calibration: Loader of training images in the pipeline of evaluation, or
            ``dict(loader=..., num_images=...)``. The first images count: 128 for the activations,
            ``weight_ptq.num_images`` for the weights, 1024 for the basis of the mimic loss; the
            loader is read once. A batch is a tensor, a pair of images and labels, a dict (of the
            names of the forward's arguments; of OpenMMLab's ``inputs`` and ``data_samples``, which
            go through the model's data preprocessor), or the arguments of the forward. Defaults to
            the loader of ``train``.
        train: ``dict(loader=..., epochs=1)`` trains Stage 1 first, with a float copy of the model
            as the teacher. The loader yields batches as before; labels are optional. Further keys:
            ``max_iters``; ``optim_wrapper``, merged into the default; ``loss``, a callable
            ``loss(output, batch)`` in place of cross entropy or the model's own loss; ``mimic``,
            ``distill``, ``block_mimic``, ``task_weight``, ``feature_layer``, ``teacher_dtype``,
            ``train_weights``, ``saved_bytes`` and ``gradient_checkpointing`` of
            :class:`gplq_mm.models.GPLQ`; ``weight_tuning`` of
            :class:`gplq_mm.engine.GPLQTrainLoop`.
        policy: Arguments of :class:`gplq_mm.quant.QuantPolicy`, the name of a preset, or one.
        weight_ptq: ``dict(type=..., num_images=...)`` with the options of a PTQ method, or the
            name of one.
        compensation: ``'QwT'``, ``'QwTv2'``, a dict with such a type and options, or None.
        forward: ``forward(model, batch)`` where the model is to be called in another way.
        seed: Of the random numbers in training.
        device: Where to compute, and where the model is afterwards. Defaults to where it is.

    Returns:
        The model. ``model.gplq_report`` says what became of it. Where code of the model multiplies
        in float and no family knows it, ``unknown`` of the report names the modules, and a warning
        says so.

    Raises:
        PolicyError: For a policy that does not fit, or layers that cannot be quantized.
        SettingError: For any other setting that cannot be used.
        DataError: For a loader without images or with fewer in a later epoch, or images that are
            not finite.
    """
    steps = Quantization(model, calibration, train, policy, weight_ptq, compensation, forward, seed)
    before = next((parameter.device for parameter in model.parameters()), None)
    try:
        if device is not None:
            model.to(device)
        steps.run()
    except BaseException:
        if device is not None:
            model.to(before)
        raise
    return model


def convert(model: nn.Module) -> nn.Module:
    """Packed copy of a quantized model, which computes with 4-bit integers.

    Args:
        model: Of :func:`quantize_`. Stays as it is.

    Raises:
        DeployError: If nothing is quantized, or a layer cannot be packed.
    """
    return deploy.convert(model)


def save(model: nn.Module, path: str | os.PathLike) -> SizeReport:
    """Writes a packed model into one file, of plain tensors and plain data.

    The file says how to build a model of timm or transformers, and one that OpenMMLab's inference
    APIs have built (``model.cfg``). Any other model is given to :func:`load`.

    Args:
        model: Of :func:`convert`, or of :func:`quantize_`.
        path: The file, ``.safetensors``.

    Returns:
        The sizes.

    Raises:
        DeployError: If nothing is quantized, or a layer cannot be packed.
        OSError: If the file cannot be written.
    """
    # mmdet's names, and mmpretrain's.
    cfg = getattr(model, 'cfg', getattr(model, '_config', None))
    origin = getattr(model, 'deploy_header', {})
    if isinstance(cfg, Config | Mapping) and 'model' in cfg:
        meta = getattr(model, 'dataset_meta', getattr(model, '_dataset_meta', None))
        return deploy.save(model, cfg, path, meta, origin.get('accuracy'))
    report = getattr(model, 'gplq_report', None)
    scope, data = getattr(report, 'library', None) or ('', {})
    header = {
        'architecture': deploy.encode(data) if scope else origin.get('architecture', {}),
        'scope': scope or origin.get('scope', ''),
        'test_pipeline': None,
        'dataset_meta': {},
        'policy': deploy.encode(report.policy) if report else origin.get('policy', {}),
        'accuracy': {},
    }
    return write_model(model, header, path)


def load(
    path: str | os.PathLike,
    model: nn.Module | None = None,
    device: str | torch.device = 'cpu',
) -> nn.Module:
    """Reads a packed model. Nothing is unpickled or fetched.

    Args:
        path: File of :func:`save` or of ``tools/deploy.py``.
        model: A float model of the same architecture, where the file does not say how to build
            it. It is filled, and returned.
        device: Where to.

    Returns:
        The packed model in eval mode.

    Raises:
        DeployError: For a file that cannot be used, or that needs ``model``.
    """
    return deploy.load(path, device, model)


def coverage(
    model: nn.Module, images: Any, forward: Callable[[nn.Module, Any], Any] | None = None
) -> Coverage:
    """What share of the multiply-adds runs at which width, and what is in float, by module.

    Args:
        model: Float, quantized or packed.
        images: A batch as in :func:`quantize_`.
        forward: As in :func:`quantize_`.

    Returns:
        Prints as a table; ``to_dict()`` is plain data.
    """
    return measure_coverage(model, lambda: (forward or run_on)(model, prepare(model, images)))
