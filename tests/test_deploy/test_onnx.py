"""An ONNX file, run by ONNX Runtime, gives what the simulated model gives."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import images
from mmengine.dataset import default_collate
from mmengine.registry import DATASETS, DefaultScope
from packed_models import (
    LEVELS_POLICY,
    assert_close_but_for_flips,
    fill_compensations,
    quantized_classifier,
    run_config,
)
from tiny_runs import gplq_config, load_tool, read_summary
from torch import nn

from gplq_mm.checkpoint import read_checkpoint
from gplq_mm.deploy import DeployError, convert, save
from gplq_mm.deploy.targets.onnx import OPSET, export_onnx

MISSING = [n for n in ('onnx', 'onnxscript', 'onnxruntime') if importlib.util.find_spec(n) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f'not installed: {", ".join(MISSING)}')

SHAPE = (3, 32, 32)
GROUPS = dict(weight=dict(group_size=16))


def run(path: Path, x: torch.Tensor) -> torch.Tensor:
    """Output of ONNX Runtime with its default options, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    (output,) = session.run(None, {'images': x.numpy()})
    return torch.from_numpy(output)


def export(model: nn.Module, path: Path, shape: tuple = SHAPE, batch: int | None = None) -> Path:
    export_onnx(convert(model), path / 'model.onnx', shape, batch)
    return path / 'model.onnx'


@torch.no_grad()
def assert_same(path: Path, model: nn.Module, x: torch.Tensor) -> None:
    # The integers are the same; LayerNorm and softmax round differently, which could move a
    # value at a border to the next code, but does not on these inputs.
    assert_close_but_for_flips(run(path, x), model(x))


def tensors(path: Path) -> dict:
    """Names of types -> shapes of the initializers of that type."""
    import onnx

    found: dict[str, list] = {}
    for tensor in onnx.load(path).graph.initializer:
        name = onnx.TensorProto.DataType.Name(tensor.data_type)
        found.setdefault(name, []).append(tuple(tensor.dims))
    return found


@pytest.fixture(scope='module')
def vit(tmp_path_factory) -> tuple[nn.Module, Path]:
    """A ViT with a compensation and its file; groups of 16, so that columns are reordered."""
    torch.manual_seed(0)
    model = quantized_classifier('vit', GROUPS, dict(type='QwT'))
    fill_compensations(model)
    model.data_preprocessor.register_buffer('mean', torch.tensor([1.0, 2.0, 3.0]))
    return model, export(model, tmp_path_factory.mktemp('onnx'))


def test_same_output_for_any_batch(vit):
    model, path = vit
    for batch in (1, 4, 7):
        assert_same(path, model, images(batch, seed=batch))


def test_convolutions(tmp_path):
    model = quantized_classifier('resnet', GROUPS)
    path = export(model, tmp_path)
    for batch in (1, 4):
        assert_same(path, model, images(batch, seed=batch))


@pytest.mark.parametrize(
    'policy',
    [
        # Signed activation codes, and a last group of 8 columns.
        dict(activation=dict(zero_point='none'), weight=dict(group_size=24)),
        # Fewer codes than a 4-bit tensor holds, and integer zero-points with a correction.
        dict(activation=dict(bits=3, zero_point='integer'), weight=dict(bits=3)),
        # Bytes on both sides; a plain softmax.
        dict(
            activation=dict(bits=8),
            weight=dict(bits=6, group_size=16),
            probs=dict(row_relative=False),
        ),
        dict(activation=dict(bits=8), weight=dict(bits=4, group_size=16)),
        # An attention without a packed form: it stays arithmetic on rounded values.
        dict(probs=dict(format='log_sqrt2', row_relative=False)),
        # Levels of a tensor, and of each head.
        LEVELS_POLICY,
    ],
    ids=['symmetric', 'W3A3', 'W6A8', 'W4A8', 'simulated', 'levels'],
)
def test_same_output_for_any_grid(tmp_path, policy):
    model = quantized_classifier('vit', policy)
    assert_same(export(model, tmp_path, batch=3), model, images(3))


def test_padded_and_shifted_windows(tmp_path):
    model = quantized_classifier('swin', GROUPS)
    path = export(model, tmp_path, (3, 40, 40))
    for batch in (1, 3):
        assert_same(path, model, torch.randn(batch, 3, 40, 40))


