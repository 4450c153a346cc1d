"""The GPLQ wrapper: losses, teacher, stages, and what it refuses."""

import copy
import math

import pytest
import torch
from builders import NUM_CLASSES, images, swin_cfg, vit_cfg
from mmpretrain.structures import DataSample

from gplq_mm.checkpoint import CheckpointError
from gplq_mm.layers import (
    act_quantizers,
    calibrate,
    is_calibrated,
    learned_parameters,
    quant_layers,
)
from gplq_mm.models import GPLQ, NonFiniteLossError, PCAMimicLoss, Stage, feature_rows
from gplq_mm.ptq import RoundToNearest, init_learned_weights, quantize_weights
from gplq_mm.quant import NotCalibratedError, PolicyError


def samples(count=4):
    return [
        DataSample(metainfo=dict(img_path=f'{i}.png')).set_gt_label(i % NUM_CLASSES)
        for i in range(count)
    ]


def build(checkpoint, calibrated=True, **options):
    # The default precision of the teacher depends on the machine.
    options = {'mimic': dict(num_components=8), 'teacher_dtype': 'float32', **options}
    model = GPLQ(vit_cfg(), str(checkpoint), **options)
    model.init_weights()
    model.eval()
    if calibrated:
        with torch.no_grad():
            calibrate(model.architecture, lambda _i, _n: model.architecture(images(8, 1)))
        model.advance(Stage.CALIBRATED)
    if model.mimic_loss is not None:
        feature, _ = model.teacher_outputs(images(16, 2))
        model.mimic_loss.fit(feature.mean(0), torch.cov(feature.T))
    return model.train()


def finish(model):
    """Brings a calibrated model through Stage 2."""
    model.eval().freeze_activations()
    quantize_weights(model.architecture, [images()], model.architecture, RoundToNearest())
    model.advance(Stage.WEIGHT_PTQ)
    return model


def test_losses_are_those_of_task_mimicking_and_distillation(checkpoint):
    model = build(checkpoint, distill=dict(loss_weight=0.5, temperature=2.0))
    losses = model(images(), samples(), mode='loss')
    assert set(losses) == {'loss_task', 'loss_pca_mimic', 'loss_distill'}
    with torch.no_grad():
        model.eval()
        feature, logits = model.student_outputs(images())
        teacher_feature, teacher_logits = model.teacher_outputs(images())
    basis = model.mimic_loss.components[:, :8]
    mimic = ((feature - teacher_feature) @ basis).square().sum(1).mean()
    torch.testing.assert_close(losses['loss_pca_mimic'].detach(), mimic)
    p, log_q = (teacher_logits / 2).softmax(1), (logits / 2).log_softmax(1)
    divergence = (p * (p.log() - log_q)).sum(1).mean()
    torch.testing.assert_close(losses['loss_distill'].detach(), 0.5 * 4 * divergence)
    labels = torch.arange(4) % NUM_CLASSES
    task = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(losses['loss_task'].detach(), task)


def test_the_log_has_the_sum_of_the_losses(checkpoint):
    model = build(checkpoint, task_weight=0.0)
    losses = model(images(), samples(), mode='loss')
    total, log = model.parse_losses(losses)
    assert log['loss'] == total
    assert total > 0
    assert log['loss_task'] == 0


def test_task_weight_and_no_mimicking(checkpoint):
    model = build(checkpoint, mimic=None)
    plain = model(images(), samples(), mode='loss')
    assert set(plain) == {'loss_task'}
    weighted = build(checkpoint, mimic=None, task_weight=0.25)(images(), samples(), mode='loss')
    torch.testing.assert_close(weighted['loss_task'], 0.25 * plain['loss_task'])


def test_gradient_reaches_every_weight_and_every_scale(checkpoint):
    model = build(checkpoint)
    loss, _ = model.parse_losses(model(images(), samples(), mode='loss'))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    for name, quantizer in act_quantizers(model).items():
        assert quantizer.scale.grad.abs().sum() > 0, name
    for name, layer in quant_layers(model).items():
        assert layer.weight.grad.abs().sum() > 0, name


