"""Chosen levels: the codebook, the format and the quantizer that holds one."""

from itertools import combinations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gplq_mm.errors import SettingError
from gplq_mm.quant import ActQuantizer, ActSpec, PolicyError, QuantPolicy
from gplq_mm.quant.functional import POSITIONS, fake_quantize, look_up
from gplq_mm.quant.levels import check_levels, choose_levels, table_of, uniform_levels


def errors_of(counts: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    distance = table_of(levels).double() - torch.arange(POSITIONS)
    return (counts.double() * distance.square()).sum(1)


def calibrated(x: torch.Tensor, shape: tuple, **spec) -> ActQuantizer:
    quantizer = ActQuantizer(ActSpec(format='levels', **spec), shape)
    quantizer.observe()
    for _ in range(quantizer.observer.num_passes):
        quantizer(x)
        quantizer.observer.end_pass()
    quantizer.finish_observing()
    return quantizer


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 12))
@example(4770, 10)
def test_levels_are_those_of_least_error(seed, power):
    counts = torch.rand(2, POSITIONS, generator=torch.Generator().manual_seed(seed)) ** power
    levels = choose_levels(counts, bits=2)
    check_levels(levels, 2)
    cuts = torch.tensor(list(combinations(range(1, POSITIONS), 3)))
    ends = torch.cat([cuts, torch.full((len(cuts), 1), POSITIONS)], 1)
    begins = torch.cat([torch.zeros(len(cuts), 1, dtype=torch.long), cuts], 1)
    position = torch.arange(POSITIONS, dtype=torch.float64)
    for row, chosen in zip(counts.double(), levels, strict=True):
        sums = [torch.cat([row.new_zeros(1), (row * position**i).cumsum(0)]) for i in (0, 1, 2)]
        weight, first, second = (total[ends] - total[begins] for total in sums)
        # Differences of sums: the quotient may be anything where a cluster weighs next to nothing.
        mean = (first / weight.clamp(min=1e-30)).round().clamp(0, POSITIONS - 1)
        least = (second - 2 * mean * first + mean**2 * weight).sum(1).min()
        # Rounded to the nearest level a value may do better than in its cluster, never worse.
        # Unseen positions count a little, too.
        assert errors_of(row[None], chosen[None]) <= least + 1e-5 * row.sum()


@given(st.integers(2, 5), st.lists(st.integers(0, POSITIONS - 1), max_size=4))
def test_values_that_few_positions_hold_still_give_a_codebook(bits, seen):
    counts = torch.zeros(1, POSITIONS)
    counts[0, seen] = 1
    levels = choose_levels(counts, bits)
    check_levels(levels, bits)
    assert levels.shape == (1, 2**bits)
    assert errors_of(counts, levels) == 0


def test_positions_go_to_the_nearest_level():
    levels = torch.tensor([[0, 10, 63]], dtype=torch.uint8)
    table = table_of(levels)[0]
    assert table[[0, 5, 6, 10, 36, 37, 63]].tolist() == [0, 0, 10, 10, 10, 63, 63]
    positions = torch.tensor([5.0, 6.0, torch.nan])
    assert torch.equal(look_up(positions, table)[:2], torch.tensor([0.0, 10.0]))
    assert look_up(positions, table)[2].isnan()
    tables = torch.stack([table, uniform_levels(2)[0].repeat_interleave(16)])
    heads = torch.full((1, 2, 3, 1), 6.0)
    assert look_up(heads, tables)[:, :, 0, 0].tolist() == [[10, 0]]


@pytest.mark.parametrize(
    ('levels', 'message'),
    [
        ([[0, 3, 3, 9]], 'increase, and none may repeat'),
        ([[0, 9, 3]], 'increase, and none may repeat'),
        ([[0, 1, 2, 3, 4]], '1 to 4 levels'),
        ([[0, 64]], r'0\.\.63'),
        ([0, 1], '1 to 4 levels'),
    ],
)
def test_what_is_no_codebook_is_refused(levels, message):
    with pytest.raises(SettingError, match=message):
        check_levels(torch.tensor(levels), bits=2)


