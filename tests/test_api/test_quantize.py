"""``gplq_mm.quantize_``: what it takes, what it leaves, what it refuses."""

import itertools
import random
import subprocess
import sys
from collections import UserDict

import pytest
import torch
from builders import FAST, NUM_CLASSES, build_float, images
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gplq_mm
from gplq_mm.errors import DataError, GPLQError, SettingError
from gplq_mm.layers import act_quantizers, quant_layers
from gplq_mm.models.batches import first_batches
from gplq_mm.models.quantization import Quantization
from gplq_mm.models.quantization_settings import default
from gplq_mm.quant import PolicyError, QuantState

IMAGES = [images(8, seed=1), images(8, seed=2)]


def labels(count: int = 8) -> torch.Tensor:
    return torch.arange(count) % NUM_CLASSES


def build(kind: str = 'vit') -> nn.Module:
    torch.manual_seed(0)
    return build_float(kind)


def quantize(model: nn.Module, calibration=IMAGES, **options) -> nn.Module:
    return gplq_mm.quantize_(model, calibration, **{'policy': FAST, **options})


@pytest.fixture(scope='module')
def codes():
    return codes_of(quantize(build()))


def codes_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.weight_quantizer.codes for name, layer in quant_layers(model).items()}


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_importing_the_package_imports_nothing():
    script = (
        'import sys, gplq_mm; heavy = {m.partition(".")[0] for m in sys.modules} & '
        '{"torch", "numpy", "mmengine", "mmcv", "mmpretrain", "mmdet", "rich"}; '
        'assert not heavy, heavy; assert "quantize_" in gplq_mm.__all__; '
        'assert gplq_mm.quantize_.__module__ == "gplq_mm.api"; assert "torch" in sys.modules'
    )
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match='quantise'):
        gplq_mm.quantise  # noqa: B018


def test_the_model_itself_is_quantized(codes):
    model = build()
    parameters = dict(model.named_parameters())
    assert quantize(model) is model
    assert not model.training
    assert all(dict(model.named_parameters())[name] is value for name, value in parameters.items())
    assert all(layer.weight_quantizer.is_quantized for layer in quant_layers(model).values())
    assert {q.state for q in act_quantizers(model).values()} == {QuantState.FROZEN}
    assert len(model.gplq_report.compensation_r2) == 2
    assert '9 Linear, 1 Conv2d and 2 attention layers' in str(model.gplq_report)
    assert model.gplq_report.unknown == {}
    assert_same(codes_of(model), codes)


class Named(nn.Module):
    """A model whose forward has a name for its images, as those of transformers."""

    def __init__(self):
        super().__init__()
        self.body = build()

    def forward(self, pixel_values, scale=None):
        return self.body(pixel_values) if scale is None else self.body(pixel_values * scale)


LOADERS = {
    'pairs': lambda: [(batch, labels()) for batch in IMAGES],
    'once': lambda: iter(IMAGES),
    'loader': lambda: DataLoader(
        TensorDataset(torch.cat(IMAGES), torch.cat([labels(), labels()])), batch_size=8
    ),
    'images': lambda: dict(loader=[*IMAGES, IMAGES[0]], num_images=16),
    'mapping': lambda: [UserDict(inputs=list(batch), data_samples=None) for batch in IMAGES],
    'preprocessed': lambda: [dict(inputs=list(batch), data_samples=None) for batch in IMAGES],
}


@pytest.mark.parametrize('kind', LOADERS)
def test_what_a_loader_yields(codes, kind):
    options = dict(weight_ptq=dict(num_images=16)) if kind == 'images' else {}
    assert_same(codes_of(quantize(build(), LOADERS[kind](), **options)), codes)


@pytest.mark.parametrize(
    'batch',
    [
        lambda x: dict(pixel_values=x, labels=labels(), idx=3),
        lambda x: (x, labels()),
        lambda x: [x],
        lambda x: x,
    ],
    ids=['dict', 'pair', 'arguments', 'tensor'],
)
def test_arguments_of_the_forward(codes, batch):
    found = codes_of(quantize(Named(), [batch(x) for x in IMAGES]))
    assert_same({key.removeprefix('body.'): value for key, value in found.items()}, codes)


def test_a_forward_of_its_own(codes):
    odd = [[x, 'name of a file', 2.0] for x in IMAGES]

    def forward(model, batch):
        return model(batch[0], mode='tensor')

    assert_same(codes_of(quantize(build(), odd, forward=forward)), codes)


def state_of(model: nn.Module) -> dict:
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    classes = {name: type(module) for name, module in model.named_modules()}
    return {'tensors': tensors, 'flags': flags, 'classes': classes, 'training': model.training}


class Once:
    """Reads on where it was, so that the second epoch is shorter."""

    def __init__(self):
        self.lengths = iter((2, 1))

    def __iter__(self):
        return iter(IMAGES[: next(self.lengths)])