def test_quantizers_alone_can_be_trained(checkpoint):
    model = build(checkpoint, train_weights=False)
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learned == {
        f'{name}.{key}'
        for name, q in act_quantizers(model).items()
        for key, _ in q.named_parameters()
    }
    model(images(), samples(), mode='loss')['loss_task'].backward()
    assert all(p.grad is None for n, p in model.named_parameters() if n not in learned)


def test_the_student_equals_its_teacher_with_quantizers_off(checkpoint):
    from gplq_mm.layers import quantizers_disabled

    model = build(checkpoint).eval()
    with quantizers_disabled(model), torch.no_grad():
        _, logits = model.student_outputs(images())
    torch.testing.assert_close(logits, model.teacher_outputs(images())[1], rtol=1e-5, atol=1e-5)


def test_the_teacher_is_neither_saved_nor_trained_but_moves_along(checkpoint):
    model = build(checkpoint)
    before = copy.deepcopy(model.teacher.state_dict())
    assert all('teacher' not in key for key in model.state_dict())
    own = {id(p) for p in model.parameters()}
    assert not own & {id(p) for p in model.teacher.parameters()}
    assert not any(p.requires_grad for p in model.teacher.parameters())
    assert not model.teacher.training
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sum(model(images(), samples(), mode='loss').values()).backward()
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.teacher.state_dict().items())
    model.to(torch.float64)
    assert next(model.teacher.parameters()).dtype == torch.float64


def test_the_teacher_computes_without_a_graph(checkpoint):
    model = build(checkpoint)
    feature, logits = model.teacher_outputs(images().requires_grad_())
    assert not feature.requires_grad
    assert not logits.requires_grad


def test_nothing_of_an_iteration_is_held_after_it(checkpoint):
    model = build(checkpoint)
    model(images(), samples(), mode='loss')
    assert model.mimicry.tap.feature is None
    assert model.mimicry.tap.output is None
    assert model.mimicry.teacher.tap.feature is None


def test_deep_copy_computes_the_same(checkpoint):
    # As an EMA hook makes it.
    model = build(checkpoint).eval()
    clone = copy.deepcopy(model)
    assert torch.equal(clone(images()), model(images()))
    losses = clone.train()(images(), samples(), mode='loss')
    assert set(losses) == {'loss_task', 'loss_pca_mimic'}


@pytest.mark.parametrize(
    'options', [dict(saved_bytes=1), dict(saved_bytes=None), dict(gradient_checkpointing=True)]
)
def test_what_is_kept_for_backward_does_not_change_the_loss(checkpoint, options):
    losses = []
    for settings in ({}, options):
        model = build(checkpoint, **settings).train()
        torch.manual_seed(0)
        losses.append(sum(model(images(), samples(), mode='loss').values()))
        losses[-1].backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert torch.allclose(*losses, rtol=2e-2)


def test_the_number_of_saved_bytes_is_checked(checkpoint):
    with pytest.raises(ValueError, match='saved_bytes=3 must be 1, 2 or None'):
        build(checkpoint, saved_bytes=3)


def test_stages_come_in_order(checkpoint):
    model = build(checkpoint, calibrated=False)
    assert (model.stage, model.state_name) == (Stage.FLOAT, 'fp32')
    with pytest.raises(RuntimeError, match='calibrated'):
        model.advance(Stage.CALIBRATED)
    with pytest.raises(RuntimeError, match='calibrated'):
        model.advance(Stage.WEIGHT_PTQ)
    model = build(checkpoint)
    assert model.state_name == 'w32a4'
    model.advance(Stage.ACT_QAT)
    with pytest.raises(RuntimeError, match='cannot go back'):
        model.advance(Stage.CALIBRATED)
    with pytest.raises(RuntimeError, match='LEARNING'):
        model.advance(Stage.WEIGHT_PTQ)
    model.freeze_activations()
    with pytest.raises(RuntimeError, match='not quantized yet'):
        model.advance(Stage.WEIGHT_PTQ)
    assert finish(model).state_name == 'w4a4'
    with pytest.raises(RuntimeError, match='cannot be trained'):
        model(images(), samples(), mode='loss')
    assert model(images(), samples(), mode='predict')[0].pred_label.numel() == 1


