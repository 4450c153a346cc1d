"""The policy that deals out specs to the sites of a model."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import fields, replace

from .spec import (
    OPERANDS,
    SITE_GRANULARITIES,
    ActSpec,
    PolicyError,
    SiteSpec,
    WeightSpec,
    check_choice,
    completed,
)

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
# The first of the percentiles that RepQ-ViT tries. It takes the one of least squared error, but in
# ViT-Ti the input of one layer has four values above 50 an image, up to 218, and 9,999 of 10,000
# below 4: a grid that covers the few has the least error, and rounds all others to one value.
_PER_TENSOR = dict(granularity='tensor', observer='percentile', percentile=(0.001, 0.999))
_LEVELS = dict(format='levels', granularity='head')
_PROBS = dict(zero_point='none', signed=False, row_relative=True)


def _equidistant(bits: int) -> dict:
    operand = dict(bits=bits, granularity='head')
    return dict(
        activation=dict(bits=bits),
        weight={},
        q=operand,
        k=operand,
        v=operand,
        probs=dict(**operand, **_PROBS),
        rules=_EIGHT_BIT_ENDS,
    )


PRESETS: dict[str, dict] = {
    'gplq': _equidistant(4),
    # Sixteen levels where they serve best, instead of equidistant ones.
    'gplq-levels': dict(
        activation=dict(format='levels'),
        conv=dict(format='integer'),
        weight={},
        q=_LEVELS,
        k=_LEVELS,
        v=_LEVELS,
        probs=dict(**_LEVELS, **_PROBS),
        rules=_EIGHT_BIT_ENDS,
    ),
    # Products are those of bytes, so more bits of activations cost no time; up to six also where
    # two of them are added in 16 bits (AVX2). Their squared error is a sixteenth.
    'gplq-mixed': _equidistant(6),
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
        activation=dict(reparametrize=True, **_PER_TENSOR),
        weight=dict(layout='raw', observer='percentile'),
        q=_PER_TENSOR,
        k=_PER_TENSOR,
        v=_PER_TENSOR,
        probs=dict(granularity='tensor', zero_point='none', signed=False, format='log_sqrt2'),
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
    if 'bits' in changes and 'format' not in changes:
        spec = spec.with_bits(changes['bits'])
    spec = replace(spec, **changes)
    for key, value in spec.settings.items() if 'format' in changes else ():
        if changes.get(key, value) != value:
            raise PolicyError(
                f'{where}.{key}={changes[key]!r} does not go with format={spec.format!r}, '
                f'which has {key}={value!r}.'
            )
    return spec


def _completed(policy: Mapping) -> dict:
    """A saved policy with all fields of its specs."""
    activations = {key: completed(ActSpec, spec) for key, spec in policy['activations'].items()}
    # The first files do not tell it from other layers.
    activations.setdefault('hidden', activations['linear'])
    return {
        **policy,
        'weight': completed(WeightSpec, policy['weight']),
        'activations': activations,
    }


def _activation_part(policy: Mapping) -> dict:
    """What of a policy, of :meth:`QuantPolicy.to_dict`, acts before Stage 2."""
    rules = [
        {key: rule[key] for key in ('pattern', 'activation', 'exclude')}
        for rule in policy['rules']
        if rule['activation'] or rule['exclude'] is not None
    ]
    return {'activations': policy['activations'], 'rules': rules}


class QuantPolicy:
    """Ordered rules that give every site of a model its spec.

    Every rule is ``dict(pattern=REGEX, activation={...}, weight={...}, exclude=None,
    optional=False)``. The regular expression is searched in the site's full name
    (``backbone.layers.0.attn.qkv``; the operands of an attention product are called
    ``<attention>.q``, ``.k``, ``.v`` and ``.probs``). All matching rules apply in order, so a
    later rule refines an earlier one; user rules come after the preset's. A rule that does not
    mention ``exclude`` leaves an exclusion as it is.

    Args:
        preset: ``'gplq'`` (asymmetric, MSE, folded groups), ``'gplq-levels'`` (the same with
            chosen levels, :mod:`.levels`), ``'gplq-mixed'`` (6 bits for activations),
            ``'paper'`` (symmetric, min-max, raw) or ``'repq'`` (RepQ-ViT: asymmetric, one scale a
            tensor after LayerNorms have been reparametrized, zero and powers of sqrt(2) for
            attention probabilities, raw).
        activation: Overrides of :class:`ActSpec` for layer inputs. Bits, observer and
            percentile also go to the attention operands, ``zero_point`` to q, k and v.
        weight: Overrides of :class:`WeightSpec`.
        conv: Overrides of ``activation`` for convolutions.
        hidden: Overrides of ``activation`` for the hidden values of MLPs that a family knows, the
            inputs of their second Linear.
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
        conv: dict | None = None,
        hidden: dict | None = None,
        q: dict | None = None,
        k: dict | None = None,
        v: dict | None = None,
        probs: dict | None = None,
        rules: list | tuple = (),
        exclude: list | tuple = (),
    ):
        check_choice('policy', 'preset', preset, tuple(PRESETS))
        base = PRESETS[preset]
        self.preset = preset
        activation = dict(activation or {})
        act = _override(ActSpec(**base['activation']), activation, 'policy.activation')
        self.weight = _override(WeightSpec(**base['weight']), dict(weight or {}), 'policy.weight')
        self.activations = {'linear': act}
        for name, user in (('conv', conv), ('hidden', hidden)):
            changes = {**base.get(name, {}), **dict(user or {})}
            self.activations[name] = _override(act, changes, f'policy.{name}')
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

    @classmethod
    def of(cls, policy: 'Mapping | str | QuantPolicy | None') -> 'QuantPolicy':
        """The policy of its arguments, of a preset's name, or one as it is.

        Raises:
            PolicyError: As the class, and for what is no argument of it.
        """
        if isinstance(policy, QuantPolicy):
            return policy
        policy = {'preset': policy} if isinstance(policy, str) else policy or {}
        known = list(inspect.signature(cls).parameters)
        if not isinstance(policy, Mapping) or set(policy) - set(known):
            raise PolicyError(
                f'policy must be the name of a preset or a dict with some of {", ".join(known)}; '
                f'it is {policy!r}.'
            )
        for key in ('activation', 'weight', 'conv', 'hidden', *OPERANDS):
            if not isinstance(policy.get(key) or {}, Mapping):
                raise PolicyError(
                    f'policy.{key}={policy[key]!r} must be a dict, such as {key}=dict(bits=4).'
                )
        return cls(**policy)

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

    def resolve(self, name: str, kind: str, is_end: bool = False) -> SiteSpec:
        """Spec of the site ``name``.

        Args:
            name: Full name of the layer or operand.
            kind: ``'linear'``, ``'hidden'`` (the second Linear of an MLP), ``'conv'``, ``'q'``,
                ``'k'``, ``'v'`` or ``'probs'``.
            is_end: Whether it is a first or last layer of a model, which the presets' own rules
                miss: they go by names of OpenMMLab.

        Returns:
            Both parts are None for an excluded site; ``weight`` is None for an operand.

        Raises:
            PolicyError: If the granularity does not suit the kind.
        """
        act = self.activations[kind]
        if kind == 'hidden':
            kind = 'linear'
        weight = self.weight if kind in ('linear', 'conv') else None
        excluded = False
        if is_end:
            act = replace(act.with_bits(8), reparametrize=False)
            weight = weight.with_bits(8)
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
        act = replace(act, **act.settings)
        if weight is not None:
            weight = replace(weight, **weight.settings)
        if act.granularity not in SITE_GRANULARITIES[kind]:
            raise PolicyError(
                f'{name}: granularity {act.granularity!r} puts a scale on the reduction axis of '
                f'the product; use one of {", ".join(SITE_GRANULARITIES[kind])}.'
            )
        if act.row_relative and kind != 'probs':
            raise PolicyError(f'{name}: row_relative is for "probs" only.')
        if kind not in act.code_format.sites:
            raise PolicyError(
                f'{name}: the {act.format} format is for {", ".join(act.code_format.sites)} only.'
            )
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

    def differences(self, saved: Mapping, activations_only: bool = False) -> list[str]:
        """Keys of :meth:`to_dict` in which a saved policy says something else.

        Args:
            saved: Of :meth:`to_dict`.
            activations_only: Whether it may differ in what acts in Stage 2 only.
        """
        own, saved = self.to_dict(), _completed(saved)
        if activations_only:
            saved, own = _activation_part(saved), _activation_part(own)
        return [key for key in own if saved.get(key) != own[key]]

    @property
    def label(self) -> str:
        """Short name of the widths, for example ``'w4a4'``."""
        return f'w{self.weight.bits}a{self.activations["linear"].bits}'

    def to_dict(self) -> dict:
        """Plain data that says everything the policy does; stored in checkpoints."""
        return {
            'preset': self.preset,
            'weight': self.weight.to_dict(),
            'activations': {key: spec.to_dict() for key, spec in self.activations.items()},
            'rules': [
                {**rule, 'activation': dict(rule['activation']), 'weight': dict(rule['weight'])}
                for rule in self.rules
            ],
        }
