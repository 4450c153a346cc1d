"""Optimizer groups of Stage 1, and bf16."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from tiny_runs import gplq_config

from gplq_mm.layers import act_quantizers
from gplq_mm.registry import MODELS


@pytest.fixture
def model():
    init_default_scope('mmpretrain')
    cfg = gplq_config('unused', 'unused')
    return MODELS.build({**cfg.model, 'data_preprocessor': cfg.data_preprocessor})


def optimizer_of(model, **options):
    cfg = dict(
        type='OptimWrapper',
        constructor='gplq_mm.GPLQOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=1e-5, weight_decay=0.1),
        quantizer=dict(lr=1e-2, weight_decay=0.0),
    )
    return build_optim_wrapper(model, {**cfg, **options}).optimizer


def settings(optimizer, model) -> dict[str, dict]:
    """Settings of every parameter by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group['params']}


def test_every_parameter_once(model):
    optimizer = optimizer_of(model)
    count = sum(len(group['params']) for group in optimizer.param_groups)
    assert count == len(list(model.parameters()))


def test_rates_of_weights_and_quantizers(model):
    learned = {id(p) for q in act_quantizers(model).values() for p in q.parameters()}
    parameters = dict(model.named_parameters())
    for name, group in settings(optimizer_of(model), model).items():
        wanted = (1e-2, 0.0) if id(parameters[name]) in learned else (1e-5, 0.1)
        assert (group['lr'], group['weight_decay']) == wanted, name


def test_settings_of_weights_by_name(model):
    paramwise = dict(norm_decay_mult=0.0, custom_keys={'cls_token': dict(lr_mult=0.5)})
    found = settings(optimizer_of(model, paramwise_cfg=paramwise), model)
    assert found['architecture.backbone.cls_token']['lr'] == 0.5e-5
    assert found['architecture.backbone.layers.0.ln1.weight']['weight_decay'] == 0.0
    assert {g['lr'] for name, g in found.items() if name.endswith('scale')} == {1e-2}


def test_without_own_settings_quantizers_learn_like_weights(model):
    found = settings(optimizer_of(model, quantizer={}), model)
    assert {group['lr'] for group in found.values()} == {1e-5}


def test_config_is_not_changed(model):
    cfg = dict(
        type='OptimWrapper',
        constructor='gplq_mm.GPLQOptimWrapperConstructor',
        optimizer=dict(type='SGD', lr=1.0),
        quantizer=dict(lr=2.0),
    )
    build_optim_wrapper(model, cfg)
    assert cfg['quantizer'] == dict(lr=2.0)


def test_bf16_computes_in_bf16_and_updates_in_fp32():
    linear = torch.nn.Linear(4, 4)
    optimizer = dict(type='SGD', lr=0.1)
    wrapper = build_optim_wrapper(
        linear, dict(type='gplq_mm.Bf16OptimWrapper', optimizer=optimizer)
    )
    before = linear.weight.detach().clone()
    with wrapper.optim_context(linear):
        output = linear(torch.ones(2, 4))
    assert output.dtype == torch.bfloat16
    wrapper.update_params(output.float().sum())
    assert linear.weight.dtype == torch.float32
    assert not torch.equal(linear.weight, before)
    assert linear(torch.ones(2, 4)).dtype == torch.float32


def test_parameters_of_one_setting_are_one_group(model):
    groups = optimizer_of(model).param_groups
    assert [group['lr'] for group in groups] == [1e-5, 1e-2]
    by_name = dict(paramwise_cfg=dict(custom_keys={'cls_token': dict(lr_mult=0.5)}))
    assert sorted(g['lr'] for g in optimizer_of(model, **by_name).param_groups) == [
        0.5e-5,
        1e-5,
        1e-2,
    ]