def test_levels_follow_the_values():
    """Of a distribution with a long tail they lose less than equidistant ones."""
    x = torch.rand(4096, 3, generator=torch.Generator().manual_seed(0)).log().neg() ** 2
    chosen = calibrated(x, (3,))
    even = ActQuantizer(ActSpec(), (3,))
    even.observe()
    for _ in range(2):
        even(x)
        even.observer.end_pass()
    even.finish_observing()
    assert chosen.levels.shape == (1, 16)
    assert len(chosen(x)[:, 0].unique()) <= 16
    assert (chosen(x) - x).square().mean() < 0.6 * (even(x) - x).square().mean()


def test_every_head_has_levels_of_its_own():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, 2, 50, 4, generator=generator)
    x[:, 1] **= 8
    quantizer = calibrated(x, (2, 1, 1), granularity='head')
    assert quantizer.table().shape == (2, POSITIONS)
    assert not torch.equal(*quantizer.levels)
    codes = quantizer.codes(x)
    for head in range(2):
        assert set(codes[:, head].unique().tolist()) <= set(quantizer.levels[head].tolist())


def test_important_channels_choose_the_levels():
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(4000, 2, generator=generator) ** torch.tensor([1.0, 9.0])

    def error(importance):
        quantizer = ActQuantizer(ActSpec(format='levels'), (2,))
        quantizer.observe()
        quantizer.observer.importance = torch.tensor(importance)
        for _ in range(2):
            quantizer(x)
            quantizer.observer.end_pass()
        quantizer.finish_observing()
        return (quantizer(x) - x).square().mean(0)

    first, second = error([1.0, 1e-6]), error([1e-6, 1.0])
    assert first[0] < second[0]
    assert second[1] < first[1]


def test_gradients_are_those_of_the_rounded_integers():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 5, dtype=torch.float64, generator=generator)
    table = table_of(choose_levels(torch.rand(1, POSITIONS, generator=generator), 3))[0]
    scale = torch.full((5,), 0.05, dtype=torch.float64)
    offset = torch.full((5,), -1.5, dtype=torch.float64)
    inputs = [value.requires_grad_() for value in (x, scale, offset)]
    grad = torch.randn(64, 5, dtype=torch.float64, generator=generator)
    fake_quantize(*inputs, 0, POSITIONS - 1, 0.5, table).backward(grad)
    steps = ((x - offset) / scale).detach()
    inside = (steps >= 0) & (steps <= POSITIONS - 1)
    integers = table.double()[steps.round().clamp(0, POSITIONS - 1).long()]
    torch.testing.assert_close(x.grad, grad * inside)
    torch.testing.assert_close(scale.grad, 0.5 * (grad * (integers - steps * inside)).sum(0))
    torch.testing.assert_close(offset.grad, 0.5 * (grad * ~inside).sum(0))


def test_a_saved_quantizer_keeps_its_levels():
    x = torch.rand(512, 3) ** 3
    saved, other = calibrated(x, (3,)), ActQuantizer(ActSpec(format='levels'), (3,))
    other.table()
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other(x), saved(x))
    state = saved.state_dict()
    state['levels'] = state['levels'].flip(1)
    with pytest.raises(SettingError, match='must increase'):
        other.load_state_dict(state)
    assert torch.equal(other(x), saved(x))


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        (dict(zero_point='integer'), 'zero_point'),
        (dict(zero_point='none', signed=True), 'zero_point'),
        (dict(bits=6), '2, 3, 4, 5 bits'),
        (dict(observer='minmax'), 'observer'),
    ],
)
def test_settings_that_do_not_go_with_levels(spec, message):
    with pytest.raises(SettingError, match=message):
        ActQuantizer(ActSpec(format='levels', **spec), (3,))


def test_a_policy_deals_out_levels_where_they_belong():
    policy = QuantPolicy(activation=dict(format='levels'), probs=dict(format='levels'))
    assert policy.resolve('blocks.0.fc1', 'linear').activation.format == 'levels'
    assert policy.resolve('blocks.0.fc1', 'linear', is_end=True).activation.format == 'integer'
    with pytest.raises(PolicyError, match='levels format is for linear'):
        policy.resolve('conv', 'conv')
