"""Deviation of the latent weights."""

import pytest
import torch
from builders import build_quantized

from gplq_mm.evaluation import weight_drift
from gplq_mm.layers import quant_layers


def test_by_hand():
    model = build_quantized('vit')
    reference = {key: value.clone() for key, value in model.state_dict().items()}
    assert weight_drift(model, reference)['mae'] == 0
    names = list(quant_layers(model))
    with torch.no_grad():
        for i, layer in enumerate(quant_layers(model).values()):
            layer.weight += 0.1 * (i % 2)
    result = weight_drift(model, reference)
    assert set(result['layers']) == set(names)
    assert result['layers'][names[1]]['mae'] == pytest.approx(0.1, rel=1e-4)
    assert result['layers'][names[1]]['mse'] == pytest.approx(0.01, rel=1e-4)
    assert result['layers'][names[0]]['mae'] == 0
    changed = len(names) // 2
    assert result['mae'] == pytest.approx(0.1 * changed / len(names), rel=1e-4)
    assert result['mse'] == pytest.approx(0.01 * changed / len(names), rel=1e-4)
