"""How one tensor is quantized.

Nothing here touches a tensor. A spec is frozen, so that one object can travel from the config
to the quantizer, the PTQ method and the deployed header without anyone changing it on the way.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from mmengine.registry import Registry

from ..errors import SettingError
from ..registry import FORMATS, OBSERVERS, registered
from .format import Format

ZERO_POINTS = ('none', 'float', 'integer')
GRANULARITIES = ('tensor', 'channel', 'head', 'token')
WEIGHT_OBSERVERS = ('minmax', 'percentile', 'mse')
LAYOUTS = ('folded', 'raw')
GROUP_SCALES = ('integer', 'float')

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


def _check_registered(owner: str, field: str, value: Any, registry: Registry) -> None:
    names = registered(registry)
    if not isinstance(value, str) or value not in names:
        raise PolicyError(
            f'{owner}.{field}={value!r} is not one of {", ".join(names)}. One of your own is '
            'known once its module is imported; a config does that with custom_imports.'
        )


def _check_bits(owner: str, bits: Any) -> None:
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
        raise PolicyError(f'{owner}.bits={bits!r} must be an integer from 2 to 8.')


def completed(kind: type, stored: Mapping) -> dict:
    """All fields of a stored spec; what its writer did not know is at its default.

    Args:
        kind: :class:`ActSpec` or :class:`WeightSpec`.
        stored: Of their ``to_dict``, or some of it.
    """
    stored = dict(stored)
    if 'quantizer' in stored:
        # What the first files call the format.
        name = stored.pop('quantizer')
        stored['format'] = 'integer' if name == 'uniform' else name
    return {**kind().to_dict(), **stored}


class _Coded:
    """What both specs say of their codes."""

    _owner = ''

    @property
    def settings(self) -> dict:
        """What the format leaves no choice in.

        Raises:
            PolicyError: If it is not meant for this spec.
        """
        found = getattr(registered(FORMATS)[self.format], self._owner)
        if found is None:
            raise PolicyError(f'{self._owner}.format={self.format!r} is not meant for it.')
        return found

    def with_bits(self, bits: int):
        """The same at another width; of integers where the format has no such width."""
        has_it = bits in registered(FORMATS)[self.format].widths
        return replace(self, bits=bits, format=self.format if has_it else 'integer')

    @cached_property
    def code_format(self) -> Format:
        """What a code stands for.

        Raises:
            PolicyError: If another setting does not go with the format.
        """
        widths = registered(FORMATS)[self.format].widths
        if self.bits not in widths:
            raise PolicyError(
                f'{self._owner}.bits={self.bits} does not go with format={self.format!r}, which '
                f'has {", ".join(map(str, widths))} bits.'
            )
        for key, value in self.settings.items():
            if getattr(self, key) != value:
                raise PolicyError(
                    f'{self._owner}.{key}={getattr(self, key)!r} does not go with format='
                    f'{self.format!r}; set {key}={value!r}.'
                )
        return registered(FORMATS)[self.format](*self._codes())

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code, both included."""
        return self.code_format.qmin, self.code_format.qmax