NAN = images(4).clone()
NAN[2, 0, 0, 0] = torch.nan
FAILURES = {
    'rule': (dict(policy=dict(rules=[dict(pattern='nowhere', exclude=True)])), PolicyError),
    'nan': (dict(calibration=[IMAGES[0], NAN]), DataError),
    'empty': (dict(calibration=[]), DataError),
    'no loader': (dict(calibration=None), SettingError),
    'key': (dict(train=dict(loader=IMAGES, epoch=1)), SettingError),
    'nothing to train for': (dict(train=dict(loader=IMAGES, mimic=None)), SettingError),
    'nan in training': (dict(train=dict(loader=[IMAGES[0], NAN])), DataError),
    'key of the policy': (dict(policy=dict(weights=dict(bits=4))), PolicyError),
    'bits for a spec': (dict(policy=dict(weight=4)), PolicyError),
    'compensation': (dict(compensation='QwT3'), SettingError),
    'no type': (dict(compensation=dict(ridge=1)), SettingError),
    'method': (dict(weight_ptq='GPTQ3'), SettingError),
    'images of Stage 2': (dict(weight_ptq=dict(num_images=0)), SettingError),
    'no images': (dict(calibration=dict(loader=IMAGES, num_images=0)), SettingError),
    'a batch': (dict(calibration=IMAGES[0]), SettingError),
    'a batch to train on': (dict(train=dict(loader=IMAGES[0])), SettingError),
    'train is a loader': (dict(train=IMAGES), SettingError),
    'no epoch': (dict(train=dict(loader=IMAGES, epochs=0)), SettingError),
    'an empty generator': (dict(train=dict(loader=iter(()))), DataError),
    'a generator in disguise': (dict(train=dict(loader=Once(), epochs=2)), DataError),
    'loss': (
        dict(train=dict(loader=IMAGES * 2, loss=lambda out, _: out.sum() * torch.inf)),
        GPLQError,
    ),
    'no training images': (dict(train=dict(loader=[])), DataError),
    'images given once': (dict(calibration=None, train=dict(loader=iter(IMAGES))), SettingError),
    'one epoch of two': (dict(train=dict(loader=iter(IMAGES), epochs=2)), SettingError),
    'option': (dict(weight_ptq=dict(batch_size=3)), SettingError),
    'forward': (dict(forward=lambda model, batch: model.no_such_method(batch)), AttributeError),
    'stage 2': (
        dict(weight_ptq=dict(type='RoundToNearest'), forward=lambda model, x: model.backbone(x)),
        ValueError,
    ),
}


@pytest.mark.parametrize('kind', FAILURES)
def test_a_failure_leaves_the_model_as_it_was(kind):
    options, error = FAILURES[kind]
    model = build().train()
    model.head.layers.head.bias.requires_grad_(False)
    model.head.layers.head.weight.grad = torch.ones(NUM_CLASSES, 32)
    before = state_of(model)
    with pytest.raises(error):
        quantize(model, **options)
    after = state_of(model)
    assert_same(after.pop('tensors'), before.pop('tensors'))
    assert after == before
    assert torch.equal(model.head.layers.head.weight.grad, torch.ones(NUM_CLASSES, 32))
    assert not hasattr(model, 'gplq_report')
    assert all(not module._forward_hooks for module in model.modules())
    # And can be quantized after that.
    quantize(model)


MESSAGES = {
    'policy has weights': (dict(policy=dict(weights={})), r'some of preset, activation, weight'),
    'tensor': (dict(calibration=IMAGES[0]), r'calibration must be a loader.*Tensor.*\[batch\]'),
    'nan': (
        dict(calibration=[IMAGES[0], NAN]),
        r'position \[2\] of batch 2 of the calibration images',
    ),
    'nan in training': (
        dict(train=dict(loader=[IMAGES[0], NAN])),
        r'position \[2\] of batch 2 of epoch 1 of train\.loader',
    ),
    'loss': (
        dict(train=dict(loader=IMAGES, loss=lambda out, _: out.sum() * torch.inf)),
        r'it was before\. It was batch 1 of epoch 1 of train\.loader: .*smaller optim_wrapper',
    ),
    'a generator in disguise': (
        dict(train=dict(loader=Once(), epochs=2)),
        r'yields 1 batches in epoch 2, and 2 in the first',
    ),
}


@pytest.mark.parametrize('kind', MESSAGES)
def test_messages_say_where_and_what_to_do(kind):
    options, message = MESSAGES[kind]
    with pytest.raises(GPLQError, match=message):
        quantize(build(), **options)


def test_names_alone_will_do(codes):
    model = quantize(build(), compensation='QwT', weight_ptq='GPTQ')
    assert_same(codes_of(model), codes)
    paper = quantize(build(), policy='paper', weight_ptq='RoundToNearest', compensation=None)
    assert paper.gplq_report.policy['preset'] == 'paper'
    assert paper.gplq_report.compensation_r2 == {}


def test_an_endless_loader_stops_where_it_is_told():
    model = quantize(
        build(), train=dict(loader=itertools.cycle(IMAGES), max_iters=3, optim_wrapper=RATES)
    )
    assert len(model.gplq_report.losses) == 3


