"""Policies: ordered rules, and errors that say what to change."""

import json

import pytest
import torch
from mmengine.config import ConfigDict

from gplq_mm.quant import ActSpec, PolicyError, QuantPolicy, WeightSpec, build_observer


def test_rules_apply_in_order_and_refine_each_other():
    policy = QuantPolicy(
        rules=[
            dict(pattern='attn', activation=dict(bits=6), weight=dict(bits=6)),
            dict(pattern=r'attn\.qkv', weight=dict(bits=8, group_size=16)),
            dict(pattern=r'0\.attn\.qkv', weight=dict(bits=2)),
        ]
    )
    spec = policy.resolve('layers.0.attn.qkv', 'linear')
    assert (spec.activation.bits, spec.weight.bits, spec.weight.group_size) == (6, 2, 16)
    spec = policy.resolve('layers.1.attn.qkv', 'linear')
    assert (spec.activation.bits, spec.weight.bits) == (6, 8)
    assert policy.resolve('layers.1.ffn', 'linear').weight == WeightSpec()


def test_user_rules_come_after_those_of_the_preset():
    name = 'backbone.patch_embed.projection'
    assert QuantPolicy().resolve(name, 'conv').weight.bits == 8
    policy = QuantPolicy(rules=[dict(pattern='patch_embed', weight=dict(bits=3))])
    spec = policy.resolve(name, 'conv')
    assert (spec.weight.bits, spec.activation.bits) == (3, 8)


@pytest.mark.parametrize(
    ('name', 'bits'),
    [
        ('backbone.patch_embed.projection', 8),
        ('backbone.conv1', 8),
        ('backbone.stem.0', 8),
        ('head.fc', 8),
        ('head.layers.head', 8),
        ('backbone.layer1.0.conv1', 4),
        ('backbone.layers.0.attn.qkv', 4),
        ('bbox_head.fc_cls', 4),
    ],
)
def test_first_and_last_layer_have_eight_bits(name, bits):
    assert QuantPolicy().resolve(name, 'linear').weight.bits == bits


def test_exclusion_and_its_revocation():
    rules = [
        dict(pattern='layers', exclude=True),
        dict(pattern='qkv', activation=dict(bits=3)),
        dict(pattern=r'layers\.1', exclude=False),
    ]
    policy = QuantPolicy(rules=rules)
    excluded = policy.resolve('layers.0.attn.qkv', 'linear')
    assert (excluded.activation, excluded.weight) == (None, None)
    back = policy.resolve('layers.1.attn.qkv', 'linear')
    assert (back.activation.bits, back.weight.bits) == (3, 4)
    assert policy.resolve('layers.0.attn.q', 'q').activation is None


def test_general_bits_reach_the_operands_and_granularity_does_not():
    policy = QuantPolicy(activation=dict(bits=3, granularity='tensor'))
    for operand in ('q', 'k', 'v', 'probs'):
        spec = policy.resolve(f'attn.{operand}', operand)
        assert spec.activation.bits == 3
        assert spec.activation.granularity == 'head'
        assert spec.weight is None
    assert QuantPolicy(probs=dict(bits=8)).resolve('attn.probs', 'probs').activation.bits == 8


def test_presets():
    ours = QuantPolicy().resolve('fc', 'linear')
    assert (ours.activation.zero_point, ours.weight.layout) == ('float', 'folded')
    paper = QuantPolicy('paper')
    spec = paper.resolve('fc', 'linear')
    assert (spec.activation.zero_point, spec.activation.observer) == ('none', 'minmax')
    assert spec.activation.granularity == 'channel'
    assert spec.weight.layout == 'raw'
    query = paper.resolve('attn.q', 'q').activation
    assert (query.observer, query.percentile) == ('percentile', (0.01, 0.99))


@pytest.mark.parametrize('kind', ['q', 'k', 'v', 'probs', 'linear', 'conv'])
def test_scales_on_the_reduction_axis_are_refused(kind):
    wrong = {'q': 'channel', 'k': 'channel', 'v': 'token', 'probs': 'channel'}.get(kind, 'token')
    policy = QuantPolicy(rules=[dict(pattern='x', activation=dict(granularity=wrong))])
    with pytest.raises(PolicyError, match='reduction axis'):
        policy.resolve('x', kind)


def test_repq_preset_clips_what_few_values_reach():
    """A handful of huge activations must not take the grid of all others."""
    policy = QuantPolicy('repq')
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    x[:4] = 200.0
    for site, kind in (('fc', 'linear'), ('a.q', 'q'), ('a.k', 'k'), ('a.v', 'v')):
        observer = build_observer(policy.resolve(site, kind).activation, (1,))
        for _ in range(observer.num_passes):
            observer.update(x)
            observer.end_pass()
        scale, _ = observer.compute()
        assert scale.item() * 15 < 10
    assert policy.resolve('a.probs', 'probs').activation.observer == 'mse'
    chosen = QuantPolicy('repq', activation=dict(observer='mse'))
    assert chosen.resolve('fc', 'linear').activation.observer == 'mse'


