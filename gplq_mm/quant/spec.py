"""How one tensor is quantized.

Nothing here touches a tensor. A spec is frozen, so that one object can travel from the config
to the quantizer, the PTQ method and the deployed header without anyone changing it on the way.
"""

from dataclasses import asdict, dataclass
from typing import Any

from mmengine.registry import Registry

from ..errors import SettingError
from ..registry import OBSERVERS, QUANTIZERS, registered

__all__ = ['ActSpec', 'PolicyError', 'SiteSpec', 'WeightSpec']

ZERO_POINTS = ('none', 'float', 'integer')
GRANULARITIES = ('tensor', 'channel', 'head', 'token')
WEIGHT_OBSERVERS = ('minmax', 'percentile', 'mse')
LAYOUTS = ('folded', 'raw')
GROUP_SCALES = ('integer', 'float')
# Settings that are younger than the first files, and what a file means that does not name them.
LATER_FIELDS = {'group_scale': 'integer', 'reparametrize': False}

# Granularities whose scale does not lie on the reduction axis of the product that follows, or
# can be folded into a weight before that is quantized. Anything else is not an integer product.
SITE_GRANULARITIES = {
    'linear': ('tensor', 'channel'),
    'conv': ('tensor', 'channel'),
    'q': ('tensor', 'head', 'token'),
    'k': ('tensor', 'head', 'token'),
    'v': ('tensor', 'head'),
    'probs': ('tensor', 'head', 'token'),
}
OPERANDS = ('q', 'k', 'v', 'probs')


class PolicyError(SettingError):
    """A quantization policy that cannot be applied; the message says what to change."""


def check_choice(owner: str, field: str, value: Any, choices: tuple) -> None:
    """Raises PolicyError if a setting is none of its choices."""
    if value not in choices:
        raise PolicyError(f'{owner}.{field}={value!r} is not one of {", ".join(choices)}.')


def _check_registered(field: str, value: Any, registry: Registry) -> None:
    names = registered(registry)
    if not isinstance(value, str) or value not in names:
        raise PolicyError(
            f'activation.{field}={value!r} is not one of {", ".join(names)}. One of your own is '
            'known once its module is imported; a config does that with custom_imports.'
        )


def _check_bits(owner: str, bits: Any) -> None:
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
        raise PolicyError(f'{owner}.bits={bits!r} must be an integer from 2 to 8.')


def _without_later_defaults(settings: dict) -> dict:
    """Leaves out what the first files mean without naming it, so that theirs are still the same."""
    return {
        key: value
        for key, value in settings.items()
        if key not in LATER_FIELDS or value != LATER_FIELDS[key]
    }