def test_a_quantized_model_is_refused():
    model = quantize(build())
    with pytest.raises(PolicyError, match='quantized already'):
        quantize(model)


def test_defaults_are_those_of_the_configs(monkeypatch):
    base = default
    assert base('gplq_policy') == dict(preset='gplq')
    steps = Quantization(build(), IMAGES, dict(loader=IMAGES), None, None, 'default', None, 0)
    assert steps.compensation == base('gplq_compensation')
    ptq = base('gplq_train_cfg')['weight_ptq']
    assert type(steps.method).__name__ == ptq['type']
    assert steps.ptq_images == ptq['num_images']
    assert steps.train['mimic'] == base('gplq_mimic')
    assert steps.train['optim_wrapper'] == base('gplq_optim_wrapper')
    changed = dict(loader=IMAGES, optim_wrapper=dict(optimizer=dict(lr=1.0)))
    steps = Quantization(build(), IMAGES, changed, None, None, None, None, 0)
    assert steps.compensation is None
    optimizer = base('gplq_optim_wrapper')['optimizer']
    assert steps.train['optim_wrapper']['optimizer'] == {**optimizer, 'lr': 1.0}


# -- training -----------------------------------------------------------------------------------

RATES = dict(optimizer=dict(lr=1e-3), quantizer=dict(lr=1e-2))
PAIRS = [(batch, labels()) for batch in IMAGES]


def trained(loader=PAIRS, model=None, seed=0, **train) -> nn.Module:
    settings = dict(loader=loader, epochs=3, optim_wrapper=RATES, **train)
    return quantize(model or build(), train=settings, seed=seed)


def test_both_stages():
    original = build().state_dict()
    model = trained()
    report = model.gplq_report
    assert list(report.seconds) == ['images', 'calibration', 'pca', 'act_qat', 'weight_ptq']
    assert len(report.losses) == 6
    assert set(report.losses[0]) == {'loss', 'loss_task', 'loss_pca_mimic'}
    assert report.losses[-1]['loss'] < report.losses[1]['loss']
    weight = 'backbone.layers.0.attn.qkv.weight'
    assert not torch.equal(model.state_dict()[weight], original[weight])
    assert not any('mimic' in key or 'teacher' in key for key in model.state_dict())
    layer = model.head.layers.head
    assert not layer._forward_hooks, 'the tap is still on'


def test_labels_are_optional():
    model = trained(IMAGES)
    assert set(model.gplq_report.losses[0]) == {'loss', 'loss_pca_mimic'}
    model = trained(IMAGES, mimic=None, distill=dict(loss_weight=0.5))
    assert set(model.gplq_report.losses[0]) == {'loss', 'loss_distill'}


def test_gradients_of_earlier_training_are_not_used():
    model = build()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    assert trained(model=model).gplq_report.losses == trained().gplq_report.losses


def test_a_model_without_a_parameter():
    with pytest.raises(PolicyError, match='no Linear'):
        quantize(nn.ReLU(), device='cpu')


@pytest.mark.parametrize('kind', [dict, UserDict])
def test_images_are_counted_in_any_mapping(kind):
    batches = [kind(pixel_values=x) for x in IMAGES]
    assert list(first_batches(batches, 8)) == batches[:1]


def test_a_loss_of_its_own():
    calls = []

    def loss(output, batch):
        calls.append(len(batch))
        return output.square().mean()

    model = trained(IMAGES, loss=loss, mimic=None, task_weight=0.5)
    assert calls == [8] * 6
    assert set(model.gplq_report.losses[0]) == {'loss', 'loss_task'}


def test_samples_of_openmmlab():
    from mmpretrain.structures import DataSample

    samples = [DataSample().set_gt_label(int(label)) for label in labels()]
    batches = [dict(inputs=list(batch), data_samples=samples) for batch in IMAGES]
    model = trained(batches)
    losses = model.gplq_report.losses
    wanted = trained().gplq_report.losses
    assert losses[0] == pytest.approx(wanted[0], rel=1e-5)


def test_random_numbers_are_those_of_the_seed():
    """What happened before changes nothing, and what comes after goes on as if nothing was."""

    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        model = build_dropping()
        loader = DataLoader(TensorDataset(torch.cat(IMAGES)), batch_size=8, shuffle=True)
        before = torch.get_rng_state(), random.getstate()
        results.append(codes_of(trained(loader, model, seed=5)))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
    assert_same(*results)
    other = codes_of(trained(loader, build_dropping(), seed=6))
    assert any(not torch.equal(other[key], value) for key, value in results[0].items())


def build_dropping() -> nn.Module:
    with torch.random.fork_rng():
        model = build()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    return model


def test_frozen_weights():
    original = build().state_dict()
    model = trained(train_weights=False)
    weight = 'backbone.layers.0.attn.qkv.weight'
    assert torch.equal(model.state_dict()[weight], original[weight])
