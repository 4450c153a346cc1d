"""The deployed model computes what its simulation computes, to the last bit."""

import pytest
import torch
from builders import images
from packed_models import fill_compensations, quantized_classifier
from torch import nn

from gplq_mm.deploy import convert
from gplq_mm.layers.reproducible import (
    ReproducibleGELU,
    ReproducibleLayerNorm,
    make_reproducible,
)


@pytest.mark.parametrize('kind', ['vit', 'swin', 'resnet'])
@pytest.mark.parametrize('compensation', [None, dict(type='QwT')])
def test_outputs_of_simulation_and_deployed_model_are_equal(kind, compensation):
    model = quantized_classifier(kind, compensation=compensation)
    if compensation:
        fill_compensations(model)
    deployed = convert(model)
    with torch.no_grad():
        for seed in range(3):
            x = images(seed=seed)
            assert torch.equal(model(x), deployed(x))


def test_gradients_are_those_of_torch():
    plain = nn.Sequential(nn.LayerNorm(8), nn.GELU())
    nn.init.normal_(plain[0].weight)
    own = nn.Sequential(nn.LayerNorm(8), nn.GELU())
    own.load_state_dict(plain.state_dict())
    make_reproducible(own)
    assert type(own[0]) is ReproducibleLayerNorm
    assert type(own[1]) is ReproducibleGELU
    x = torch.randn(3, 8)
    plain(x).sum().backward()
    own(x).sum().backward()
    assert torch.equal(own[0].weight.grad, plain[0].weight.grad)
    with torch.no_grad():
        torch.testing.assert_close(own(x), plain(x))
        assert own(x.bfloat16().float()).dtype == torch.float32


def test_what_is_defined_otherwise_stays():
    model = nn.Sequential(
        nn.LayerNorm((2, 4)), nn.LayerNorm(4, elementwise_affine=False), nn.GELU('tanh')
    )
    before = [type(module) for module in model]
    make_reproducible(model)
    assert [type(module) for module in model] == before
