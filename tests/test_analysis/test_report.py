"""Pictures, page and config of an analysis."""

import copy
import json

import matplotlib
import pytest
from analysis_samples import ATTENTION, LAYERS, bare, sample
from mmengine.config import Config
from pages import Page, read_png

from gplq_mm.analysis import policy_source
from gplq_mm.analysis.report import FIGURES, draw_figures, render_page


def test_pictures_can_be_read():
    pictures = draw_figures(sample())
    assert tuple(pictures) == FIGURES
    for name, data in pictures.items():
        width, height = read_png(data).size
        assert width > 400, name
        assert height > 200, name


def test_pictures_are_the_same_each_time_and_leave_settings_alone():
    before = dict(matplotlib.rcParams)
    assert draw_figures(sample()) == draw_figures(sample())
    assert dict(matplotlib.rcParams) == before


def test_what_is_not_known_is_not_drawn():
    assert list(draw_figures(bare())) == ['sqnr', 'clip_rate', 'scales', 'scale_histogram']


def test_a_picture_grows_with_the_number_of_layers():
    large = sample()
    for i in range(60):
        for field in ('layers', 'activations'):
            key = LAYERS[1] if field == 'layers' else f'{LAYERS[1]}.input'
            name = key.replace('layers.0', f'layers.{i + 1}')
            large[field][name] = copy.deepcopy(large[field][key])
    heights = [read_png(draw_figures(a)['sqnr']).height for a in (sample(), large)]
    assert heights[1] > 3 * heights[0]


def test_weights_that_did_not_move():
    analysis = sample()
    for drift in analysis['run']['weight_drift_history'].values():
        drift.update(mae=0.0, mse=0.0)
        drift['layers'] = {name: {'mae': 0.0, 'mse': 0.0} for name in LAYERS}
    read_png(draw_figures(analysis)['weight_drift'])


@pytest.mark.parametrize('make', [sample, bare])
def test_page_stands_alone(make):
    analysis = make()
    pictures = draw_figures(analysis)
    source = render_page(analysis, pictures)
    page = Page(source)
    assert len(page.pictures()) == len(pictures)
    assert 'http:' not in source
    assert 'https:' not in source
    assert '@import' not in source
    assert 'url(' not in source
    for note in analysis['notes']:
        assert note in page.text


def test_page_shows_the_numbers():
    page = Page(render_page(sample(), {}))
    run, _cost, layers, suggestion = page.tables
    assert run[2] == ['Stage 2: weights', 'W4A4', '96.50', '0.100']
    rows = {row[0]: row for row in layers}
    assert set(rows) == {'layer', *LAYERS, ATTENTION}
    assert rows[LAYERS[1]] == [
        LAYERS[1], 'linear', '1000', '4', '4', '22.0', '18.5', '16.9', '0.02', '0.003', '0.02',
        '6', '',
    ]  # fmt: skip
    assert rows[ATTENTION][2:8] == ['', '', '4', '', '15.0', '']
    assert suggestion[1][0] == 'weights'
    assert suggestion[1][2:4] == ['4.00 bits a weight', '6.00 bits a weight']


def test_operands_of_several_widths():
    analysis = sample()
    analysis['layers'][ATTENTION]['activation_bits'] = {'q': 4, 'k': 4, 'v': 8, 'probs': 4}
    page = Page(render_page(analysis, {}))
    assert [row[4] for row in page.tables[2] if row[0] == ATTENTION] == ['4/4/8/4']


def test_names_cannot_break_the_page():
    analysis = sample()
    analysis['name'] = '<script>alert("x")</script>'
    assert analysis['name'] in Page(render_page(analysis, {})).text


def test_detector_without_logits():
    analysis = sample()
    analysis['sensitivity']['metric'] = 'relative_squared_error'
    source = render_page(analysis, draw_figures(analysis))
    assert 'relative squared error of the outputs' in source


def test_policy_is_a_config(tmp_path):
    (tmp_path / 'base.py').write_text(
        "other = 1\nmodel = dict(type='X', policy=dict(preset='paper', exclude=['a'], rules=[1]))\n"
    )
    rules = [
        {'pattern': rf'^backbone\.layers\.{i}\.attn\.qkv$', 'activation': {'bits': 3 + i}}
        for i in range(4)
    ]
    policy = {'preset': 'gplq', 'weight': {'bits': 4, 'group_size': 32}, 'rules': rules}
    source = policy_source(policy, './base.py', ['A comment.', 'Another.'])
    assert source.startswith('# A comment.\n# Another.\n')
    assert max(map(len, source.splitlines())) <= 100
    (tmp_path / 'policy.py').write_text(source)
    cfg = Config.fromfile(tmp_path / 'policy.py')
    assert cfg.other == 1
    assert cfg.model.type == 'X'
    assert cfg.model.policy.to_dict() == policy


def test_policy_of_a_config_without_one(tmp_path):
    (tmp_path / 'base.py').write_text("model = dict(type='X')\n")
    source = policy_source({'preset': 'gplq'}, './base.py', [], replaces=False)
    (tmp_path / 'policy.py').write_text(source)
    cfg = Config.fromfile(tmp_path / 'policy.py')
    assert cfg.model.to_dict() == {'type': 'X', 'policy': {'preset': 'gplq'}}


def test_sample_is_what_json_gives_back():
    assert json.loads(json.dumps(sample())) == sample()
