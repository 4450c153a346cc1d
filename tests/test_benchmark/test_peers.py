"""Every peer of the benchmark computes the model that it stands for."""

import copy
import sys

import pytest
import torch
from builders import build_float, images

from gplq_mm.benchmark.peers import PEERS, PeerUnavailable, build_peer
from gplq_mm.benchmark.synthetic import synthetic_model
from gplq_mm.layers import Compensation, Int4Linear

# Largest error relative to the output of FP32.
TOLERANCE = {
    'torch_fp32': 0.0,
    'torch_bf16': 0.05,
    'onnxruntime_int8': 0.1,
    'openvino_bf16': 0.05,
    'openvino_int8': 0.1,
}


def relative_error(output, expected: torch.Tensor) -> float:
    output = torch.as_tensor(output).float()
    assert output.shape == expected.shape
    return float((output - expected).norm() / expected.norm())


@pytest.mark.parametrize('name', list(PEERS))
@torch.no_grad()
def test_peer_computes_the_model(name):
    model, batch = build_float('vit'), images(2)
    try:
        call = build_peer(name, model, batch)
    except PeerUnavailable as error:
        pytest.skip(str(error))
    expected = model(batch)
    error = relative_error(call(), expected)
    assert error <= TOLERANCE[name]
    # Reduced precision leaves a trace; its absence would mean that FP32 was measured.
    assert name == 'torch_fp32' or error > 1e-6
    assert torch.equal(torch.as_tensor(call()), torch.as_tensor(call()))


@pytest.mark.parametrize('name', [name for name in PEERS if not name.startswith('torch')])
def test_absent_package_is_named_with_the_mend(name, monkeypatch):
    for package in ('openvino', 'onnxruntime'):
        monkeypatch.setitem(sys.modules, package, None)
    mend = r'(openvino|onnxruntime) not installed; run `pip install "\.\[bench\]"`'
    with pytest.raises(PeerUnavailable, match=mend):
        build_peer(name, build_float('vit'), images(1))


def test_unknown_peer():
    with pytest.raises(KeyError):
        build_peer('tensorrt', build_float('vit'), images(1))


@torch.no_grad()
def test_synthetic_layer_stands_for_the_float_one():
    linear, x = torch.nn.Linear(64, 48), torch.randn(200, 64)
    packed = synthetic_model(torch.nn.Sequential(copy.deepcopy(linear)), x)[0]
    assert isinstance(packed, Int4Linear)
    assert packed.bits == (4, 4)
    assert relative_error(packed(x), linear(x)) < 0.3


@pytest.mark.parametrize(
    ('kind', 'compensation', 'maps'),
    [
        ('vit', 'none', 0),
        ('vit', 'QwT', 2),
        # Of four blocks, two change the resolution with the merging behind them, or not at all.
        ('swin', 'QwTv2', 4),
    ],
)
@torch.no_grad()
def test_synthetic_model_is_deployed(kind, compensation, maps):
    model = synthetic_model(build_float(kind), images(4), compensation)
    assert model.deploy_report.layers
    assert not model.deploy_report.simulated
    assert bool(model(images(3)).isfinite().all())
    fitted = [m for m in model.modules() if isinstance(m, Compensation) and m.is_fitted]
    assert len(fitted) == maps