def test_stages_of_direct_qat_come_in_order(checkpoint):
    model = build(checkpoint, direct={}, policy=dict(weight=dict(layout='raw')))
    assert model.state_name == 'w4a4', 'weights are quantized from the start'
    assert 'act' not in model.stage_names
    with pytest.raises(RuntimeError, match=r'ACT_QAT is no stage .* direct=True .*DIRECT_QAT'):
        model.advance(Stage.ACT_QAT)
    with pytest.raises(RuntimeError, match='initialized weight quantizers'):
        model.advance(Stage.DIRECT_QAT)
    init_learned_weights(model.architecture)
    model.advance(Stage.DIRECT_QAT)
    with pytest.raises(RuntimeError, match='cannot go back'):
        model.advance(Stage.CALIBRATED)
    with pytest.raises(NotCalibratedError, match='LEARNING'):
        model.freeze_learned_weights()
    model.freeze_activations()
    with pytest.raises(RuntimeError, match='not quantized yet'):
        model.advance(Stage.WEIGHT_PTQ)
    model.freeze_learned_weights()
    model.advance(Stage.WEIGHT_PTQ)
    with pytest.raises(RuntimeError, match='cannot be trained'):
        model(images(), samples(), mode='loss')
    with pytest.raises(RuntimeError, match='DIRECT_QAT is no stage'):
        build(checkpoint).advance(Stage.DIRECT_QAT)


def test_direct_qat_trains_weights_and_all_scales(checkpoint):
    model = build(checkpoint, direct={}, policy=dict(weight=dict(layout='raw')))
    init_learned_weights(model.architecture)
    model(images(), samples(), mode='loss')['loss_task'].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    for name, layer in quant_layers(model).items():
        assert layer.weight_quantizer.learned.ratio.grad.abs().sum() > 0, name
    scales = build(checkpoint, direct={}, train_weights=False)
    learned = {id(parameter) for parameter in learned_parameters(scales)}
    assert {id(p) for p in scales.parameters() if p.requires_grad} == learned
    assert len(learned) > len(list(quant_layers(scales)))


def test_bad_settings_of_direct_qat(checkpoint):
    with pytest.raises(ValueError, match='compensation=None'):
        GPLQ(vit_cfg(), direct={}, compensation=dict(type='QwT'))
    with pytest.raises(ValueError, match='lr'):
        GPLQ(vit_cfg(), direct=dict(lr=1))
    with pytest.raises(PolicyError, match='layout="raw"'):
        GPLQ(vit_cfg(), direct=dict(granularity='tensor'))


def test_the_stage_is_saved_with_the_model(checkpoint):
    model = finish(build(checkpoint))
    other = build(checkpoint, calibrated=False)
    other.load_state_dict(model.state_dict())
    assert other.stage == Stage.WEIGHT_PTQ
    assert torch.equal(other.eval()(images()), model(images()))


def test_needs_a_checkpoint():
    with pytest.raises(ValueError, match=r'model\.pretrained'):
        GPLQ(vit_cfg()).init_weights()


def test_needs_a_teacher_to_mimic(checkpoint):
    model = GPLQ(vit_cfg(), str(checkpoint), teacher=False)
    with pytest.raises(RuntimeError, match='teacher=True'):
        model.teacher_outputs(images())


def test_unknown_distill_key_and_feature_layer():
    with pytest.raises(ValueError, match='heat'):
        GPLQ(vit_cfg(), distill=dict(heat=1))
    with pytest.raises(ValueError, match=r'neck\.fc'):
        GPLQ(vit_cfg(), mimic={}, feature_layer='neck.fc')


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_an_image_that_is_not_finite_is_named(checkpoint, value):
    model, batch = build(checkpoint), images()
    batch[2, 1, 3, 3] = value
    with pytest.raises(ValueError, match=r'2\.png'):
        model(batch, samples(), mode='loss')
    with pytest.raises(ValueError, match=r'position \[2\]'):
        model(batch)


def test_a_loss_that_is_not_finite_stops_before_the_update(checkpoint):
    from mmengine.optim import OptimWrapper

    model = build(checkpoint, data_preprocessor=None)
    with torch.no_grad():
        model.architecture.head.layers.head.bias[0] = math.nan
    before = copy.deepcopy(model.state_dict())
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(NonFiniteLossError, match=r'loss=nan.*--resume'):
        model.train_step(dict(inputs=list(images()), data_samples=samples()), wrapper)
    after = model.state_dict()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=0, equal_nan=True)


