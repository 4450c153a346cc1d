"""In memory: the deployed model computes what the simulated one computes."""

import copy

import pytest
import torch
from builders import VIT_BACKBONE, build_quantized, calibrated, images, randomize, vit_cfg
from packed_models import (
    MMDET_SWIN,
    assert_close_but_for_flips,
    fill_compensations,
    quantized_classifier,
)
from torch import nn

from gplq_mm.deploy import DeployError, convert
from gplq_mm.deploy.verify import compare
from gplq_mm.layers import Int4WeightLayer, QuantAttention, quant_layers
from gplq_mm.models import GPLQ, QuantBackbone, Stage
from gplq_mm.ptq import RoundToNearest, quantize_weights

FAST = dict(activation=dict(observer='minmax'), weight=dict(observer='minmax'))
KINDS = ('vit', 'swin', 'resnet')


@pytest.fixture(scope='module')
def models():
    torch.manual_seed(0)
    made = {kind: quantized_classifier(kind, compensation=dict(type='QwT')) for kind in KINDS}
    assert all(fill_compensations(model) for model in made.values())
    return made


@pytest.mark.parametrize('kind', KINDS)
def test_integers_are_equal_and_outputs_close(models, kind):
    simulated = models[kind]
    deployed = convert(simulated)
    agreement = compare(simulated, deployed, lambda model: model(images(4, seed=7)))
    assert agreement.layers == len(quant_layers(simulated))
    assert agreement.unequal == []
    assert agreement.relative_error < 1e-4
    assert agreement.max_output > 0.1


def test_a_changed_integer_is_noticed(models):
    """The comparison can fail: one code of one layer."""
    deployed = convert(models['vit'])
    layer = deployed.backbone.layers[1].attn.proj
    layer.weight[0, 3, 0] ^= 1
    agreement = compare(models['vit'], deployed, lambda model: model(images(4, seed=7)))
    assert agreement.unequal == ['backbone.layers.1.attn.proj']


@pytest.mark.parametrize('kind', KINDS)
def test_what_is_left(models, kind):
    simulated = models[kind]
    before = {key: value.clone() for key, value in simulated.state_dict().items()}
    deployed = convert(simulated)
    assert not deployed.training
    assert not any(parameter.requires_grad for parameter in deployed.parameters())
    assert not quant_layers(deployed)
    assert not any(isinstance(module, QuantAttention) for module in deployed.modules())
    report = deployed.deploy_report
    assert report.layers == list(quant_layers(simulated))
    assert report.simulated == {}
    assert f'{len(report.layers)} layers packed' in str(report)
    # The simulated model stays what it was.
    after = simulated.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize('kind', KINDS)
def test_copies_and_states(models, kind):
    deployed = convert(models[kind])
    x = images(2)
    expected = deployed(x)
    clone = copy.deepcopy(deployed)
    assert torch.equal(clone(x), expected)
    for name, buffer in clone.named_buffers():
        if name.endswith('.row_scale'):
            buffer.zero_()
    assert not torch.equal(clone(x), expected)
    assert torch.equal(deployed(x), expected)
    clone.load_state_dict(deployed.state_dict())
    assert torch.equal(clone(x), expected)
    assert torch.equal(deployed.to('cpu').to(torch.device('cpu'))(x), expected)


def reachable_tensors(value, seen=None):
    """Every tensor that an object holds, also where ``state_dict`` and ``to`` do not look."""
    seen = {} if seen is None else seen
    if id(value) in seen:
        return
    # Kept, so that the id is not given to another object.
    seen[id(value)] = value
    if torch.is_tensor(value):
        yield value
        children = []
    elif isinstance(value, dict):
        children = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set):
        children = value
    else:
        children = [getattr(value, '__dict__', {}), getattr(value, '__self__', None)]
    for child in children:
        yield from reachable_tensors(child, seen)


@pytest.mark.parametrize('kind', KINDS)
def test_no_float_weight_stays_in_memory(models, kind):
    simulated = models[kind]
    deployed = convert(simulated)
    own = {tensor.data_ptr(): tensor for tensor in (*deployed.parameters(), *deployed.buffers())}
    held = list(reachable_tensors(deployed))
    hidden = [tensor for tensor in held if tensor.numel() and tensor.data_ptr() not in own]
    # What is beside the state: Swin's masks and indices, none of them as large as a weight.
    assert len(held) >= len(own)
    shapes = {layer.weight.shape for layer in quant_layers(simulated).values()}
    assert not [tensor.shape for tensor in hidden if tensor.shape in shapes]
    bytes_of = [
        sum(t.untyped_storage().nbytes() for t in tensors) for tensors in (hidden, own.values())
    ]
    assert bytes_of[0] < 0.05 * bytes_of[1]