@dataclass(frozen=True)
class ActSpec(_Coded):
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
        format: What a code stands for: ``'integer'``, ``'log_sqrt2'`` (zero and powers of sqrt(2);
            attention probabilities only, RepQ-ViT), ``'levels'`` (``2**bits`` chosen integers,
            :mod:`.levels`), ``'mxfp4'``, ``'nvfp4'`` (block-scaled,
            :mod:`.block_format`), or another entry of ``gplq_mm.registry.FORMATS``.
        tokens: Number of tokens, needed by ``granularity='token'`` where the layer itself does
            not know it (a Swin window does, a ViT does not).
        row_relative: Attention probabilities only: quantize them relative to the largest of
            their row, that is ``exp(score - row maximum)``. The learned scale stays static.
        reparametrize: With ``granularity='tensor'``: where a Linear reads the output of a
            LayerNorm, every channel is calibrated on its own, and the LayerNorm then brings all
            of them to the one scale and zero-point of the tensor (RepQ-ViT,
            :mod:`gplq_mm.ptq.norms`). No other input is touched by it.
    """

    _owner = 'activation'

    bits: int = 4
    zero_point: str = 'float'
    signed: bool = True
    granularity: str = 'channel'
    observer: str = 'mse'
    percentile: tuple[float, float] = (0.01, 0.99)
    format: str = 'integer'
    tokens: int | None = None
    row_relative: bool = False
    reparametrize: bool = False

    def __post_init__(self):
        _check_bits('activation', self.bits)
        check_choice('activation', 'zero_point', self.zero_point, ZERO_POINTS)
        check_choice('activation', 'granularity', self.granularity, GRANULARITIES)
        _check_registered('activation', 'observer', self.observer, OBSERVERS)
        _check_registered('activation', 'format', self.format, FORMATS)
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

    def _codes(self) -> tuple:
        return self.bits, self.zero_point, self.signed

    def to_dict(self) -> dict:
        """Plain data for files."""
        return {**asdict(self), 'percentile': list(self.percentile)}


@dataclass(frozen=True)
class WeightSpec(_Coded):
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
        format: What a code stands for: ``'integer'``, ``'mxfp4'``, ``'nvfp4'``, or another entry
            of ``gplq_mm.registry.FORMATS`` that is meant for weights.
    """

    _owner = 'weight'

    bits: int = 4
    layout: str = 'folded'
    group_size: int = 32
    observer: str = 'mse'
    percentile: float = 0.999
    group_scale: str = 'integer'
    format: str = 'integer'

    def __post_init__(self):
        _check_bits('weight', self.bits)
        _check_registered('weight', 'format', self.format, FORMATS)
        check_choice('weight', 'layout', self.layout, LAYOUTS)
        check_choice('weight', 'group_scale', self.group_scale, GROUP_SCALES)
        check_choice('weight', 'observer', self.observer, WEIGHT_OBSERVERS)
        if not isinstance(self.group_size, int) or self.group_size < 1:
            raise PolicyError(f'weight.group_size={self.group_size!r} must be a positive integer.')
        if not 0.5 < self.percentile <= 1:
            raise PolicyError(f'weight.percentile={self.percentile!r} must lie in (0.5, 1].')

    def _codes(self) -> tuple:
        # Of 8 bits -128 is left out: |multiplier * code| <= 127.
        return self.bits, 'none', True, 127

    @property
    def is_folded(self) -> bool:
        """Whether the activation scale is multiplied into the weight first."""
        return self.layout == 'folded'

    @property
    def has_groups(self) -> bool:
        """Whether a row has several scales, of its groups or of the blocks of the format."""
        return self.is_folded or self.code_format.block_size is not None

    def group_width(self, columns: int) -> int:
        """Columns of ``columns`` that share a multiplier; a whole row without groups."""
        return self.group_size if self.has_groups else max(columns, 1)

    @property
    def has_float_groups(self) -> bool:
        """Whether every group has a float scale of its own."""
        return self.has_groups and self.group_scale == 'float'

    @property
    def multiplier_dtype(self) -> torch.dtype:
        """Type of the multipliers of groups: uint8, or float32 with float group scales."""
        return torch.float32 if self.has_float_groups else torch.uint8

    @property
    def max_multiplier(self) -> int:
        """Largest integer multiplier, so that multiplier * code fits a signed byte."""
        return max(1, min(15, 127 // -self.code_range[0])) if self.is_folded else 1

    @property
    def has_one_step(self) -> bool:
        """Whether all columns of a row have the same step."""
        return self.max_multiplier == 1 and not self.has_float_groups

    def to_dict(self) -> dict:
        """Plain data for files."""
        return asdict(self)


@dataclass(frozen=True)
class SiteSpec:
    """What the policy says of one site: a layer, or an operand of an attention product."""

    activation: ActSpec | None
    weight: WeightSpec | None