def test_another_number_of_classes_is_explained(checkpoint):
    model = GPLQ(vit_cfg(num_classes=7), str(checkpoint))
    with pytest.raises(CheckpointError, match=r'5 classes.*7'):
        model.init_weights()


def test_another_architecture_is_explained(checkpoint):
    with pytest.raises(CheckpointError, match='another architecture'):
        GPLQ(swin_cfg(), str(checkpoint)).init_weights()
    deeper = vit_cfg()
    deeper['backbone']['arch'] = {**deeper['backbone']['arch'], 'num_layers': 3}
    with pytest.raises(CheckpointError, match=r'layers\.2'):
        GPLQ(deeper, str(checkpoint)).init_weights()


def test_missing_and_damaged_checkpoints(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match='does not exist'):
        GPLQ(vit_cfg(), str(tmp_path / 'none.pth')).init_weights()
    torn = tmp_path / 'torn.pth'
    torn.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r'torn\.pth'):
        GPLQ(vit_cfg(), str(torn)).init_weights()


class Explosive:
    def __reduce__(self):
        return (print, ('this must not run',))


def test_pickled_objects_are_not_executed(tmp_path, capsys):
    path = tmp_path / 'evil.pth'
    torch.save({'state_dict': {'a': torch.zeros(1)}, 'meta': Explosive()}, path)
    with pytest.raises(CheckpointError, match='objects other than tensors'):
        GPLQ(vit_cfg(), str(path)).init_weights()
    assert 'must not run' not in capsys.readouterr().out


# -- the mimic loss -----------------------------------------------------------------------


def features(count, dim, share):
    """Features whose components explain ``share`` of the variance each (list, descending)."""
    share = torch.tensor(share, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))[0]
    return torch.zeros(dim).double() + 1.0, (basis * share) @ basis.T, basis


def test_the_loss_is_the_formula_of_the_paper():
    loss = PCAMimicLoss(12, loss_weight=0.3, num_components=5)
    teacher, student = torch.randn(40, 12) * torch.arange(1, 13) + 2, torch.randn(40, 12)
    mean, covariance = teacher.mean(0), torch.cov(teacher.T)
    loss.fit(mean, covariance)
    basis = torch.linalg.svd(teacher - mean)[2][:5].T
    projected = (student - mean) @ basis - (teacher - mean) @ basis
    expected = 0.3 / 40 * projected.square().sum()
    torch.testing.assert_close(loss(student, teacher), expected, rtol=1e-4, atol=1e-4)
    assert loss(teacher, teacher) == 0


@pytest.mark.parametrize(
    ('share', 'multiple', 'expected'),
    [
        ([1 / 128] * 128, 32, 96),  # 60 % of 128 equal ones are 77
        ([0.7] + [0.3 / 127] * 127, 32, 32),
        ([1 / 40] * 40, 32, 32),  # 24
        ([1 / 40] * 40, 16, 32),
        ([0.61] + [0.39 / 7] * 7, 32, 8),  # never more than there are
        ([0.3, 0.3, 0.2, 0.2], 1, 2),
    ],
)
def test_components_explain_sixty_percent_rounded_up(share, multiple, expected):
    dim = len(share)
    mean, covariance, _ = features(0, dim, share)
    loss = PCAMimicLoss(dim, multiple=multiple)
    report = loss.fit(mean, covariance)
    assert report['num_components'] == expected
    assert report['explained_variance'] == pytest.approx(sum(share[:expected]))
    assert report['spectrum'] == pytest.approx(share)


def test_the_number_of_components_can_be_given():
    mean, covariance, basis = features(0, 16, [(17 - i) / 136 for i in range(1, 17)])
    loss = PCAMimicLoss(16, num_components=3)
    report = loss.fit(mean, covariance)
    assert report['num_components'] == 3
    assert report['explained_variance'] == pytest.approx((16 + 15 + 14) / 136)
    # Components beyond the third do not count.
    student, teacher = torch.zeros(4, 16), (basis[:, 3:].sum(1) * 5).float().expand(4, 16)
    assert loss(student, teacher) == pytest.approx(0, abs=1e-6)


