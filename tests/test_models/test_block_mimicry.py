"""The loss that compares every residual block with the teacher's."""

import pytest
import torch
from builders import FAST, images, randomize, vit_cfg
from mmpretrain.structures import DataSample
from torch import nn

from gplq_mm import quantize_
from gplq_mm.errors import SettingError
from gplq_mm.layers import calibrate, find_blocks
from gplq_mm.models import GPLQ, Stage
from gplq_mm.models.block_mimicry import relative_error


@pytest.fixture
def build(checkpoint):
    def build(**options):
        defaults = dict(mimic=None, task_weight=0.0, teacher_dtype='float32', policy=FAST)
        model = GPLQ(vit_cfg(), str(checkpoint), **{**defaults, **options})
        model.init_weights()
        model.eval()
        with torch.no_grad():
            calibrate(model.architecture, lambda *_: model.architecture(images(8, 1)))
        model.advance(Stage.CALIBRATED)
        return model.train()

    return build


def outputs(network, names) -> list[torch.Tensor]:
    found = {}
    handles = [
        network.get_submodule(name).register_forward_hook(
            lambda _module, _args, out, name=name: found.__setitem__(name, out)
        )
        for name in names
    ]
    with torch.no_grad():
        network(images())
    for handle in handles:
        handle.remove()
    return [found[name] for name in names]


def losses_of(model) -> dict[str, torch.Tensor]:
    samples = [DataSample().set_gt_label(0) for _ in range(4)]
    return model(images(4), samples, mode='loss')


def loss_of(model) -> torch.Tensor:
    return losses_of(model)['loss_block_mimic']


def test_the_error_has_the_variance_of_an_image_as_its_unit():
    teacher = torch.randn(3, 5, 4, dtype=torch.float64)
    student = teacher + torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    shares = torch.tensor([0.01, 0.04, 0.09]) / teacher.flatten(1).var(1, correction=0)
    torch.testing.assert_close(relative_error(student, teacher), shares.mean().float())
    # Neither a larger image beside it nor another scale of all changes what one contributes.
    alone = [relative_error(student[i : i + 1] * 7, teacher[i : i + 1] * 7) for i in range(3)]
    torch.testing.assert_close(torch.stack(alone).mean(), shares.mean().float())


def test_the_error_of_a_constant_image_is_finite():
    assert torch.isfinite(relative_error(torch.ones(1, 2, 3), torch.ones(1, 2, 3)))


def test_the_loss_is_the_mean_over_all_blocks(build):
    model = build(block_mimic=dict(loss_weight=3.0))
    loss = loss_of(model)
    names = find_blocks(model.architecture)
    assert len(names) > 1
    with torch.no_grad():
        model.eval()
        pairs = zip(
            *(outputs(net, names) for net in (model.architecture, model.teacher)), strict=True
        )
        expected = torch.stack([relative_error(*pair) for pair in pairs]).mean()
    torch.testing.assert_close(loss.detach(), 3 * expected)
    assert loss > 0


def test_gradients_reach_every_quantizer_in_the_blocks(build):
    model = build(block_mimic={})
    loss_of(model).backward()
    for name, parameter in model.architecture.named_parameters():
        if name.startswith('backbone.layers.') and name.endswith('.scale'):
            assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


def test_checkpointed_blocks_have_the_same_loss_and_gradients(build):
    grads = []
    for checkpointing in (False, True):
        model = build(block_mimic={}, gradient_checkpointing=checkpointing)
        loss = loss_of(model)
        loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again)


def test_without_it_nothing_is_compared(build):
    assert 'loss_block_mimic' not in losses_of(build())


def test_a_model_without_a_teacher_can_be_evaluated(build):
    model = build(block_mimic={}, teacher=False)
    assert model(images(), mode='tensor').shape[0] == len(images())


def test_unknown_keys_and_models_without_blocks(checkpoint):
    with pytest.raises(SettingError, match=r"block_mimic has unknown key\(s\) \['weight'\]"):
        GPLQ(vit_cfg(), str(checkpoint), block_mimic=dict(weight=1))
    plain = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
    plain.head = nn.Identity()
    with pytest.raises(SettingError, match='set block_mimic=None'):
        quantize_(
            plain,
            train=dict(loader=[torch.randn(4, 8)], mimic=None, block_mimic={}, feature_layer='4'),
        )


def test_plain_modules_take_it_too():
    import timm

    torch.manual_seed(0)
    vit = timm.create_model(
        'vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2
    )
    train = dict(loader=[torch.randn(4, 3, 32, 32)] * 2, mimic=None, block_mimic={})
    quantize_(randomize(vit), policy=dict(FAST), train=train, compensation=None)
    assert set(vit.gplq_report.losses[0]) == {'loss', 'loss_block_mimic'}
    # Nothing of the training stays on the model.
    assert not any(module._forward_hooks for module in vit.modules())
