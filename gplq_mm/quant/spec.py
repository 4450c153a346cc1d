"""What is quantized and how: specs for one tensor, and the policy that deals them out.

Nothing here touches a tensor. A spec is frozen, so that one object can travel from the config
to the quantizer, the PTQ method and the deployed header without anyone changing it on the way.
"""

import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

__all__ = ['ActSpec', 'PolicyError', 'QuantPolicy', 'SiteSpec', 'WeightSpec']

ZERO_POINTS = ('none', 'float', 'integer')
GRANULARITIES = ('tensor', 'channel', 'head', 'token')
QUANTIZERS = ('uniform', 'log_sqrt2')
OBSERVERS = ('minmax', 'percentile', 'mse')
LAYOUTS = ('folded', 'raw')

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


class PolicyError(ValueError):
    """A quantization policy that cannot be applied; the message says what to change."""


def _check_choice(owner: str, field: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise PolicyError(f'{owner}.{field}={value!r} is not one of {", ".join(choices)}.')


def _check_bits(owner: str, bits: Any) -> None:
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
        raise PolicyError(f'{owner}.bits={bits!r} must be an integer from 2 to 8.')


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
        observer: Calibration: ``'minmax'``, ``'percentile'`` or ``'mse'``.
        percentile: The two quantiles of the percentile observer, fractions of 1.
        quantizer: ``'uniform'``, or ``'log_sqrt2'`` (powers of sqrt(2); attention
            probabilities only, RepQ-ViT).
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
        _check_choice('activation', 'zero_point', self.zero_point, ZERO_POINTS)
        _check_choice('activation', 'granularity', self.granularity, GRANULARITIES)
        _check_choice('activation', 'observer', self.observer, OBSERVERS)
        _check_choice('activation', 'quantizer', self.quantizer, QUANTIZERS)
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
        if self.zero_point == 'none' and self.signed and self.quantizer == 'uniform':
            return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1


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
        observer: How scales are chosen: ``'mse'``, ``'percentile'`` or ``'minmax'``.
        percentile: Fraction of a row's magnitudes that the percentile observer keeps unclipped.
    """

    bits: int = 4
    layout: str = 'folded'
    group_size: int = 32
    observer: str = 'mse'
    percentile: float = 0.999

    def __post_init__(self):
        _check_bits('weight', self.bits)
        _check_choice('weight', 'layout', self.layout, LAYOUTS)
        _check_choice('weight', 'observer', self.observer, OBSERVERS)
        if not isinstance(self.group_size, int) or self.group_size < 1:
            raise PolicyError(f'weight.group_size={self.group_size!r} must be a positive integer.')
        if not 0.5 < self.percentile <= 1:
            raise PolicyError(f'weight.percentile={self.percentile!r} must lie in (0.5, 1].')

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code. At 8 bits -128 is left out: |multiplier * code| <= 127."""
        return -min(2 ** (self.bits - 1), 127), 2 ** (self.bits - 1) - 1

    @property
    def max_multiplier(self) -> int:
        """Largest group multiplier, so that multiplier * code fits a signed byte."""
        if self.layout == 'raw':
            return 1
        return max(1, min(15, 127 // -self.code_range[0]))


@dataclass(frozen=True)
class SiteSpec:
    """What the policy says of one site: a layer, or an operand of an attention product."""

    activation: ActSpec | None
    weight: WeightSpec | None


# Defaults. The first and last layer stay at 8 bit, as the field does (the paper is silent).
_EIGHT_BIT_ENDS = (
    dict(
        pattern=r'(^|\.)(patch_embed\.|backbone\.conv1$|backbone\.stem\.|^conv1$)',
        activation=dict(bits=8),
        weight=dict(bits=8),
        optional=True,
    ),
    dict(pattern=r'(^|\.)head\.', activation=dict(bits=8), weight=dict(bits=8), optional=True),
)
PRESETS: dict[str, dict] = {
    'gplq': dict(
        activation={},
        weight={},
        q=dict(granularity='head'),
        k=dict(granularity='head'),
        v=dict(granularity='head'),
        probs=dict(granularity='head', zero_point='none', signed=False, row_relative=True),
        rules=_EIGHT_BIT_ENDS,
    ),
    'paper': dict(
        activation=dict(zero_point='none', observer='minmax'),
        weight=dict(layout='raw', observer='percentile'),
        q=dict(zero_point='none', granularity='head', observer='percentile'),
        k=dict(zero_point='none', granularity='head', observer='percentile'),
        v=dict(zero_point='none', granularity='head', observer='percentile'),
        probs=dict(zero_point='none', signed=False, granularity='head', observer='percentile'),
        rules=_EIGHT_BIT_ENDS,
    ),
    # RepQ-ViT (Li et al., ICCV 2023). The features that the head reads are compared with the
    # teacher's, so their LayerNorm stays as it is; RepQ-ViT leaves that one alone, too.
    'repq': dict(
        activation=dict(granularity='tensor', reparametrize=True),
        weight=dict(layout='raw', observer='percentile'),
        q=dict(granularity='tensor'),
        k=dict(granularity='tensor'),
        v=dict(granularity='tensor'),
        probs=dict(granularity='tensor', zero_point='none', signed=False, quantizer='log_sqrt2'),
        rules=(
            *_EIGHT_BIT_ENDS,
            dict(pattern=r'(^|\.)head\.', activation=dict(reparametrize=False), optional=True),
        ),
    ),
}
_RULE_KEYS = {'pattern', 'activation', 'weight', 'exclude', 'optional'}


def _override(spec, changes: dict, where: str):
    known = {f.name for f in fields(spec)}
    unknown = set(changes) - known
    if unknown:
        raise PolicyError(
            f'{where} has unknown key(s) {sorted(unknown)}; known are {sorted(known)}.'
        )
    return replace(spec, **changes)


class QuantPolicy:
    """Ordered rules that give every site of a model its spec.

    Every rule is ``dict(pattern=REGEX, activation={...}, weight={...}, exclude=None,
    optional=False)``. The regular expression is searched in the site's full name
    (``backbone.layers.0.attn.qkv``; the operands of an attention product are called
    ``<attention>.q``, ``.k``, ``.v`` and ``.probs``). All matching rules apply in order, so a
    later rule refines an earlier one; user rules come after the preset's. A rule that does not
    mention ``exclude`` leaves an exclusion as it is.

    Args:
        preset: ``'gplq'`` (asymmetric, MSE, folded groups), ``'paper'`` (symmetric, min-max,
            raw) or ``'repq'`` (RepQ-ViT: asymmetric, one scale a tensor after LayerNorms have
            been reparametrized, powers of sqrt(2) for attention probabilities, raw).
        activation: Overrides of :class:`ActSpec` for layer inputs. Bits, observer and
            percentile also go to the attention operands, ``zero_point`` to q, k and v.
        weight: Overrides of :class:`WeightSpec`.
        q, k, v, probs: Overrides of :class:`ActSpec` for the operands of both attention
            products.
        rules: The ordered rules. A rule that matches no site of the model is an error unless
            it says ``optional=True``.
        exclude: Patterns of sites that stay in float; short for rules with ``exclude=True``,
            and easy to give on a command line.

    Raises:
        PolicyError: For an unknown preset, key or value, or a pattern that is no regular
            expression.
    """

    def __init__(
        self,
        preset: str = 'gplq',
        activation: dict | None = None,
        weight: dict | None = None,
        q: dict | None = None,
        k: dict | None = None,
        v: dict | None = None,
        probs: dict | None = None,
        rules: list | tuple = (),
        exclude: list | tuple = (),
    ):
        _check_choice('policy', 'preset', preset, tuple(PRESETS))
        base = PRESETS[preset]
        self.preset = preset
        activation = dict(activation or {})
        act = _override(ActSpec(**base['activation']), activation, 'policy.activation')
        self.weight = _override(WeightSpec(**base['weight']), dict(weight or {}), 'policy.weight')
        self.activations = {'linear': act, 'conv': act}
        # An operand follows the general setting except in what its nature fixes: its granularity,
        # and that probabilities are never negative.
        shared = {k: v for k, v in activation.items() if k in ('bits', 'observer', 'percentile')}
        if 'zero_point' in activation:
            signed = {'zero_point': activation['zero_point']}
        else:
            signed = {}
        for name, user in zip(OPERANDS, (q, k, v, probs), strict=True):
            general = shared if name == 'probs' else {**shared, **signed}
            spec = _override(ActSpec(**base[name]), general, 'policy.activation')
            self.activations[name] = _override(spec, dict(user or {}), f'policy.{name}')
        excluded = [{'pattern': pattern, 'exclude': True} for pattern in exclude]
        self.rules = [self._check_rule(rule) for rule in (*base['rules'], *rules, *excluded)]

    @staticmethod
    def _check_rule(rule: dict) -> dict:
        rule = {
            'activation': {}, 'weight': {}, 'exclude': None, 'optional': False, **dict(rule)
        }  # fmt: skip
        unknown = set(rule) - _RULE_KEYS
        if unknown or 'pattern' not in rule:
            raise PolicyError(
                f'policy rule {rule} must have a "pattern" and may have '
                f'{sorted(_RULE_KEYS - {"pattern"})}; it has {sorted(rule)}.'
            )
        try:
            re.compile(rule['pattern'])
        except re.error as error:
            raise PolicyError(
                f'policy rule pattern {rule["pattern"]!r} is no regular expression: {error}.'
            ) from error
        _override(ActSpec(), rule['activation'], f'rule {rule["pattern"]!r}.activation')
        _override(WeightSpec(), rule['weight'], f'rule {rule["pattern"]!r}.weight')
        return rule

    def resolve(self, name: str, kind: str) -> SiteSpec:
        """Spec of the site ``name``.

        Args:
            name: Full name of the layer or operand.
            kind: ``'linear'``, ``'conv'``, ``'q'``, ``'k'``, ``'v'`` or ``'probs'``.

        Returns:
            Both parts are None for an excluded site; ``weight`` is None for an operand.

        Raises:
            PolicyError: If the granularity does not suit the kind.
        """
        act = self.activations[kind]
        weight = self.weight if kind in ('linear', 'conv') else None
        excluded = False
        for rule in self.rules:
            if not re.search(rule['pattern'], name):
                continue
            if rule['exclude'] is not None:
                excluded = rule['exclude']
            act = _override(act, rule['activation'], name)
            if weight is not None:
                weight = _override(weight, rule['weight'], name)
        if excluded:
            return SiteSpec(None, None)
        if act.granularity not in SITE_GRANULARITIES[kind]:
            raise PolicyError(
                f'{name}: granularity {act.granularity!r} puts a scale on the reduction axis of '
                f'the product; use one of {", ".join(SITE_GRANULARITIES[kind])}.'
            )
        if act.row_relative and kind != 'probs':
            raise PolicyError(f'{name}: row_relative is for "probs" only.')
        if act.quantizer == 'log_sqrt2' and kind != 'probs':
            raise PolicyError(f'{name}: the log_sqrt2 quantizer is for "probs" only.')
        if kind != 'linear':
            act = replace(act, reparametrize=False)
        return SiteSpec(act, weight)

    def check_matched(self, names: list[str]) -> None:
        """Raises PolicyError if a rule matches none of the site ``names``."""
        for rule in self.rules:
            if rule['optional'] or any(re.search(rule['pattern'], name) for name in names):
                continue
            raise PolicyError(
                f'policy rule {rule["pattern"]!r} matches no layer of this model. Sites are '
                f'named like {", ".join(names[:4])}; correct the pattern, or set optional=True.'
            )

    def differences(self, saved: dict) -> list[str]:
        """Keys of :meth:`to_dict` in which a saved policy says something else.

        Args:
            saved: Of :meth:`to_dict`, maybe of an earlier version: what it did not know yet is
                at its default there.
        """
        own, saved = self.to_dict(), dict(saved)
        saved['weight'] = {**asdict(WeightSpec()), **saved.get('weight', {})}
        saved['activations'] = {
            key: {**asdict(ActSpec()), **spec} for key, spec in saved.get('activations', {}).items()
        }
        return [key for key in own if saved.get(key) != own[key]]

    @property
    def label(self) -> str:
        """Short name of the widths, for example ``'w4a4'``."""
        return f'w{self.weight.bits}a{self.activations["linear"].bits}'

    def to_dict(self) -> dict:
        """Plain data that says everything the policy does; stored in checkpoints."""
        return {
            'preset': self.preset,
            'weight': asdict(self.weight),
            'activations': {
                key: {**asdict(spec), 'percentile': list(spec.percentile)}
                for key, spec in self.activations.items()
            },
            'rules': [
                {**rule, 'activation': dict(rule['activation']), 'weight': dict(rule['weight'])}
                for rule in self.rules
            ],
        }
