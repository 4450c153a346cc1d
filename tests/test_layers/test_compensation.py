"""QwT and QwT-v2: closed forms, and dropping what does not help."""

import numpy as np
import pytest
import torch
from torch import nn

import gplq_mm.layers.compensation as module
from gplq_mm.errors import SettingError
from gplq_mm.layers import QwT, QwTv2, attach_compensation, build_compensation


def planted(kind, rows=4000, dim=6, noise=0.01, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator) * torch.arange(1, dim + 1) + 1.5
    weight = 0.3 * torch.randn(dim, dim, generator=generator)
    weight = weight if kind is QwT else weight.diagonal()
    bias = torch.randn(dim, generator=generator)
    residual = (x @ weight.T if kind is QwT else x * weight) + bias
    return x, residual + noise * torch.randn(rows, dim, generator=generator), weight, bias


def fitted(kind, x, residual, parts=4, **options):
    compensation = kind(**options)
    compensation.start()
    for a, b in zip(x.chunk(parts), residual.chunk(parts), strict=True):
        compensation.update(a, b)
    return compensation, compensation.fit()


@pytest.mark.parametrize('kind', [QwT, QwTv2])
def test_recovers_a_planted_map(kind):
    x, residual, weight, bias = planted(kind)
    compensation, score = fitted(kind, x, residual, ridge=0.0)
    assert score > 0.99
    torch.testing.assert_close(compensation.weight.float(), weight, rtol=0, atol=2e-3)
    torch.testing.assert_close(compensation.bias.float(), bias, rtol=0, atol=5e-3)
    torch.testing.assert_close(compensation.correction(x), residual, rtol=0, atol=0.1)


