"""Codes that stand for chosen levels: what the ops make of a table, on every instruction set."""

import pytest
import torch
from attention_cases import AttentionCase, random_case
from packed_layers import NO_TABLE, error_of, random_input, random_layer

from gplq_mm.ops import reference

ops = torch.ops.gplq_mm
TABLE = torch.arange(64, dtype=torch.uint8)


def attend(case: AttentionCase) -> torch.Tensor:
    return ops.int4_attention(*case.args)


@pytest.mark.parametrize('columns', [1, 31, 32, 63, 64, 65, 200])
def test_levels_are_what_the_table_holds_at_the_position(isa, columns):
    one, zero = torch.ones(columns), torch.zeros(columns)
    table = random_layer(1, 1, levels=16).layer[8]
    values = torch.cat((torch.arange(-3, 68).float(), torch.tensor([torch.nan, -1e30, torch.inf])))
    levels = ops.quantize_codes(values[:, None].expand(-1, columns), one, zero, [0, 63], table)
    position = values.nan_to_num(nan=0.0).clamp(0, 63).long()
    assert torch.equal(levels, table[position][:, None].expand(-1, columns))


@pytest.mark.parametrize('columns', [1, 4, 70, 901])
@pytest.mark.parametrize('largest', [15, 16, 63])
def test_largest_sums_of_levels_do_not_saturate(isa, largest, columns):
    case = random_layer(70, columns, 8, group_size=64, extreme=True, levels=16)
    case.layer[8] = torch.arange(64).clamp(max=largest).to(torch.uint8)
    x = torch.full((7, columns), 1e4)
    codes = torch.full((7, columns), largest)
    assert torch.equal(ops.int4_accumulate(x, case.layer, case.grid), case.sums(codes))


def test_a_table_of_every_position_changes_nothing_in_a_layer(isa):
    case = random_layer(70, 50, act_bits=6)
    x = random_input(case, 5)
    out = ops.int4_linear(x, [*case.layer[:8], TABLE], case.grid)
    assert torch.equal(out, ops.int4_linear(x, case.layer, case.grid))


@pytest.mark.parametrize('level', [0, 63])
def test_the_largest_sums_of_levels_are_exact(isa, level):
    """All levels at the end that makes the sums largest; 32 is taken off those of k and v."""
    channels, tokens = 131, 70
    grids = torch.zeros(4, 2, 1)
    grids[:, 0] = 1.0
    highest = torch.full((1, 64), 63, dtype=torch.uint8)
    tables = [highest, torch.full_like(highest, level), torch.full_like(highest, level), highest]
    qkv = torch.randn(1, tokens, 3 * channels)
    case = AttentionCase(qkv, 1, 2.0**-24, grids, [0, 63] * 4, tables)
    # All scores are equal; so are all numerators, whose level is 63.
    assert torch.equal(attend(case), torch.full((1, tokens, channels), 63.0 * level))


def test_a_table_of_every_position_changes_nothing_in_an_attention(isa):
    case = random_case(2, 19, 3, 10, (6, 6, 6, 6))
    case.tables = [TABLE.expand(3, -1)] * 4
    assert torch.equal(attend(case), attend(case.but(tables=[NO_TABLE] * 4)))


def test_each_head_has_its_own_levels(isa):
    case = random_case(2, 11, 3, 6, levels=(16, 16, 16, 16))
    whole = attend(case).unflatten(-1, (3, 6))
    for head in range(3):
        own = case.but(
            qkv=case.qkv.unflatten(-1, (3, 3, 6))[:, :, :, head].flatten(2),
            heads=1,
            grids=case.grids[..., head : head + 1],
            tables=[table[head : head + 1] for table in case.tables],
        )
        assert torch.equal(whole[..., head, :], attend(own))


LAYER = random_layer(70, 40, levels=16)
X = random_input(LAYER, 3)
TABLES = {
    'shape': (TABLE[:16], [0, 63, 32], r'table must have shape \[64\], got \[16\]'),
    'dtype': (TABLE.int(), [0, 63, 32], 'table must be uint8, got int32'),
    'other codes': (
        TABLE,
        [0, 15, 32],
        r'codes must be positions 0\.\.63 where table has levels, got 0\.\.15',
    ),
    'level too large': (TABLE + 1, [0, 63, 32], r'table must lie in 0\.\.63, got 1\.\.64'),
    'levels that descend': (TABLE.flip(0), [0, 63, 32], 'table must hold levels that ascend'),
}


@pytest.mark.parametrize('name', TABLES)
def test_a_bad_table_is_named_in_the_same_words_everywhere(name):
    table, grid, message = TABLES[name]
    calls = {
        'int4_linear': (X, [*LAYER.layer[:8], table], grid),
        'quantize_codes': (X, *LAYER.layer[:2], grid, table),
    }
    for op, args in calls.items():
        with pytest.raises(ValueError, match=message):
            getattr(ops, op)(*args)
        assert error_of(getattr(ops, op), *args) == error_of(getattr(reference, op), *args)


CASE = random_case(2, 6, 2, 4)
PAIR = TABLE.expand(2, -1)
BAD_ATTENTION = {
    'tables': (CASE.but(tables=[NO_TABLE]), 'tables must be those of q, k, .* got 1 tensors'),
    'table of another head': (
        CASE.but(tables=[NO_TABLE, PAIR[:1], NO_TABLE, NO_TABLE], limits=[0, 63] * 4),
        r'tables\[1\] must have shape \[2, 64\], got \[1, 64\]',
    ),
    'table dtype': (
        CASE.but(tables=[PAIR.int()] * 4, limits=[0, 63] * 4),
        r'tables\[0\] must be uint8, got int32',
    ),
    'table beside other codes': (
        CASE.but(tables=[NO_TABLE, NO_TABLE, NO_TABLE, PAIR]),
        r'codes must be positions 0\.\.63 where tables\[3\] has levels, got 0\.\.15',
    ),
    'level too large': (
        CASE.but(tables=[PAIR + 1] * 4, limits=[0, 63] * 4),
        r'tables\[0\] must lie in 0\.\.63, got 1\.\.64',
    ),
    'levels that descend': (
        CASE.but(tables=[PAIR, PAIR.flip(1), PAIR, PAIR], limits=[0, 63] * 4),
        r'tables\[1\] must hold levels that ascend',
    ),
}


@pytest.mark.parametrize('name', BAD_ATTENTION)
def test_bad_tables_of_an_attention_are_named_in_the_same_words_everywhere(name):
    case, message = BAD_ATTENTION[name]
    with pytest.raises(ValueError, match=message):
        attend(case)
    assert error_of(attend, case) == error_of(reference.int4_attention, *case.args)
