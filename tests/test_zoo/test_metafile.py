"""Metafiles hold measured results only, whole, and as mim reads them."""

import copy
from pathlib import Path

import modelindex
import pytest
import yaml
from zoo_checkout import measured, write_config

from tools.zoo.files import ZooError, read_yaml, write_yaml
from tools.zoo.metafile import final_stage, load_zoo, put_entry

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(root) -> Path:
    return root / 'configs' / 'demo' / 'tiny.py'


def metafile(root) -> Path:
    return root / 'configs' / 'demo' / 'metafile.yml'


def test_what_was_measured_comes_back(root, config):
    put_entry(root, 'tiny', config, measured())
    (entry,) = load_zoo(root).models.values()
    assert entry['Measured'] == measured()
    assert entry['Config'] == 'configs/demo/tiny.py'
    assert entry['Metadata'] == {'Training Data': 'nette', 'Quantization': 'W4A4'}
    (result,) = entry['Results']
    assert result == {
        'Task': 'Image Classification',
        'Dataset': 'nette',
        'Metrics': {'Top 1 Accuracy': 66.0},
    }


def test_a_new_run_takes_the_place_of_the_old_one_and_leaves_the_rest(root, config):
    other = write_config(root, 'other')
    put_entry(root, 'tiny', config, measured())
    put_entry(root, 'other', other, measured(seconds=1))
    path = metafile(root)
    path.write_text('# By hand.\n# Two lines.\n' + path.read_text())
    put_entry(root, 'tiny', config, measured(seconds=7))
    models = load_zoo(root).models
    assert list(models) == ['tiny', 'other']
    assert [model['Measured']['seconds'] for model in models.values()] == [7, 1]
    assert path.read_text().startswith('# By hand.\n# Two lines.\nCollections:')


def test_one_changed_number_is_one_changed_line(root, config):
    put_entry(root, 'tiny', config, measured())
    before = metafile(root).read_text().splitlines()
    stages = copy.deepcopy(measured()['stages'])
    stages['ptq_w4a4']['relative_l2'] = 0.704
    put_entry(root, 'tiny', config, measured(stages=stages))
    after = metafile(root).read_text().splitlines()
    assert len(before) == len(after)
    assert sum(old != new for old, new in zip(before, after, strict=True)) == 1


def test_settings_of_a_variant_stand_beside_the_config(root, config):
    put_entry(root, 'tiny', config, measured())
    put_entry(root, 'tiny+w3', config, measured(seconds=3))
    assert list(load_zoo(root).models) == ['tiny', 'tiny+w3']


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'commit': ''}, 'lacks .*commit'),
        ({'commit': 'HEAD'}, 'no commit'),
        ({'stages': {}}, 'lacks .*stages'),
        ({'data': {'training': {'images': 1}}}, r'lacks .*data\.validation\.images'),
        ({'accuracy': 1}, 'unknown keys.*accuracy'),
        ({'stages': {'w4a4': {'top1': 1.0, 'topp1': 1.0}}}, 'unknown keys.*topp1'),
        ({'stages': {'four bits': {'top1': 1.0}}}, 'unknown keys.*four bits'),
        (
            {'command': 'python tools/train.py --x=/home/me/x.pth'},
            '/home/me/x.pth.* path of one machine',
        ),
    ],
)
def test_an_entry_that_says_too_little_or_too_much_is_refused(root, config, change, message):
    put_entry(root, 'tiny', config, measured())
    before = metafile(root).read_bytes()
    with pytest.raises(ZooError, match=message):
        put_entry(root, 'tiny', config, measured(**change))
    assert metafile(root).read_bytes() == before


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('Results', [], 'Results.* not as Measured says'),
        ('Metadata', {'Training Data': 'more'}, 'Metadata.* not as Measured says'),
        ('Config', 'configs/demo/none.py', 'existing Config'),
        ('Name', 'tinny', 'must be named as its config'),
        ('In Collection', 'Others', 'In Collection'),
        ('Weights', 'x.pth', 'Weights.* not as Measured says'),
    ],
)
def test_an_entry_that_was_edited_into_a_contradiction_is_refused(
    root, config, key, value, message
):
    put_entry(root, 'tiny', config, measured())
    content = read_yaml(metafile(root))
    content['Models'][0][key] = value
    write_yaml(metafile(root), content)
    with pytest.raises(ZooError, match=message):
        load_zoo(root)


def test_two_runs_of_one_name_are_refused(root, config):
    put_entry(root, 'tiny', config, measured())
    content = read_yaml(metafile(root))
    content['Models'] *= 2
    write_yaml(metafile(root), content)
    with pytest.raises(ZooError, match='another model tiny'):
        load_zoo(root)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('Models: [', 'line 1'),
        ('- a\n- b\n', 'a list instead of a mapping'),
        ('Models: []\nModels: []\n', "'Models' stands here twice"),
    ],
)
def test_a_damaged_metafile_is_named_and_kept(root, config, text, message):
    metafile(root).write_text(text)
    with pytest.raises(ZooError, match=message) as error:
        put_entry(root, 'tiny', config, measured())
    assert 'metafile.yml' in str(error.value)
    assert metafile(root).read_text() == text


def test_published_figures_name_their_source(root):
    path = root / 'configs' / 'demo' / 'published.yml'
    table = {'source': 'A paper', 'url': 'https://example.org', 'rows': [{'model': 'a'}]}
    write_yaml(path, {'Published': {'paper': table}})
    assert load_zoo(root).published == {'paper': table}
    write_yaml(path, {'Published': {'paper': {'rows': [{'model': 'a'}]}}})
    with pytest.raises(ZooError, match='needs source, url'):
        load_zoo(root)
    rows = [{'model': 'a', 'url': 'https://example.org/a'}, {'model': 'b'}]
    write_yaml(path, {'Published': {'paper': {'source': 'Several', 'rows': rows}}})
    with pytest.raises(ZooError, match='one a row'):
        load_zoo(root)


@pytest.mark.parametrize(
    ('stages', 'final'),
    [
        (['fp32', 'ptq_w4a4', 'w32a4', 'latent_fp32', 'w4a4'], 'w4a4'),
        (['fp32', 'w3a3', 'w32a3'], 'w3a3'),
        (['w32a4'], 'w32a4'),
        (['trained'], 'trained'),
        (['fp32'], 'fp32'),
    ],
)
def test_final_stage(stages, final):
    assert final_stage({stage: {} for stage in stages}) == final


# -- our own ----------------------------------------------------------------------------------


def test_mim_reads_our_index():
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    index.check()
    assert not [str(error) for error in index.check_errors]
    ours = load_zoo(ROOT).models
    assert {model.name for model in index.models} == set(ours)
    for model in index.models:
        assert not model.check_errors, model.name
        assert (ROOT / model.config).is_file()
        (result,) = model.results
        assert result.metrics == ours[model.name]['Results'][0]['Metrics']
        assert result.metrics


def test_our_metafiles_are_as_the_tool_writes_them(tmp_path):
    for path in sorted(ROOT.glob('configs/*/metafile.yml')):
        copied = tmp_path / path.parent.name
        copied.write_text(path.read_text())
        write_yaml(copied, read_yaml(path))
        assert copied.read_text() == path.read_text(), f'{path} was edited by hand'
        assert yaml.safe_load(path.read_text()) == read_yaml(path)