@pytest.mark.parametrize('ridge', [0.0, 0.1, 10.0])
def test_qwt_is_the_ridge_regression(ridge):
    x, residual, _, _ = planted(QwT, rows=200, noise=1.0)
    compensation, _ = fitted(QwT, x, residual, ridge=ridge)
    # Ridge as least squares on augmented data; the bias is not penalised.
    a, b = x.double().numpy(), residual.double().numpy()
    penalty = ridge * np.square(a).sum(0).mean()
    ones = np.concatenate((np.ones((200, 1)), np.zeros((6, 1))))
    left = np.concatenate((np.concatenate((a, np.sqrt(penalty) * np.eye(6))), ones), 1)
    right = np.concatenate((b, np.zeros((6, 6))))
    solution = np.linalg.lstsq(left, right, rcond=None)[0]
    np.testing.assert_allclose(compensation.weight.numpy(), solution[:-1].T, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(compensation.bias.numpy(), solution[-1], rtol=2e-3, atol=2e-3)


def test_qwt_v2_is_a_regression_per_channel():
    x, residual, _, _ = planted(QwTv2, rows=200, noise=1.0)
    compensation, _ = fitted(QwTv2, x, residual, ridge=0.0)
    for channel in range(6):
        slope, bias = np.polyfit(x[:, channel].numpy(), residual[:, channel].numpy(), 1)
        assert compensation.weight[channel].item() == pytest.approx(slope, rel=2e-3, abs=2e-3)
        assert compensation.bias[channel].item() == pytest.approx(bias, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize('kind', [QwT, QwTv2])
def test_drops_itself_on_noise(kind):
    x, residual = torch.randn(40, 16), torch.randn(40, 16)
    compensation, score = fitted(kind, x, residual, ridge=0.0)
    assert score <= 0
    assert not compensation.is_fitted
    assert fitted(kind, x, torch.zeros_like(x))[1] == 0.0


@pytest.mark.parametrize('kind', [QwT, QwTv2])
def test_score_is_the_error_on_the_fold_that_was_not_fitted(kind):
    x, residual, _, _ = planted(kind, rows=60, noise=2.0)
    _, score = fitted(kind, x, residual, parts=2, ridge=0.01)
    halves = [(x[::2], residual[::2]), (x[1::2], residual[1::2])]
    error = 0.0
    for train, test in (halves, halves[::-1]):
        single = fitted(kind, *train, parts=1, ridge=0.01)[0]
        error += (single.correction(test[0]) - test[1]).square().sum().item()
    assert score == pytest.approx(1 - error / residual.square().sum().item(), abs=5e-3)


@pytest.mark.parametrize(('ranks', 'batch'), [(1, 1), (1, 4), (1, 5), (2, 3), (3, 2), (4, 5)])
def test_folds_do_not_depend_on_ranks_and_batches(monkeypatch, ranks, batch):
    x, residual = torch.randn(2, 21, 7, 4)
    total = [{}, {}]
    for rank in range(ranks):
        monkeypatch.setattr(module, 'rank_and_world_size', lambda rank=rank: (rank, ranks))
        compensation = QwT()
        compensation.start()
        for images in zip(
            x[rank::ranks].split(batch), residual[rank::ranks].split(batch), strict=True
        ):
            compensation.update(*images)
        for known, fold in zip(total, compensation._folds, strict=True):
            for key, value in fold.items():
                known[key] = known.get(key, 0) + value
    for fold, images in zip(total, (x[::2], x[1::2]), strict=True):
        assert fold['count'].item() == 7 * len(images)
        rows = torch.cat((images, torch.ones(len(images), 7, 1)), 2).flatten(0, 1).double()
        torch.testing.assert_close(fold['gram'], rows.T @ rows)


@pytest.mark.parametrize('kind', [QwT, QwTv2])
def test_map_depends_on_the_data_alone_and_memory_on_neither(kind):
    x, residual, _, _ = planted(kind)
    one, _ = fitted(kind, x, residual, parts=2, ridge=0.01)
    many, _ = fitted(kind, x, residual, parts=80, ridge=0.01)
    torch.testing.assert_close(one.weight, many.weight)
    sizes = []
    for parts in (2, 200):
        compensation = kind()
        compensation.start()
        for a, b in zip(x.chunk(parts), residual.chunk(parts), strict=True):
            compensation.update(a, b)
        sizes.append(sum(v.numel() for fold in compensation._folds for v in fold.values()))
    assert sizes[0] == sizes[1] < x.numel()


@pytest.mark.parametrize('kind', [QwT, QwTv2])
def test_feature_maps_have_their_channels_on_axis_one(kind):
    x, residual, _, _ = planted(kind, rows=256)
    maps = [t.reshape(4, 8, 8, 6).permute(0, 3, 1, 2) for t in (x, residual)]
    compensation, _ = fitted(kind, *maps, parts=4, axis=1, ridge=0.01)
    flat, _ = fitted(kind, x, residual, parts=4, ridge=0.01)
    torch.testing.assert_close(compensation.weight, flat.weight)
    correction = compensation.correction(maps[0])
    assert correction.shape == maps[0].shape
    torch.testing.assert_close(
        correction.permute(0, 2, 3, 1).reshape(-1, 6), flat.correction(x), rtol=1e-3, atol=1e-2
    )


class Double(nn.Module):
    def forward(self, x, shift=0.0):
        return 2 * x + shift


@pytest.mark.parametrize('kind', ['QwT', 'QwTv2'])
def test_a_block_adds_its_correction(kind):
    block, x = Double(), torch.randn(20, 6)
    attach_compensation(block, build_compensation(dict(type=kind), -1))
    assert torch.equal(block(x), 2 * x)
    planted_x, residual, _, _ = planted(QwT if kind == 'QwT' else QwTv2)
    compensation = block.compensation
    compensation.start()
    compensation.update(planted_x, residual)
    compensation.fit()
    torch.testing.assert_close(block(x, 1.0), 2 * x + 1 + compensation.correction(x))
    torch.testing.assert_close(block(x=x), 2 * x + compensation.correction(x))
    compensation.enabled = False
    assert torch.equal(block(x), 2 * x)


@pytest.mark.parametrize('kind', [QwT, QwTv2])
def test_state_dict_before_and_after(kind):
    x, residual, _, _ = planted(kind)
    compensation, _ = fitted(kind, x, residual)
    empty, other = kind(), kind()
    assert not empty.state_dict()
    other.load_state_dict(compensation.state_dict())
    assert torch.equal(other.correction(x), compensation.correction(x))
    assert other.weight.dtype == torch.float16
    other.load_state_dict(empty.state_dict())
    assert not other.is_fitted


def test_a_map_beyond_half_precision_is_dropped():
    compensation = build_compensation(dict(type='QwT', ridge=0.0), -1)
    compensation.start()
    for _ in range(2):
        x = torch.randn(64, 3, dtype=torch.float64) * 1e-3
        compensation.update(x, x * 1e6)
    assert compensation.fit() <= 0.0
    assert not compensation.is_fitted


def test_refuses():
    with pytest.raises(ValueError, match='ridge'):
        QwT(ridge=-1)
    with pytest.raises(SettingError, match='QwT3'):
        build_compensation(dict(type='QwT3'), -1)
    compensation = QwT()
    compensation.start()
    with pytest.raises(ValueError, match='no calibration data'):
        compensation.fit()
