"""What is logged about the activation quantizers while they learn."""

import math

import pytest
import torch
from tiny_runs import gplq_config, run, scalars_of

from gplq_mm.evaluation import quantizer_statistics, quantizer_sums
from gplq_mm.layers import act_quantizers
from gplq_mm.quant import QuantState


@pytest.fixture(scope='module')
def run_dir(tmp_path_factory, float_checkpoints):
    work_dir = tmp_path_factory.mktemp('stats')
    cfg = gplq_config(work_dir, float_checkpoints['vit'], train_cfg__max_epochs=1)
    cfg.custom_hooks[2].interval = 2
    runner = run(cfg)
    return work_dir, runner


def test_log_has_clip_rate_scale_and_sqnr(run_dir):
    lines = [line for line in scalars_of(run_dir[0]) if 'quant_clip_rate' in line]
    assert lines
    for line in lines:
        assert 0 <= line['quant_clip_rate'] < 0.5
        assert line['quant_scale'] > 0
        assert 0 < line['quant_sqnr_db'] < 60


def test_log_has_every_layer_at_the_interval(run_dir):
    key = 'quant/backbone.layers.0.attn.qkv.act_quantizer/sqnr_db'
    steps = [line['step'] for line in scalars_of(run_dir[0]) if key in line]
    assert steps == [1, 3, 5]


def test_no_hooks_are_left_behind(run_dir):
    for quantizer in act_quantizers(run_dir[1].model).values():
        assert not quantizer._forward_hooks


def test_numbers(run_dir):
    quantizer = next(
        q
        for q in act_quantizers(run_dir[1].model).values()
        if q.spec.format == 'integer' and q.scale.numel() == q.scale.shape[-1]
    )
    assert quantizer.state == QuantState.FROZEN
    scale, offset = quantizer.grid()
    middle = scale * 3 + (0.0 if offset is None else offset)
    on_grid = middle.reshape(1, 1, -1).expand(1, 2, -1).clone()
    exact = quantizer_statistics(quantizer, quantizer_sums(quantizer, on_grid, on_grid))
    assert exact['clip_rate'] == 0
    assert exact['scale'] == pytest.approx(float(scale.mean()))
    far = on_grid.clone()
    far[0, 1] += 1000 * scale.flatten()
    found = quantizer_statistics(quantizer, quantizer_sums(quantizer, far, on_grid))
    assert found['clip_rate'] == 0.5
    noise, signal = (far - on_grid).square().mean(), far.square().mean()
    assert found['sqnr_db'] == pytest.approx(10 * math.log10(signal / noise), rel=1e-4)
    assert torch.isfinite(torch.tensor(exact['sqnr_db']))
