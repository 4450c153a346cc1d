"""What a user could run instead of the packed model, each at its best setting we know.

A peer is made from the float model and one batch, for this shape and the number of threads that
torch has, and becomes a call that returns the output as a numpy array or a tensor. The packages
are imported only here and only when asked for.
"""

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor, nn

from .timing import Call, bound

# Distributions to note with a measurement.
PACKAGES = ('torch', 'triton', 'onnx', 'onnxscript', 'onnxruntime', 'openvino', 'nncf')


class PeerUnavailable(RuntimeError):
    """A peer that cannot run here; the message says what to do about it."""


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


def _torch_bf16(model: nn.Module, images: Tensor) -> Call:
    # Autocast alone is slower: it casts the weights in every call. Weights that are bf16 already
    # alone fail where a model makes float32 constants in its forward (Swin's masks).
    call = bound(copy.deepcopy(model).bfloat16(), images.bfloat16())
    return torch.autocast('cpu', torch.bfloat16)(call)


@contextmanager
def _float_onnx(model: nn.Module, images: Tensor) -> Iterator[Path]:
    """``float.onnx`` in a folder of its own, of the fixed shape of ``images``."""
    names = dict(input_names=['images'], output_names=['output'])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'float.onnx'
        torch.onnx.export(model, (images,), path, external_data=False, verbose=False, **names)
        yield path


def _onnxruntime_int8(model: nn.Module, images: Tensor) -> Call:
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    # Warnings about the model of others; errors are raised anyway.
    options.log_severity_level = 3
    # An integer convolution is slower than the float one.
    types = dict(op_types_to_quantize=['MatMul', 'Gemm'], weight_type=QuantType.QInt8)
    # Without VNNI a sum of two products saturates in 16 bits unless weights have 7.
    types['reduce_range'] = not torch.cpu._is_vnni_supported()
    with _float_onnx(model, images) as path:
        target = path.with_name('int8.onnx')
        quantize_dynamic(path, target, **types)
        session = onnxruntime.InferenceSession(target, options, providers=['CPUExecutionProvider'])
    feed = {'images': images.numpy()}
    return lambda: session.run(None, feed)[0]


def _openvino(model: nn.Module, images: Tensor, int8: bool) -> Call:
    import openvino

    core = openvino.Core()
    options = {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_NUM_THREADS': torch.get_num_threads()}
    if not int8:
        if 'BF16' not in core.get_property('CPU', 'OPTIMIZATION_CAPABILITIES'):
            raise PeerUnavailable('OpenVINO does not compute in bf16 on this CPU.')
        options['INFERENCE_PRECISION_HINT'] = 'bf16'
    with _float_onnx(model, images) as path:
        network = core.read_model(path)
    if int8:
        import nncf

        # Speed does not depend on the images that the scales come from. The parts that stay in
        # float run in OpenVINO's own choice, bf16 where the CPU has it.
        data, kind = nncf.Dataset([images.numpy()]), nncf.ModelType.TRANSFORMER
        network = nncf.quantize(network, data, model_type=kind, subset_size=1)
    request = core.compile_model(network, 'CPU', options).create_infer_request()
    feed = {0: images.numpy()}
    return lambda: request.infer(feed, share_inputs=True, share_outputs=True)[0]


PEERS: dict[str, Callable[[nn.Module, Tensor], Call]] = {
    'torch_fp32': bound,
    'torch_bf16': _torch_bf16,
    'onnxruntime_int8': _onnxruntime_int8,
    'openvino_bf16': lambda model, images: _openvino(model, images, int8=False),
    'openvino_int8': lambda model, images: _openvino(model, images, int8=True),
}


def build_peer(name: str, model: nn.Module, images: Tensor) -> Call:
    """A peer, ready to be timed.

    Args:
        name: One of :data:`PEERS`.
        model: Float model in eval mode; stays as it is.
        images: float32 batch; the peer runs on exactly this one.

    Raises:
        PeerUnavailable: If a package is missing or the CPU lacks what the peer needs.
        KeyError: For an unknown name.
    """
    build = PEERS[name]
    try:
        with _silence(), torch.no_grad():
            call = build(model, images)
    except ImportError as error:
        raise PeerUnavailable(
            f'{error.name} not installed; run `pip install ".[bench]"` in the checkout.'
        ) from error
    call()
    return call