def test_log_sqrt2_is_for_probabilities():
    policy = QuantPolicy(rules=[dict(pattern='.', activation=dict(format='log_sqrt2'))])
    assert policy.resolve('attn.probs', 'probs').activation.format == 'log_sqrt2'
    with pytest.raises(PolicyError, match='probs'):
        policy.resolve('attn.q', 'q')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(preset='best'), 'best'),
        (dict(activation=dict(bits=1)), 'bits=1 .* 2 to 8'),
        (dict(activation=dict(bits=9)), 'bits=9'),
        (dict(weight=dict(bits=True)), 'bits=True'),
        (dict(weight=dict(bits=4.0)), r'bits=4\.0'),
        (dict(weight=dict(bit=4)), r"\['bit'\].*known are"),
        (dict(q=dict(zeropoint='none')), r'policy\.q.*zeropoint'),
        (dict(weight=dict(group_size=0)), 'group_size=0'),
        (dict(weight=dict(layout='packed')), 'packed'),
        (dict(weight=dict(group_scale='half')), "group_scale='half'.*integer, float"),
        (dict(weight=dict(percentile=0.2)), r'0\.2'),
        (dict(activation=dict(observer='kl')), 'kl'),
        (dict(activation=dict(granularity='row')), 'row'),
        (dict(activation=dict(percentile=(0.9, 0.1))), 'percentile'),
        (dict(rules=[dict(weight=dict(bits=4))]), 'pattern'),
        (dict(rules=[dict(pattern='(', exclude=True)]), 'regular expression'),
        (dict(rules=[dict(pattern='a', skip=True)]), 'skip'),
        (dict(rules=[dict(pattern='fc', weight=dict(bits=99))]), 'bits=99'),
    ],
)
def test_errors_name_the_setting(options, message):
    with pytest.raises(PolicyError, match=message):
        QuantPolicy(**options)


def test_a_rule_must_match():
    policy = QuantPolicy(rules=[dict(pattern=r'layers\.9', exclude=True)])
    with pytest.raises(PolicyError, match=r'layers\\\\.9.*backbone\.layers\.0'):
        policy.check_matched(['backbone.layers.0', 'head.fc'])
    policy.check_matched(['layers.9.fc'])
    QuantPolicy(rules=[dict(pattern='nowhere', optional=True)]).check_matched(['fc'])


def test_code_ranges():
    assert ActSpec(bits=4).code_range == (0, 15)
    assert ActSpec(bits=4, zero_point='none').code_range == (-8, 7)
    assert ActSpec(bits=4, zero_point='none', signed=False).code_range == (0, 15)
    for bits in range(2, 9):
        spec = WeightSpec(bits=bits)
        assert max(map(abs, spec.code_range)) * spec.max_multiplier <= 127
    assert WeightSpec(bits=4).code_range == (-8, 7)
    assert WeightSpec(bits=4).max_multiplier == 15


def test_label():
    assert QuantPolicy(weight=dict(bits=3), activation=dict(bits=6)).label == 'w3a6'


def test_to_dict_is_plain_and_stable(tmp_path):
    rules = [dict(pattern='fc', activation=dict(bits=8, percentile=[0.1, 0.9]))]
    policy = QuantPolicy(rules=rules, weight=dict(bits=3))
    plain = policy.to_dict()
    assert json.loads(json.dumps(plain))['weight']['bits'] == 3
    from_config = QuantPolicy(**ConfigDict(rules=rules, weight=dict(bits=3))).to_dict()
    assert from_config == plain
    torch.save(from_config, tmp_path / 'policy.pth')
    assert torch.load(tmp_path / 'policy.pth', weights_only=True) == plain
    assert QuantPolicy().to_dict() != plain
    plain['rules'].clear()
    plain['weight']['bits'] = 7
    assert policy.to_dict()['weight']['bits'] == 3


def test_a_spec_that_was_stored_without_a_field_has_its_default():
    policy = QuantPolicy(weight=dict(bits=3))
    saved = policy.to_dict()
    assert saved['weight']['group_scale'] == 'integer'
    assert saved['activations']['linear']['reparametrize'] is False
    for spec in (saved['weight'], *saved['activations'].values()):
        spec.pop('group_scale', None)
        spec.pop('reparametrize', None)
    assert policy.differences(saved) == []
    assert QuantPolicy(weight=dict(bits=3, group_scale='float')).differences(saved) == ['weight']
    saved['activations']['linear']['bits'] = 5
    assert policy.differences(saved) == ['activations']
    assert QuantPolicy('repq').differences(policy.to_dict()) != []


@pytest.mark.parametrize('bits', [4, 8])
def test_float_group_scales_belong_to_the_folded_layout(bits):
    assert WeightSpec(bits=bits, group_scale='float').has_float_groups
    assert not WeightSpec(bits=bits, group_scale='float').has_one_step
    assert WeightSpec(bits=bits).has_one_step == (bits == 8)
    raw = WeightSpec(bits=bits, group_scale='float', layout='raw')
    assert raw.has_one_step
    assert not raw.has_float_groups


def test_hidden_values_and_convolutions_refine_the_general_setting():
    policy = QuantPolicy(activation=dict(bits=3), hidden=dict(bits=8), conv=dict(observer='minmax'))
    bits = {kind: policy.resolve('fc', kind).activation.bits for kind in ('linear', 'hidden')}
    assert bits == {'linear': 3, 'hidden': 8}
    conv = policy.resolve('conv', 'conv').activation
    assert (conv.bits, conv.observer) == (3, 'minmax')
    with pytest.raises(PolicyError, match=r'policy\.hidden has unknown key'):
        QuantPolicy(hidden=dict(width=8))


def test_preset_of_levels():
    levels = QuantPolicy('gplq-levels')
    formats = {kind: spec.format for kind, spec in levels.activations.items()}
    assert formats.pop('conv') == 'integer'
    assert set(formats.values()) == {'levels'}


def test_preset_of_activations_of_six_bits():
    mixed = QuantPolicy('gplq-mixed')
    bits = {kind: mixed.resolve('site', kind).activation.bits for kind in mixed.activations}
    assert bits == dict.fromkeys(mixed.activations, 6)
    assert mixed.label == 'w4a6'


def test_a_policy_that_was_stored_without_hidden_values_is_the_same():
    policy = QuantPolicy(activation=dict(bits=5))
    stored = policy.to_dict()
    del stored['activations']['hidden']
    assert policy.differences(stored) == []