def test_a_weight_that_stays_in_memory_is_noticed(models):
    deployed = convert(models['vit'])
    before = len(list(reachable_tensors(deployed)))
    deployed.backbone.layers[0].__dict__['kept'] = [nn.Linear(8, 8)]
    assert len(list(reachable_tensors(deployed))) == before + 2


def test_attention_that_stays_simulated_is_reported():
    policy = dict(exclude=[r'layers\.1\.attn\.probs'])
    simulated = quantized_classifier('vit', policy)
    deployed = convert(simulated)
    report = deployed.deploy_report
    assert report.attention == ['backbone.layers.0.attn']
    assert report.simulated == {'backbone.layers.1.attn': 'probs is not quantized'}
    assert 'probs is not quantized' in str(report)
    agreement = compare(simulated, deployed, lambda model: model(images(4, seed=7)))
    assert agreement.unequal == []
    assert agreement.relative_error < 1e-4


def gplq_model(stage: Stage) -> GPLQ:
    model = GPLQ(vit_cfg(), teacher=False, mimic=None, policy=FAST)
    randomize(model.architecture)
    if stage >= Stage.CALIBRATED:
        calibrated(model.architecture, images(4, seed=1))
        model.advance(Stage.CALIBRATED)
    if stage >= Stage.WEIGHT_PTQ:
        with torch.no_grad():
            quantize_weights(model.architecture, [images()], model.architecture, RoundToNearest())
        model.advance(Stage.WEIGHT_PTQ)
    return model


def test_gplq_wrapper_is_taken_off():
    model = gplq_model(Stage.WEIGHT_PTQ)
    deployed = convert(model)
    assert type(deployed) is type(model.architecture)
    x = images(3)
    with torch.no_grad():
        assert_close_but_for_flips(deployed(x), model(x))


@pytest.mark.parametrize('stage', [Stage.FLOAT, Stage.CALIBRATED])
def test_before_stage_2(stage):
    with pytest.raises(DeployError, match=rf'{stage.name}.*Stage 2'):
        convert(gplq_model(stage))


def test_before_stage_2_without_the_wrapper():
    with pytest.raises(DeployError, match='not quantized yet'):
        convert(build_quantized('vit', FAST))


def test_raw_layout():
    with pytest.raises(DeployError, match='layout "raw"'):
        convert(quantized_classifier('vit', dict(preset='paper')))


def test_float_group_scales():
    policy = dict(weight=dict(group_scale='float'))
    with pytest.raises(DeployError, match=r'backbone\.\S+: float group scales.*"integer"'):
        convert(quantized_classifier('vit', policy))


def test_not_a_quantized_model(models):
    with pytest.raises(DeployError, match='no quantized layers'):
        convert(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(DeployError, match='deployed already'):
        convert(convert(models['vit']))


@pytest.mark.parametrize(
    ('backbone', 'size'), [(MMDET_SWIN, (32, 32)), (MMDET_SWIN, (44, 37)), (VIT_BACKBONE, (32, 32))]
)
def test_quant_backbone_is_taken_off(backbone, size):
    """mmdet's own copy of Swin, also where its maps need padding."""
    torch.manual_seed(0)
    backbone = copy.deepcopy(backbone)
    wrapped = QuantBackbone(backbone, policy=FAST)
    randomize(wrapped)
    calibrated(wrapped, images(8, seed=1))
    with torch.no_grad():
        quantize_weights(wrapped, [images(8, seed=1)], wrapped, RoundToNearest())
    holder = nn.ModuleDict({'backbone': wrapped})
    deployed = convert(holder)['backbone']
    assert type(deployed).__name__ == type(wrapped.backbone).__name__
    assert any(isinstance(module, Int4WeightLayer) for module in deployed.modules())
    x = nn.functional.interpolate(images(2, seed=3), size)
    with torch.no_grad():
        for found, expected in zip(deployed(x), wrapped(x), strict=True):
            assert_close_but_for_flips(found, expected)


@torch.no_grad()
def test_a_backbone_alone():
    """mmpretrain's return nothing from train() and eval()."""
    wrapped = QuantBackbone(copy.deepcopy(VIT_BACKBONE), policy=FAST)
    randomize(wrapped)
    calibrated(wrapped, images(8, seed=1))
    quantize_weights(wrapped, [images(8, seed=1)], wrapped, RoundToNearest())
    deployed = convert(wrapped)
    assert not deployed.training
    agreement = compare(wrapped, deployed, lambda model: model(images(4, seed=7)))
    assert agreement.unequal == []
    assert agreement.relative_error < 1e-4
