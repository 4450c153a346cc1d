"""What a training step costs is counted, not estimated."""

import pytest
import torch
from builders import swin_cfg, vit_cfg
from torch import nn

from gplq_mm.benchmark.train import IMPLS, build_step, saved_megabytes, training_memory

IMAGE = (3, 32, 32)


def test_counts_what_backward_keeps_once():
    layer, x = nn.Linear(1024, 1024, bias=False), torch.randn(256, 1024, requires_grad=True)

    def forward():
        hidden = layer(x).exp()
        return (hidden * hidden).sum()

    # x and the result of exp, which two operations keep; not the weight.
    assert saved_megabytes(forward, layer) == 2.0


@pytest.mark.parametrize('impl', IMPLS)
def test_steps_train(impl):
    step = build_step(impl, vit_cfg(), IMAGE, 4)
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    step()
    moved = [name for name, p in step.model.named_parameters() if not torch.equal(p, before[name])]
    assert any(name.endswith('qkv.weight') for name in moved)
    assert any(name.endswith('.scale') for name in moved) == (impl != 'fp32')


@pytest.mark.parametrize('architecture', [vit_cfg, swin_cfg])
def test_ours_keeps_less_than_float_and_plain_more(architecture):
    kept = {}
    for impl in ('fp32', 'gplq', 'gplq_1byte', 'plain'):
        step = build_step(impl, architecture(), IMAGE, 4)
        kept[impl] = saved_megabytes(step.loss, step.model)
    assert kept['gplq_1byte'] < kept['gplq'] < kept['fp32'] < kept['plain']


def test_memory_is_measured_in_a_process_of_its_own():
    found = training_memory('gplq', vit_cfg(), IMAGE, 8)
    step = build_step('gplq', vit_cfg(), IMAGE, 8)
    assert found['saved_mb'] == pytest.approx(saved_megabytes(step.loss, step.model), rel=0.02)
    # Besides: at least weights, their gradients and two moments of each.
    weights = sum(p.numel() * 4 for p in step.model.parameters()) / 2**20
    assert found['saved_mb'] + 3 * weights < found['peak_mb'] < found['resident_mb']
