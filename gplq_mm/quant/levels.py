"""Integers that are not equidistant: few chosen levels on a fine grid.

A value is mapped to one of 64 positions, by the scale and the offset of its channel, and then
rounded to the nearest level of the tensor: one of ``2**bits`` positions. What is multiplied is the
position of the level, an integer of 0..63. So products are those of integers of one byte as ever;
a code of ``bits`` bits says which level it is.
"""

import torch
from torch import Tensor

from ..errors import SettingError
from ..registry import FORMATS
from .format import IntegerFormat
from .functional import POSITIONS, fake_quantize, look_up


@FORMATS.register_module(name='levels')
class LevelsFormat(IntegerFormat):
    """``2**bits`` of 64 positions, chosen at calibration; code q stands for
    ``scale * level + offset``."""

    weight = None
    widths = range(2, 6)
    # A range and levels are searched over a histogram; one grid after a LayerNorm has none.
    activation = dict(observer='mse', reparametrize=False)
    # A convolution pads with zeros, which no level may stand for.
    sites = ('linear', 'q', 'k', 'v', 'probs')
    has_levels = True

    def __init__(self, bits: int, zero_point: str = 'none', signed: bool = True, largest=None):
        if zero_point == 'integer' or (zero_point == 'none' and signed):
            raise SettingError(
                'levels are counted from the lower end of a range: they go with '
                "zero_point='float', or with zero_point='none' and signed=False, not with "
                f'zero_point={zero_point!r} and signed={signed}.'
            )
        super().__init__(bits, zero_point, signed, largest)
        self.qmax = POSITIONS - 1

    def codes(
        self, x: Tensor, scale: Tensor, offset: Tensor | None, table: Tensor | None = None
    ) -> Tensor:
        """Levels of ``x``; without a table its positions."""
        return look_up(super().codes(x, scale, offset), table)

    def fake_quantize(
        self,
        x: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        grad_scale: float,
        table: Tensor | None = None,
    ) -> Tensor:
        return fake_quantize(x, scale, offset, self.qmin, self.qmax, grad_scale, table)


def uniform_levels(bits: int) -> Tensor:
    """Levels at about equal distances from 0 to 63, uint8 ``(1, 2**bits)``."""
    return torch.linspace(0, POSITIONS - 1, 2**bits).round().to(torch.uint8)[None]


def check_levels(levels: Tensor, bits: int) -> None:
    """Checks a codebook.

    Args:
        levels: ``(rows, n)``.
        bits: Width of a code.

    Raises:
        SettingError: For more levels than codes, levels that repeat or are not in order, or
            beyond 0..63.
    """
    if levels.dim() != 2 or not 1 <= levels.shape[1] <= 2**bits:
        raise SettingError(
            f'a codebook of {bits} bits has 1 to {2**bits} levels a row, got shape '
            f'{tuple(levels.shape)}.'
        )
    values = levels.long()
    if bool((values.diff(dim=1) <= 0).any()):
        row = int((values.diff(dim=1) <= 0).any(1).nonzero()[0])
        raise SettingError(
            f'the levels of a codebook must increase, and none may repeat; got '
            f'{values[row].tolist()}. Sort them, and leave out what repeats.'
        )
    if int(values.min()) < 0 or int(values.max()) >= POSITIONS:
        raise SettingError(
            f'levels must lie in 0..{POSITIONS - 1}, got {int(values.min())}..{int(values.max())}.'
        )


def table_of(levels: Tensor) -> Tensor:
    """Level that each position is rounded to, the lower one of two that are as near.

    Args:
        levels: uint8 ``(rows, n)``, increasing.

    Returns:
        uint8 ``(rows, 64)``.
    """
    positions = torch.arange(POSITIONS, device=levels.device)
    nearest = (positions[None, :, None] - levels.long()[:, None]).abs().argmin(2)
    return levels.gather(1, nearest)


def choose_levels(counts: Tensor, bits: int) -> Tensor:
    """Levels of least squared error: one-dimensional k-means, solved exactly.

    A cluster is an interval of positions, its level their mean, rounded. The best partition of
    the positions below an end is found for every number of clusters by dynamic programming (Wang
    and Song, Ckmeans.1d.dp, R Journal 2011).

    Args:
        counts: ``(rows, 64)``, weight of a value at each position, not negative.
        bits: Width of a code.

    Returns:
        uint8 ``(rows, 2**bits)``, increasing.
    """
    rows, device = len(counts), counts.device
    counts = counts.double()
    # Positions that nobody has seen count a little, so that no cluster is without a mean.
    counts = counts + 1e-9 * counts.sum(1, keepdim=True) + 1e-30
    position = torch.arange(POSITIONS, dtype=torch.float64, device=device)
    powers = torch.stack([counts, counts * position, counts * position**2])
    below = torch.nn.functional.pad(powers.cumsum(2), (1, 0))
    # (rows, begin, end): weight, first and second moment of the positions begin..end - 1.
    weight, first, second = below[:, :, None, :] - below[:, :, :, None]
    ends = torch.arange(POSITIONS + 1, device=device)
    is_cluster = ends[:, None] < ends
    mean = torch.where(is_cluster, first / torch.where(is_cluster, weight, 1), 0).round()
    error = second - 2 * mean * first + mean**2 * weight
    error = torch.where(is_cluster, error, torch.inf)
    best, begins = error[:, 0], []
    for _ in range(2**bits - 1):
        best, begin = (best[:, :, None] + error).min(1)
        begins.append(begin)
    end = torch.full((rows, 1), POSITIONS, device=device)
    levels = []
    for begin in [*reversed(begins), torch.zeros_like(begins[0])]:
        start = begin.gather(1, end)
        levels.append(mean[torch.arange(rows, device=device)[:, None], start, end])
        end = start
    return torch.cat(levels[::-1], 1).to(torch.uint8)
