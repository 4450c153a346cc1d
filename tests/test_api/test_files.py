"""Packed files of models that no registry builds."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from builders import FAST, build_float, images
from family_cases import SWIN, VIT, lively
from torch import nn

import gplq_mm
from gplq_mm.deploy import DeployError
from gplq_mm.deploy.packed_file import read_file, write_file
from gplq_mm.errors import SettingError
from gplq_mm.families.libraries import build_timm, build_transformers
from gplq_mm.layers import quant_layers

TIMM = dict(num_classes=5, img_size=32)


def timm_model(name: str, **arguments) -> nn.Module:
    import timm

    return timm.create_model(name, **TIMM, **arguments)


SMALL = dict(depth=2, embed_dim=32, num_heads=2, patch_size=8)
MODELS = {
    'vit': lambda _: timm_model('vit_tiny_patch16_224', **SMALL),
    'deit': lambda _: timm_model('deit_tiny_patch16_224', **SMALL, drop_path_rate=0.1),
    'pooled': lambda _: timm_model('vit_tiny_patch16_224', **SMALL, global_pool='avg'),
    'swin': lambda _: timm_model(
        'swin_tiny_patch4_window7_224',
        depths=[2, 2],
        num_heads=[2, 2],
        embed_dim=16,
        window_size=4,
    ),
    'ViTModel': lambda hf: hf.ViTModel(hf.ViTConfig(**VIT)),
    'ViTModel without pooler': lambda hf: hf.ViTModel(hf.ViTConfig(**VIT), add_pooling_layer=False),
    'ViTForImageClassification': lambda hf: hf.ViTForImageClassification(hf.ViTConfig(**VIT)),
    'Dinov2Model': lambda hf: hf.Dinov2Model(hf.Dinov2Config(**{**VIT, 'mlp_ratio': 2})),
    'SwinModel': lambda hf: hf.SwinModel(hf.SwinConfig(**SWIN)),
}


def batch(kind: str, seed: int = 1):
    x = images(4, seed=seed)
    return dict(pixel_values=x) if 'Model' in kind or 'For' in kind else x


def quantize(model: nn.Module, kind: str = '') -> nn.Module:
    return gplq_mm.quantize_(model, [batch(kind), batch(kind, 2)], policy=FAST)


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    found = model(images(2, seed=3))
    return found if torch.is_tensor(found) else found[0]


@pytest.mark.parametrize('kind', MODELS)
def test_a_file_builds_its_model(tmp_path, transformers, kind):
    torch.manual_seed(0)
    model = quantize(lively(MODELS[kind](transformers)), kind)
    packed = gplq_mm.convert(model)
    path = tmp_path / 'model.safetensors'
    sizes = gplq_mm.save(packed, path)
    assert sizes.file == path.stat().st_size
    header, _ = read_file(path)
    assert header['versions'][header['scope']]
    with torch.random.fork_rng():
        loaded = gplq_mm.load(path)
    assert type(loaded).__name__ == type(packed).__name__
    assert torch.equal(outputs(loaded), outputs(packed))
    # The simulation, the packed model and what was loaded are written alike.
    for other in (model, loaded):
        gplq_mm.save(other, tmp_path / 'again.safetensors')
        assert (tmp_path / 'again.safetensors').read_bytes() == path.read_bytes()


class Own(nn.Module):
    """No library knows it, and its settings are no config of OpenMMLab."""

    cfg = SimpleNamespace(classes=3)

    def __init__(self):
        super().__init__()
        self.body = build_float('vit')
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.body(x))


def test_any_other_model_is_given(tmp_path):
    torch.manual_seed(0)
    model = quantize(Own().eval())
    path = tmp_path / 'own.safetensors'
    gplq_mm.save(gplq_mm.convert(model), path)
    with pytest.raises(DeployError, match=r'own\.safetensors.*load\(path, model=\.\.\.\)'):
        gplq_mm.load(path)
    torch.manual_seed(1)
    other = Own()
    loaded = gplq_mm.load(path, other)
    assert loaded is other
    assert torch.equal(outputs(loaded), outputs(gplq_mm.convert(model)))
    with pytest.raises(SettingError, match='not a device'):
        gplq_mm.load(path, untouched := Own(), device='gpu')
    assert type(untouched.last) is nn.Linear
    other = nn.ModuleDict({'body': build_float('vit')})
    state = copy.deepcopy(other.state_dict())
    with pytest.raises(DeployError, match='has no layer last'):
        gplq_mm.load(path, other)
    assert not quant_layers(other)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


def test_a_float_model_is_not_packed(tmp_path):
    path = tmp_path / 'float.safetensors'
    for pack in (gplq_mm.convert, lambda model: gplq_mm.save(model, path)):
        with pytest.raises(DeployError, match='no quantized layers to pack; quantize it first'):
            pack(build_float('vit'))
    assert not path.exists()


def test_a_model_of_unknown_arguments_is_given(tmp_path):
    """A changed attribute is not in the arguments, so the file does not claim to know them."""
    model = lively(MODELS['vit'](None))
    model.blocks[0].norm1.eps = 0.1
    path = tmp_path / 'odd.safetensors'
    model = quantize(model)
    assert model.gplq_report.library is None
    gplq_mm.save(model, path)
    with pytest.raises(DeployError, match='model='):
        gplq_mm.load(path)
    twin = MODELS['vit'](None)
    twin.blocks[0].norm1.eps = 0.1
    assert torch.equal(outputs(gplq_mm.load(path, twin)), outputs(gplq_mm.convert(model)))


@pytest.mark.parametrize(
    'data',
    [
        dict(name='vit_tiny_patch16_224', arguments=dict(checkpoint_path='x.pth')),
        dict(name='vit_tiny_patch16_224', arguments=dict(pretrained_cfg=dict(url='x'))),
        dict(name='vit_tiny_patch16_224', arguments=dict(weight_init='skip')),
        dict(name='hf_hub:someone/model', arguments={}),
        dict(name='no_such_model', arguments={}),
    ],
)
def test_timm_reads_nothing(tmp_path, data):
    with pytest.raises(ValueError, match='no model of timm alone'):
        build_timm(data)
    path = tmp_path / 'x.safetensors'
    model = lively(MODELS['vit'](None))
    gplq_mm.save(quantize(model), path)
    header, tensors = read_file(path)
    write_file(path, {**header, 'architecture': json.loads(json.dumps(data))}, tensors)
    with pytest.raises(DeployError):
        gplq_mm.load(path)


@pytest.mark.parametrize(
    'data',
    [
        dict({'class': 'DetrForObjectDetection'}, config={}, arguments={}),
        dict({'class': 'pipeline'}, config={}, arguments={}),
        dict({'class': 'ViTModel'}, config=dict(auto_map='x'), arguments={}),
        dict({'class': 'ViTModel'}, config=dict(attn_implementation='eager'), arguments={}),
        dict({'class': 'ViTModel'}, config={}, arguments=dict(trust_remote_code=True)),
    ],
)
def test_transformers_builds_known_families_alone(transformers, data):
    with pytest.raises(ValueError, match=r'known family|not plain'):
        build_transformers(copy.deepcopy(data))


def test_training_by_the_loss_of_transformers(transformers):
    """Labels beside the images: the model's own forward knows what to do with them."""
    torch.manual_seed(0)
    model = lively(MODELS['ViTForImageClassification'](transformers))
    x = images(4, seed=1)
    batches = [dict(pixel_values=x, labels=torch.arange(4), path=['a'] * 4)]
    float_model = copy.deepcopy(model)
    gplq_mm.quantize_(model, batches, policy=FAST, train=dict(loader=batches, epochs=2))
    losses = model.gplq_report.losses
    assert [set(loss) for loss in losses] == 2 * [{'loss', 'loss_task', 'loss_pca_mimic'}]
    with torch.no_grad():
        wanted = float_model(pixel_values=x, labels=torch.arange(4)).loss
    assert losses[0]['loss_task'] == pytest.approx(float(wanted), rel=0.3)
    assert not torch.equal(outputs(model), outputs(float_model))
