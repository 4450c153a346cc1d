"""What a user could run instead of the packed model, each at its best setting we know.

A peer is made from the float model and one batch, with a fixed shape and a number of threads, and
becomes a call that returns the output as a numpy array or a tensor. The packages are imported
only here and only when asked for.
"""

import copy
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ['PACKAGES', 'PEERS', 'PeerUnavailable', 'build_peer']

# Distributions to note with a measurement.
PACKAGES = ('torch', 'onnx', 'onnxscript', 'onnxruntime', 'openvino', 'nncf')


class PeerUnavailable(RuntimeError):
    """A peer that cannot run here; the message says what to do about it."""


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise PeerUnavailable(
            f'{", ".join(missing)} not installed; run `pip install ".[bench]"` in the checkout.'
        )


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps back what the exporters and NNCF print, log and warn while they work as intended."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(previous)


def _torch_fp32(model: nn.Module, images: Tensor, threads: int) -> Callable[[], Any]:
    return _eager(model, images)


def _torch_bf16(model: nn.Module, images: Tensor, threads: int) -> Callable[[], Any]:
    # Autocast alone is slower: it casts the weights in every call. Weights that are bf16 already
    # alone fail where a model makes float32 constants in its forward (Swin's masks).
    call = _eager(copy.deepcopy(model).bfloat16(), images.bfloat16())

    def cast() -> Tensor:
        with torch.autocast('cpu', torch.bfloat16):
            return call()

    return cast


def _eager(model: nn.Module, images: Tensor) -> Callable[[], Any]:
    @torch.inference_mode()
    def call() -> Tensor:
        return model(images)

    return call


@contextmanager
def _float_onnx(model: nn.Module, images: Tensor) -> Iterator[Path]:
    """Folder with ``float.onnx``, of the fixed shape of ``images``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'float.onnx'
        torch.onnx.export(
            model,
            (images,),
            path,
            input_names=['images'],
            output_names=['output'],
            external_data=False,
            verbose=False,
        )
        yield path


def _onnxruntime_int8(model: nn.Module, images: Tensor, threads: int) -> Callable[[], Any]:
    _require('onnx', 'onnxscript', 'onnxruntime')
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Warnings about the model of others; errors are raised anyway.
    options.log_severity_level = 3
    with _float_onnx(model, images) as path:
        target = path.with_name('int8.onnx')
        # An integer convolution is slower than the float one.
        quantize_dynamic(
            path, target, op_types_to_quantize=['MatMul', 'Gemm'], weight_type=QuantType.QInt8
        )
        session = onnxruntime.InferenceSession(target, options, providers=['CPUExecutionProvider'])
    feed = {'images': images.numpy()}
    return lambda: session.run(None, feed)[0]


def _openvino(model: Any, images: Tensor, threads: int, options: dict) -> Callable[[], Any]:
    import openvino

    compiled = openvino.Core().compile_model(
        model,
        'CPU',
        {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_NUM_THREADS': threads, **options},
    )
    request, feed = compiled.create_infer_request(), {0: images.numpy()}
    return lambda: request.infer(feed, share_inputs=True, share_outputs=True)[0]


def _openvino_float(model: nn.Module, images: Tensor) -> Any:
    import openvino

    with _float_onnx(model, images) as path:
        return openvino.Core().read_model(path)


def _openvino_bf16(model: nn.Module, images: Tensor, threads: int) -> Callable[[], Any]:
    _require('onnx', 'onnxscript', 'openvino')
    import openvino

    if 'BF16' not in openvino.Core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES'):
        raise PeerUnavailable('OpenVINO does not compute in bf16 on this CPU.')
    converted = _openvino_float(model, images)
    return _openvino(converted, images, threads, {'INFERENCE_PRECISION_HINT': 'bf16'})


def _openvino_int8(model: nn.Module, images: Tensor, threads: int) -> Callable[[], Any]:
    _require('onnx', 'onnxscript', 'openvino', 'nncf')
    import nncf

    # Speed does not depend on the images that the scales come from.
    quantized = nncf.quantize(
        _openvino_float(model, images),
        nncf.Dataset([images.numpy()]),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=1,
    )
    # The parts that stay in float run in OpenVINO's own choice, bf16 where the CPU has it.
    return _openvino(quantized, images, threads, {})


PEERS: dict[str, Callable[[nn.Module, Tensor, int], Callable[[], Any]]] = {
    'torch_fp32': _torch_fp32,
    'torch_bf16': _torch_bf16,
    'onnxruntime_int8': _onnxruntime_int8,
    'openvino_bf16': _openvino_bf16,
    'openvino_int8': _openvino_int8,
}


def build_peer(name: str, model: nn.Module, images: Tensor, threads: int) -> Callable[[], Any]:
    """A peer, ready to be timed.

    Args:
        name: One of :data:`PEERS`.
        model: Float model in eval mode; stays as it is.
        images: float32 batch; the peer runs on exactly this one.
        threads: Threads of engines that keep their own. torch's are set with
            ``torch.set_num_threads``.

    Returns:
        A call without arguments that returns the output.

    Raises:
        PeerUnavailable: If a package is missing or the CPU lacks what the peer needs.
        KeyError: For an unknown name.
    """
    build = PEERS[name]
    with _silence(), torch.no_grad():
        call = build(model, images, threads)
    call()
    return call
