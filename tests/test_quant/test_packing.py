"""The int4 layout: every form is the inverse of its packing, and is laid out as documented."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gplq_mm.quant.packing import (
    PANEL,
    half_width,
    interleave_halves,
    pack_halves,
    pack_multiplier_panels,
    pack_nibbles,
    pack_panels,
    panel_order,
    unpack_halves,
    unpack_multiplier_panels,
    unpack_nibbles,
    unpack_panels,
)

sizes = st.integers(0, 150), st.integers(0, 40), st.integers(0, 2**16)


def codes(rows: int, columns: int, seed: int, bits: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low, high = -min(2 ** (bits - 1), 127), 2 ** (bits - 1)
    return torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.int8)


@settings(deadline=None, max_examples=60)
@given(*sizes)
def test_nibbles_round_trip(rows, columns, seed):
    values = codes(rows, columns, seed)
    packed = pack_nibbles(values)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, (columns + 1) // 2)
    assert torch.equal(unpack_nibbles(packed, columns), values)


def test_first_code_is_in_the_low_nibble_and_padding_is_zero():
    packed = pack_nibbles(torch.tensor([[-8, 7, 1]], dtype=torch.int8))
    assert packed.tolist() == [[0 | 15 << 4, 9 | 8 << 4]]


@pytest.mark.parametrize('bad', [-9, 8, 127])
def test_codes_that_do_not_fit_are_refused(bad):
    with pytest.raises(ValueError, match='-8 to 7'):
        pack_nibbles(torch.tensor([[0, bad]], dtype=torch.int8))


@pytest.mark.parametrize(
    ('packed', 'columns'),
    [(torch.zeros(2, 3, dtype=torch.uint8), 7), (torch.zeros(2, 3, dtype=torch.int8), 6)],
)
def test_bytes_of_another_width_are_refused(packed, columns):
    with pytest.raises(ValueError, match='take'):
        unpack_nibbles(packed, columns)


@settings(deadline=None, max_examples=60)
@given(*sizes, st.sampled_from([2, 3, 4, 5, 8]))
def test_panels_round_trip(rows, columns, seed, bits):
    values = codes(rows, columns, seed, bits)
    panels = pack_panels(values, bits)
    count = -(-rows // PANEL)
    if bits <= 4:
        assert panels.dtype == torch.uint8
        assert panels.shape == (count, columns, PANEL // 2)
    else:
        assert panels.dtype == torch.int8
        assert panels.shape == (count, columns, PANEL)
    assert panels.is_contiguous()
    assert torch.equal(unpack_panels(panels, rows), values)


@settings(deadline=None, max_examples=30)
@given(*sizes)
def test_multipliers_round_trip(rows, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(1, 16, (rows, groups), generator=generator, dtype=torch.uint8)
    panels = pack_multiplier_panels(values)
    assert panels.shape == (-(-rows // PANEL), groups, PANEL)
    assert torch.equal(unpack_multiplier_panels(panels, rows), values)


def test_a_byte_of_a_panel_holds_the_documented_rows():
    """Position b in the low nibble, b + 32 in the high one; position p holds row panel_order."""
    order = panel_order().tolist()
    assert order == [16 * t + 4 * lane + i for lane in range(4) for t in range(4) for i in range(4)]
    assert [order[order[p]] for p in range(PANEL)] == list(range(PANEL))
    values = codes(PANEL, 3, seed=0)
    panels = pack_panels(values, 4)
    for column in range(3):
        for byte in (0, 5, 31):
            stored = int(panels[0, column, byte])
            assert (stored & 15) - 8 == int(values[order[byte], column])
            assert (stored >> 4) - 8 == int(values[order[byte + 32], column])


def test_interleaving_four_columns_restores_the_row_order():
    """What the layout is for: in each 128-bit lane, unpacking bytes then words sorts the rows."""
    rows = torch.arange(PANEL, dtype=torch.int8)
    stored = pack_panels(rows[:, None].repeat(1, 4), 8)[0]
    # Byte b of lane L of column c, as four vectors of 64 bytes.
    lanes = stored.reshape(4, 4, 4, 4)  # column, lane, t, i
    interleaved = lanes.permute(2, 1, 3, 0)  # t, lane, i, column: four consecutive bytes a row
    assert interleaved.reshape(4, 16, 4)[..., 0].flatten().tolist() == rows.tolist()


def test_missing_rows_are_neutral():
    """Rows that fill the last panel hold code 0 and multiplier 1."""
    panels = pack_panels(codes(3, 5, 0), 4)
    filled = unpack_panels(panels, PANEL)
    assert not filled[3:].any()
    multiplier = pack_multiplier_panels(torch.full((3, 2), 7, dtype=torch.uint8))
    assert unpack_multiplier_panels(multiplier, PANEL)[3:].eq(1).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 9), st.integers(0, 300), st.integers(0, 2**16), st.booleans())
def test_halves_round_trip(rows, columns, seed, signed):
    values = codes(rows, columns, seed)
    if not signed:
        values = values + 8
    packed = pack_halves(values)
    assert packed.shape == (rows, half_width(columns))
    assert packed.is_contiguous()
    assert torch.equal(unpack_halves(packed, columns, signed), values)


def test_halves_layout():
    """Byte j: column j in the low nibble, column H + j in the high one; zero past the end."""
    values = codes(1, 100, seed=1)
    packed = pack_halves(values)
    assert packed.shape == (1, 64)
    for byte in range(64):
        assert int(packed[0, byte]) & 15 == int(values[0, byte]) & 15
        high = int(values[0, 64 + byte]) if 64 + byte < 100 else 0
        assert int(packed[0, byte]) >> 4 == high & 15
    assert interleave_halves(torch.arange(128))[:4].tolist() == [0, 64, 1, 65]
