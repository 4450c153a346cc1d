"""The teacher: constants without a graph, in a precision of its own."""

import pytest
import torch
from builders import FAST, images, vit_cfg
from mmengine.optim import OptimWrapper
from mmpretrain.structures import DataSample

from gplq_mm.layers import calibrate
from gplq_mm.models import GPLQ, Stage


def build(checkpoint, **options):
    """Calibrated model with both losses of the teacher, in float32 on every machine."""
    defaults = dict(
        distill=dict(loss_weight=0.5), mimic=dict(num_components=8), teacher_dtype='float32'
    )
    options = {**defaults, **options}
    model = GPLQ(vit_cfg(), str(checkpoint), policy=FAST, **options)
    model.init_weights()
    model.eval()
    with torch.no_grad():
        calibrate(model.architecture, lambda *_: model.architecture(images(8, 1)))
    model.advance(Stage.CALIBRATED)
    feature, _ = model.teacher_outputs(images(16, 2))
    model.mimic_loss.fit(feature.mean(0), torch.cov(feature.T))
    return model.train()


def samples(count=4):
    return [DataSample().set_gt_label(i) for i in range(count)]


def losses(model, batch) -> dict[str, torch.Tensor]:
    return {key: v.detach() for key, v in model(batch, samples(len(batch)), mode='loss').items()}


def train(model, steps=3) -> dict[str, torch.Tensor]:
    """Weights after some steps over two batches."""
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01))
    for step in range(steps):
        model.train_step(dict(inputs=list(images(4, step % 2)), data_samples=samples()), wrapper)
    return model.state_dict()


@pytest.mark.parametrize('temperature', [1.0, 2.0])
def test_gradients_are_those_of_ordinary_constants(checkpoint, temperature):
    distill = dict(loss_weight=0.5, temperature=temperature)
    model = build(checkpoint, distill=distill)
    sum(model(images(), samples(), mode='loss').values()).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    with torch.no_grad():
        wanted_feature = model.teacher.extract_feat(images())
        wanted = model.teacher.head.pre_logits(wanted_feature), model.teacher(images())
    model.zero_grad()
    model.mimicry.teacher.targets = lambda _images: wanted
    sum(model(images(), samples(), mode='loss').values()).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, found[name]), name


def test_bfloat16_is_for_the_losses_alone(checkpoint):
    exact, short = build(checkpoint), build(checkpoint, teacher_dtype='bfloat16')
    for a, b in zip(short.teacher_outputs(images()), exact.teacher_outputs(images()), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
    feature, logits = short.mimicry.teacher.targets(images())
    assert logits.dtype == torch.bfloat16
    wanted = exact.mimicry.teacher.targets(images())[0]
    assert 0 < (feature.float() - wanted).norm() / wanted.norm() < 0.05
    before = losses(exact, images())
    for key, value in losses(short, images()).items():
        torch.testing.assert_close(value, before[key], rtol=0.1, atol=1e-3)
    assert all(v.isfinite().all() for v in train(short).values())


def test_float32_stays_float32_under_amp(checkpoint):
    model = build(checkpoint, teacher_dtype='float32')
    wanted = model.mimicry.teacher.targets(images())
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = model.mimicry.teacher.targets(images())
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize('fast', [True, False])
def test_auto_asks_the_device(checkpoint, monkeypatch, fast):
    monkeypatch.setattr('gplq_mm.models.frozen.has_fast_bf16', lambda _device: fast)
    logits = build(checkpoint, teacher_dtype='auto').mimicry.teacher.targets(images())[1]
    assert logits.dtype == (torch.bfloat16 if fast else torch.float32)


def test_unknown_precision(checkpoint):
    with pytest.raises(ValueError, match="teacher_dtype='half' must be one of auto, float32"):
        GPLQ(vit_cfg(), str(checkpoint), teacher_dtype='half')
