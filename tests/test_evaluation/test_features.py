"""Distance between student and teacher."""

import pytest
import torch

from gplq_mm.evaluation import feature_distance


def test_by_hand():
    teacher = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]])
    student = torch.tensor([[3.0, 4.0], [2.0, 0.0], [-1.0, 0.0]])
    a, b = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[2.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    batches = [
        ((student[:2], a[:2]), (teacher[:2], b[:2])),
        ((student[2:], a[2:]), (teacher[2:], b[2:])),
    ]
    result = feature_distance(batches)
    assert result['relative_l2'] == pytest.approx(((8 + 4) / (25 + 4 + 1)) ** 0.5)
    assert result['cosine'] == pytest.approx((1 + 0 - 1) / 3)
    assert result['agreement'] == pytest.approx(200 / 3)
    assert result['num_images'] == 3


def test_nothing_to_compare():
    with pytest.raises(ValueError, match='at least one image'):
        feature_distance([])
