"""Layers whose training forward is one over the batch of all ranks."""

import pytest
import torch
import torch.multiprocessing as mp
from layer_ranks import build, images, step, step_on_rank
from torch import nn

import gplq_mm.distributed.rank_invariant as module
from gplq_mm.distributed import make_rank_invariant


def test_two_ranks_make_the_step_of_one(tmp_path):
    mp.spawn(step_on_rank, (str(tmp_path),), nprocs=2)
    one = step(build(), images())
    assert not one['output'].all()
    for rank in range(2):
        two = torch.load(tmp_path / f'{rank}.pth')
        assert two.keys() == one.keys()
        for name, value in one.items():
            if name == 'output':
                value = value[rank::2]
            elif name == 'input':
                # The loss of a rank is the mean over half as many images.
                value = 2 * value[rank::2]
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_one_rank_is_torch():
    one, model = build(), build()
    plain = nn.Sequential(*(nn.BatchNorm2d(4) if i == 1 else layer for i, layer in enumerate(one)))
    plain[1].load_state_dict(model[1].state_dict())
    torch.testing.assert_close(step(plain, images())['output'], step(model, images())['output'])


@pytest.mark.parametrize('name', ['Dropout', 'DropPath'])
def test_share_and_mean(name):
    layer = nn.Dropout(0.25) if name == 'Dropout' else build()[2]
    make_rank_invariant(layer)
    x = torch.full((4000, 3), 2.0)
    y = layer.train()(x)
    share = 0.25 if name == 'Dropout' else 0.3
    assert (y == 0).float().mean().item() == pytest.approx(share, abs=0.03)
    assert y.mean().item() == pytest.approx(2.0, rel=0.05)
    assert (y.min(1).values == y.max(1).values).all() == (name == 'DropPath')
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(x, torch.full((4000, 3), 2.0))


def test_nothing_or_all():
    layer = nn.Dropout(0.0, inplace=True)
    make_rank_invariant(layer)
    x = torch.ones(3, 2)
    assert layer(x) is x
    layer.p = 1.0
    assert torch.equal(layer(x), torch.zeros(3, 2))
    assert torch.equal(x, torch.ones(3, 2))


def test_images_are_dealt_out_in_turns(monkeypatch):
    layer = nn.Dropout(0.5)
    make_rank_invariant(layer)

    def mask(rank: int, ranks: int, rows: int) -> torch.Tensor:
        monkeypatch.setattr(module, 'rank_and_world_size', lambda: (rank, ranks))
        torch.manual_seed(1)
        return layer(torch.ones(rows, 5))

    whole = mask(0, 1, 12)
    for ranks in (2, 3, 4):
        for rank in range(ranks):
            assert torch.equal(mask(rank, ranks, 12 // ranks), whole[rank::ranks])


def test_other_classes_stay():
    class OwnNorm(nn.BatchNorm2d):
        pass

    class OwnDropout(nn.Dropout):
        def forward(self, x):
            return x

    layers = [OwnNorm(3), OwnDropout(), nn.SyncBatchNorm(3), nn.LayerNorm(3), nn.Dropout2d(0.1)]
    classes = [type(layer) for layer in layers]
    make_rank_invariant(nn.Sequential(*layers))
    assert [type(layer) for layer in layers] == classes