def test_the_basis_is_deterministic_and_survives_saving():
    mean, covariance, _ = features(0, 16, [(17 - i) / 136 for i in range(1, 17)])
    one, two = PCAMimicLoss(16, num_components=4), PCAMimicLoss(16, num_components=4)
    one.fit(mean, covariance)
    two.fit(mean, covariance.clone())
    assert torch.equal(one.components, two.components)
    three = PCAMimicLoss(16)
    three.load_state_dict(one.state_dict())
    x, y = torch.randn(4, 16), torch.randn(4, 16)
    assert torch.equal(three(x, y), one(x, y))


def test_maps_of_several_levels_share_a_basis_and_count_alike():
    loss = PCAMimicLoss(6, loss_weight=2.0, num_components=2)
    teacher = (torch.randn(2, 6, 8, 5), torch.randn(2, 6, 1, 1))
    student = tuple(torch.randn_like(level) for level in teacher)
    rows = torch.cat(feature_rows(teacher))
    assert rows.shape == (2 * 8 * 5 + 2, 6)
    assert torch.equal(rows[1], teacher[0][0, :, 0, 1])
    loss.fit(rows.mean(0), torch.cov(rows.T))
    expected = 0.0
    for a, b in zip(student, teacher, strict=True):
        projected = torch.einsum('nchw,ck->nhwk', a - b, loss.components[:, :2])
        expected += 2.0 / 2 * projected.square().sum(-1).mean()
    torch.testing.assert_close(loss(student, teacher), expected)
    single = loss(student[0], teacher[0]) + loss(student[1], teacher[1])
    torch.testing.assert_close(loss(student, teacher), single / 2)


def test_mimic_loss_refuses():
    for options in (
        dict(explained=0),
        dict(explained=1.1),
        dict(multiple=0),
        dict(num_components=9),
    ):
        with pytest.raises(ValueError, match='mimic'):
            PCAMimicLoss(8, **options)
    with pytest.raises(RuntimeError, match='PCABasisHook'):
        PCAMimicLoss(8)(torch.zeros(2, 8), torch.zeros(2, 8))
    with pytest.raises(ValueError, match='same features'):
        PCAMimicLoss(8).fit(torch.ones(8), torch.zeros(8, 8))


def test_a_new_task_begins_with_the_backbone_of_a_run(checkpoint, tmp_path):
    source = build(checkpoint)
    with torch.no_grad():
        for parameter in source.architecture.backbone.parameters():
            parameter.add_(0.01)
    path = tmp_path / 'w32a4.pth'
    torch.save({'state_dict': source.state_dict(), 'gplq': {}}, path)
    other = vit_cfg()
    other['head']['num_classes'] = NUM_CLASSES + 2
    torch.manual_seed(9)
    model = GPLQ(other, backbone_from=str(path))
    model.init_weights()
    assert is_calibrated(source.architecture)
    assert not is_calibrated(model.architecture)
    for name, value in source.teacher.backbone.named_parameters():
        begun = model.architecture.backbone.get_parameter(name)
        assert torch.equal(begun, source.architecture.backbone.get_parameter(name))
        assert not torch.equal(begun, value)
    for name, value in model.teacher.named_parameters():
        assert torch.equal(model.architecture.get_parameter(name), value)
    assert model.teacher.head(model.teacher.extract_feat(images())).shape[1] == NUM_CLASSES + 2


@pytest.mark.parametrize('options', [dict(pretrained='a.pth'), dict(mimic={}), dict(distill={})])
def test_a_new_task_has_no_teacher(options):
    with pytest.raises(ValueError, match=r'not both|no teacher'):
        GPLQ(vit_cfg(), backbone_from='b.pth', **options)


def test_a_new_task_needs_the_whole_backbone(checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)['state_dict']
    path = tmp_path / 'half.pth'
    torch.save({'state_dict': {k: v for k, v in state.items() if 'layers.1' not in k}}, path)
    with pytest.raises(CheckpointError, match='another architecture'):
        GPLQ(vit_cfg(), backbone_from=str(path)).init_weights()
