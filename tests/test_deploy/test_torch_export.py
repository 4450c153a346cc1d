"""A deployed model under torch.export and torch.compile computes what it computes in eager mode."""

import subprocess
import sys

import pytest
import torch
from builders import build_float, images
from packed_models import fill_compensations, quantized_classifier
from torch import nn

from gplq_mm.deploy import DeployError, convert
from gplq_mm.deploy.targets.torch_export import export_program, save_program

SHAPE = (3, 32, 32)
KINDS = ('vit', 'swin', 'resnet')


@pytest.fixture(scope='module')
def deployed() -> dict[str, nn.Module]:
    """Deployed models by kind; groups of 16, so that columns are really reordered."""
    torch.manual_seed(0)
    policy = dict(weight=dict(group_size=16))
    return {kind: convert(quantized_classifier(kind, policy)) for kind in KINDS}


@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_program_of_any_batch(deployed, kind):
    program = export_program(deployed[kind], SHAPE).module()
    for batch in (1, 2, 5):
        torch.testing.assert_close(program(images(batch)), deployed[kind](images(batch)))


@torch.no_grad()
def test_padded_and_shifted_windows(deployed):
    """40 pixels are 10 tokens a side, in windows of 4: every window map has padding."""
    shape = (3, 40, 40)
    program = export_program(deployed['swin'], shape).module()
    for batch in (1, 3):
        x = torch.randn(batch, *shape)
        torch.testing.assert_close(program(x), deployed['swin'](x))


@torch.no_grad()
def test_compensation_is_part_of_the_program():
    model = quantized_classifier('vit', compensation=dict(type='QwT'))
    assert fill_compensations(model) == 2
    program = export_program(convert(model), SHAPE).module()
    torch.testing.assert_close(program(images()), model(images()))
    for name, module in model.named_modules():
        if name.endswith('compensation'):
            module.enabled = False
    assert not torch.allclose(program(images()), model(images()))


def test_program_keeps_the_packed_ops(deployed):
    program = export_program(deployed['vit'], SHAPE)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {'gplq_mm.int4_mlp.default', 'gplq_mm.int4_attention.default'} <= targets
    packed = [tensor for tensor in program.state_dict.values() if tensor.dtype == torch.uint8]
    assert packed


@torch.no_grad()
def test_fixed_batch(deployed):
    program = export_program(deployed['vit'], SHAPE, batch=3).module()
    torch.testing.assert_close(program(images(3)), deployed['vit'](images(3)))
    with pytest.raises(Exception, match='3'):
        program(images(2))


@torch.no_grad()
def test_archive_is_read_by_another_process(deployed, tmp_path):
    path = tmp_path / 'model.pt2'
    save_program(export_program(deployed['swin'], SHAPE), path)
    torch.save(images(3), tmp_path / 'images.pt')
    code = (
        'import sys, torch, gplq_mm.ops\n'
        'folder = sys.argv[1]\n'
        'program = torch.export.load(folder + "/model.pt2").module()\n'
        'torch.save(program(torch.load(folder + "/images.pt")), folder + "/out.pt")\n'
    )
    subprocess.run([sys.executable, '-c', code, str(tmp_path)], check=True, capture_output=True)
    out = torch.load(tmp_path / 'out.pt')
    torch.testing.assert_close(out, deployed['swin'](images(3)))


def test_float_model_is_refused():
    with pytest.raises(DeployError, match='no packed layers'):
        export_program(build_float('vit'), SHAPE)


def test_images_below_a_window_are_one_error(deployed):
    with pytest.raises(DeployError, match=r'cannot be captured for images of \(3, 8, 8\).*window'):
        export_program(deployed['swin'], (3, 8, 8))


@pytest.mark.parametrize('kind', ['vit', 'swin'])
@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
@torch.no_grad()
def test_compile_without_graph_breaks(deployed, kind, backend):
    torch.compiler.reset()
    compiled = torch.compile(deployed[kind], fullgraph=True, backend=backend)
    for batch in (2, 3):
        torch.testing.assert_close(compiled(images(batch)), deployed[kind](images(batch)))