def test_weights_are_int4(vit):
    types = tensors(vit[1])
    # Four layers in each of two blocks; patch embedding and head stay at 8 bits.
    assert sorted(types['INT4']) == sorted([(32, 96), (32, 32), (32, 64), (64, 32)] * 2)
    assert sorted(types['INT8']) == [(32, 5), (32, 192)]
    assert 'UINT4' in types
    assert not [shape for shape in types['FLOAT'] if np.prod(shape) > 32 * 32]


def test_what_a_reader_needs_is_in_the_file(vit):
    import onnx

    proto = onnx.load(vit[1])
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import] == [('', OPSET)]
    (images_in,), (out,) = proto.graph.input, proto.graph.output
    dims = [d.dim_param or d.dim_value for d in images_in.type.tensor_type.shape.dim]
    assert (images_in.name, dims) == ('images', ['batch', 3, 32, 32])
    dims = [d.dim_param or d.dim_value for d in out.type.tensor_type.shape.dim]
    assert (out.name, dims) == ('output', ['batch', 5])
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(metadata['mean']) == [1.0, 2.0, 3.0]
    assert json.loads(metadata['to_rgb']) is False


def test_operation_without_onnx_form_is_one_error(tmp_path):
    model = convert(quantized_classifier('vit'))

    @torch.library.custom_op('gplq_mm_test::identity', mutates_args=())
    def identity(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    identity.register_fake(torch.empty_like)
    model.register_forward_hook(lambda _module, _args, out: identity(out))
    with pytest.raises(DeployError, match=r'no ONNX form.*gplq_mm_test'):
        export_onnx(model, tmp_path / 'model.onnx', SHAPE)
    assert not list(tmp_path.iterdir())


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(DeployError, match=r'needs onnxscript.*pip install'):
        export(quantized_classifier('vit'), tmp_path)


def test_tool_exports_a_packed_file(tmp_path, capsys):
    model = quantized_classifier('vit')
    packed, path, program = (tmp_path / name for name in ('m.safetensors', 'm.onnx', 'm.pt2'))
    save(model, run_config('vit'), packed)
    tool = load_tool('export')
    tool.main([str(packed), '--onnx', str(path), '--program', str(program)])
    assert capsys.readouterr().out.count('any number of images of 3x32x32') == 2
    assert_same(path, model, images(2))
    with torch.no_grad():
        loaded = torch.export.load(program).module()
        assert_close_but_for_flips(loaded(images(2)), model(images(2)))


@pytest.mark.parametrize('arch', ['vit', pytest.param('swin', marks=pytest.mark.slow)])
@torch.no_grad()
def test_accuracy_of_a_run(tmp_path, undisturbed, arch):
    """ONNX Runtime and the simulation classify the validation digits of a run alike."""
    checkpoint = undisturbed[arch] / 'w4a4.pth'
    cfg = gplq_config(tmp_path, tmp_path / 'gone.pth', arch)
    simulated = load_tool('deploy').build(cfg, read_checkpoint(checkpoint), str(checkpoint))
    export_onnx(convert(simulated), tmp_path / 'model.onnx', (1, 28, 28))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        dataset = DATASETS.build(cfg.val_dataloader.dataset)
        data = default_collate([dataset[index] for index in range(len(dataset))])
    data = simulated.data_preprocessor(data, False)
    expected = simulated.architecture(data['inputs'])
    output = run(tmp_path / 'model.onnx', data['inputs'])
    labels = torch.cat([sample.gt_label for sample in data['data_samples']])
    top1 = [100 * (o.argmax(1) == labels).float().mean().item() for o in (output, expected)]
    # LayerNorm and softmax round differently, and a value at a border then takes the next code:
    # outputs differ a little, and an image whose two best classes are that close may change.
    error = (output - expected).norm() / expected.norm()
    assert float(error) < 0.05
    assert (output.argmax(1) != expected.argmax(1)).sum() <= 2
    assert top1[0] == pytest.approx(top1[1], abs=2)
    assert top1[1] == pytest.approx(read_summary(undisturbed[arch])['top1']['w4a4'])


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [((), 'nothing to write'), (('--onnx', 'x', '--batch', '0'), 'at least 1')],
)
def test_tool_refuses_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        load_tool('export').parse_args(['model.safetensors', *arguments])
    assert message in capsys.readouterr().err
