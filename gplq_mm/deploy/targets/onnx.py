"""ONNX export of a deployed model (opset 21, int4 tensors); the graph of a layer: :mod:`.onnx_ops`.

ONNX Runtime computes our integers at any optimization level, but dequantizes the weights anew in
every run: the file is for exchange, the speed is in the ops of this package. (Its products of
8-bit layers saturate on CPUs without VNNI.)
"""

import json
import os

import torch
from torch import Tensor, nn

from ...checkpoint import atomic_write
from ...layers import DeployError
from ...version import __version__
from .torch_export import export_program

# The first operator set with 4-bit integers and blocked scales.
OPSET = 21


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike,
    image_shape: tuple[int, int, int] = (3, 224, 224),
    batch: int | None = None,
) -> None:
    """Writes a deployed model as an ONNX file (opset 21, int4 initializers).

    The file's metadata names the preprocessing (``mean``, ``std``, ``to_rgb``), which is not part
    of the graph. Input ``images`` ``(batch, *image_shape)`` float32; ``output`` (``output_0`` ...
    for several) as ``model(images)``.

    Args:
        model: Deployed model.
        path: The file to write; an existing one is replaced at once.
        image_shape: Channels, height and width.
        batch: Fixed number of images. Defaults to any number from 1.

    Raises:
        DeployError: If ``onnx`` and ``onnxscript`` are not installed, the model is not deployed,
            its forward cannot be captured, or it holds an operation without an ONNX form.
        OSError: If the file cannot be written.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch's exporter needs it and would say less)
    except ImportError as error:
        raise DeployError(
            f'ONNX export needs {error.name}: install it with `pip install ".[onnx]"`.'
        ) from error
    from .onnx_ops import Translation

    program = export_program(model, image_shape, batch)
    count = len(program.graph_signature.user_outputs)
    try:
        result = torch.onnx.export(
            program,
            opset_version=OPSET,
            input_names=['images'],
            output_names=['output'] if count == 1 else [f'output_{i}' for i in range(count)],
            custom_translation_table=Translation(program).table(),
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise DeployError(
            f'{type(model).__name__} has no ONNX form: {_innermost(error)}'
        ) from error
    if batch is None:
        result.rename_axes({result.model.graph.inputs[0].shape[0]: 'batch'})
    result.model.metadata_props.update(_metadata(model))
    result.model.producer_name, result.model.producer_version = 'gplq_mm', __version__
    proto = result.model_proto
    onnx.checker.check_model(proto)
    atomic_write(path, lambda file: file.write(proto.SerializeToString()))


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition('\n')[0]


def _metadata(model: nn.Module) -> dict[str, str]:
    preprocessor = getattr(model, 'data_preprocessor', None)
    found = {'gplq_mm': __version__}
    for name in ('mean', 'std'):
        value = getattr(preprocessor, name, None)
        if isinstance(value, Tensor):
            found[name] = json.dumps(value.flatten().tolist())
    to_rgb = getattr(preprocessor, 'to_rgb', getattr(preprocessor, '_channel_conversion', None))
    if to_rgb is not None:
        found['to_rgb'] = json.dumps(bool(to_rgb))
    return found