@dataclass(frozen=True)
class ActSpec:
    """How one activation tensor is quantized.

    Attributes:
        bits: Width of a code, 2 to 8.
        zero_point: ``'none'`` (symmetric), ``'float'`` (LSQ+: a learned real offset) or
            ``'integer'`` (zero is exactly representable, as zero-padded convolutions need).
        signed: With ``zero_point='none'``: codes from ``-2**(bits-1)`` if True, from 0 if
            False (for tensors that are never negative). Ignored otherwise.
        granularity: ``'tensor'``, ``'channel'``, ``'head'`` or ``'token'``: what shares a scale.
        observer: Calibration: ``'minmax'``, ``'percentile'``, ``'mse'``, or another entry of
            ``gplq_mm.registry.OBSERVERS``.
        percentile: The two quantiles of the percentile observer, fractions of 1.
        quantizer: ``'uniform'``, ``'log_sqrt2'`` (zero and powers of sqrt(2); attention
            probabilities only, RepQ-ViT), or another entry of ``gplq_mm.registry.QUANTIZERS``.
        tokens: Number of tokens, needed by ``granularity='token'`` where the layer itself does
            not know it (a Swin window does, a ViT does not).
        row_relative: Attention probabilities only: quantize them relative to the largest of
            their row, that is ``exp(score - row maximum)``. The learned scale stays static.
        reparametrize: With ``granularity='tensor'``: where a Linear reads the output of a
            LayerNorm, every channel is calibrated on its own, and the LayerNorm then brings all
            of them to the one scale and zero-point of the tensor (RepQ-ViT,
            :mod:`gplq_mm.ptq.norms`). No other input is touched by it.
    """

    bits: int = 4
    zero_point: str = 'float'
    signed: bool = True
    granularity: str = 'channel'
    observer: str = 'mse'
    percentile: tuple[float, float] = (0.01, 0.99)
    quantizer: str = 'uniform'
    tokens: int | None = None
    row_relative: bool = False
    reparametrize: bool = False

    def __post_init__(self):
        _check_bits('activation', self.bits)
        check_choice('activation', 'zero_point', self.zero_point, ZERO_POINTS)
        check_choice('activation', 'granularity', self.granularity, GRANULARITIES)
        _check_registered('observer', self.observer, OBSERVERS)
        _check_registered('quantizer', self.quantizer, QUANTIZERS)
        if not isinstance(self.percentile, (list, tuple)) or len(self.percentile) != 2:
            raise PolicyError(f'activation.percentile={self.percentile!r} must be two fractions.')
        object.__setattr__(self, 'percentile', tuple(self.percentile))
        low, high = self.percentile
        if not 0 <= low < high <= 1:
            raise PolicyError(
                f'activation.percentile={self.percentile} must be two increasing fractions of 1.'
            )
        if self.reparametrize and (self.granularity != 'tensor' or self.zero_point == 'integer'):
            raise PolicyError(
                'activation.reparametrize=True leads to one scale and one real zero-point a '
                f'tensor, not to granularity={self.granularity!r} and zero_point='
                f'{self.zero_point!r}; '
                "set granularity='tensor' and zero_point='float' or 'none', or reparametrize=False."
            )

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code, both included."""
        signed = self.signed and registered(QUANTIZERS)[self.quantizer].has_signed_codes
        if self.zero_point == 'none' and signed:
            return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1

    def to_dict(self) -> dict:
        """Plain data for files, without :data:`LATER_FIELDS` that are at their default."""
        return {**_without_later_defaults(asdict(self)), 'percentile': list(self.percentile)}


@dataclass(frozen=True)
class WeightSpec:
    """How one weight is quantized: signed codes, no zero-point, one float scale a row.

    Attributes:
        bits: Width of a code, 2 to 8.
        layout: ``'folded'``: the activation scale is multiplied into the weight first, columns
            are sorted by it, and every ``group_size`` of them share an integer multiplier of
            the row's scale, so that the product is an integer GEMM. ``'raw'``: the weight is
            quantized on its own, one scale a row (the paper's simulation).
        group_size: Columns that share a multiplier (``folded`` only).
        group_scale: ``'integer'``: multipliers are integers, what an integer GEMM computes.
            ``'float'``: each group has a float scale of its own, a simulation to compare with
            (``folded`` only).
        observer: How scales are chosen: ``'mse'``, ``'percentile'`` or ``'minmax'``.
        percentile: Fraction of a row's magnitudes that the percentile observer keeps unclipped.
    """

    bits: int = 4
    layout: str = 'folded'
    group_size: int = 32
    observer: str = 'mse'
    percentile: float = 0.999
    group_scale: str = 'integer'

    def __post_init__(self):
        _check_bits('weight', self.bits)
        check_choice('weight', 'layout', self.layout, LAYOUTS)
        check_choice('weight', 'group_scale', self.group_scale, GROUP_SCALES)
        check_choice('weight', 'observer', self.observer, WEIGHT_OBSERVERS)
        if not isinstance(self.group_size, int) or self.group_size < 1:
            raise PolicyError(f'weight.group_size={self.group_size!r} must be a positive integer.')
        if not 0.5 < self.percentile <= 1:
            raise PolicyError(f'weight.percentile={self.percentile!r} must lie in (0.5, 1].')

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code. At 8 bits -128 is left out: |multiplier * code| <= 127."""
        return -min(2 ** (self.bits - 1), 127), 2 ** (self.bits - 1) - 1

    @property
    def has_float_groups(self) -> bool:
        """Whether every group has a float scale of its own."""
        return self.layout == 'folded' and self.group_scale == 'float'

    @property
    def max_multiplier(self) -> int:
        """Largest integer multiplier, so that multiplier * code fits a signed byte."""
        if self.layout == 'raw':
            return 1
        return max(1, min(15, 127 // -self.code_range[0]))

    @property
    def has_one_step(self) -> bool:
        """Whether all columns of a row have the same step."""
        return self.max_multiplier == 1 and not self.has_float_groups

    def to_dict(self) -> dict:
        """Plain data for files, without :data:`LATER_FIELDS` that are at their default."""
        return _without_later_defaults(asdict(self))


@dataclass(frozen=True)
class SiteSpec:
    """What the policy says of one site: a layer, or an operand of an attention product."""

    activation: ActSpec | None
    weight: WeightSpec | None
