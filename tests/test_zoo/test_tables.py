"""Tables show what is measured, and leave out what is not."""

import copy
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zoo_checkout import TABLES, measured, write_config

from gplq_mm.evaluation import Decisions, accuracy_difference
from tools.zoo.cells import fill
from tools.zoo.decisions import _correct, difference_text, pack
from tools.zoo.files import ZooError, write_yaml
from tools.zoo.metafile import Zoo, complete_entry, load_zoo, put_entry
from tools.zoo.tables import DEFAULTS, load_layouts, make_table

COLUMNS = (
    {'title': 'model', 'cell': '{label}'},
    {'title': 'bits', 'cell': '{bits}'},
    {'title': 'top-1', 'cell': '{top1:.1f}'},
    {'title': 'distance', 'cell': '{relative_l2:.3f}'},
)
STAGES = (
    {'label': 'FP32', 'stage': 'fp32'},
    {'label': 'PTQ', 'stage': 'ptq'},
    {'label': 'Stage 1', 'stage': 'act'},
    {'label': 'latent', 'stage': 'latent_fp32'},
    {'label': 'Stage 2', 'stage': 'final'},
)


def zoo_of(root, **models) -> Zoo:
    """A zoo of models by their content of ``Measured``."""
    entries = {}
    for name, content in models.items():
        config = f'configs/demo/{name}.py'
        entry = {'Name': name, 'In Collection': 'demo', 'Config': config, 'Measured': content}
        entries[name] = complete_entry(entry)
    return Zoo(root, entries, {})


def layout_of(rows=STAGES, columns=COLUMNS, caption=(), **common) -> dict:
    rows = [{'model': 'tiny', **row} for row in rows]
    return {**DEFAULTS, 'columns': columns, 'rows': rows, 'caption': caption, **common}


def parsed(text: str) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...], str]:
    """Titles, rows and what stands below of a table in Markdown."""
    table, _, below = text.partition('\n\n')
    cells = [
        tuple(cell.strip().replace('\\|', '|') for cell in re.split(r'(?<!\\)\|', line)[1:-1])
        for line in table.split('\n')
    ]
    return cells[0], tuple(cells[2:]), below


def cells(layout: dict, zoo: Zoo) -> tuple:
    return parsed(make_table(layout, zoo))[1]


def below(layout: dict, zoo: Zoo) -> str:
    return parsed(make_table(layout, zoo))[2]


def test_rows_are_stages(tmp_path):
    zoo = zoo_of(tmp_path, tiny=measured())
    assert cells(layout_of(), zoo) == (
        ('FP32', 'W32A32', '72.0', ''),
        ('PTQ', 'W4A4', '51.6', '0.703'),
        ('Stage 1', 'W32A4', '68.6', '0.475'),
        # latent_fp32 was not measured.
        ('Stage 2', 'W4A4', '66.0', '0.518'),
    )


def test_bits_follow_the_run(tmp_path):
    stages = {'fp32': {'top1': 1.0}, 'ptq_w3a3': {'top1': 2.0}, 'w32a3': {'top1': 3.0}}
    zoo = zoo_of(tmp_path, tiny=measured(stages={**stages, 'w3a3': {'top1': 4.0}}))
    assert [row[1] for row in cells(layout_of(), zoo)] == ['W32A32', 'W3A3', 'W32A3', 'W3A3']


def test_a_column_without_any_number_is_left_out(tmp_path):
    zoo = zoo_of(tmp_path, tiny=measured(stages={'w4a4': {'top1': 66.0}}))
    titles, rows, _ = parsed(make_table(layout_of(), zoo))
    assert titles == ('model', 'bits', 'top-1')
    assert rows == (('Stage 2', 'W4A4', '66.0'),)


def test_a_table_of_unmeasured_models_is_empty(tmp_path):
    assert make_table(layout_of(), zoo_of(tmp_path)) == ''


def test_a_row_and_a_column_may_be_of_other_models_and_stages(tmp_path):
    other = measured(stages={'fp32': {'top1': 10.0}, 'w4a4': {'top1': 9.0}})
    zoo = zoo_of(tmp_path, tiny=measured(), other=other)
    columns = (
        {'title': 'model', 'cell': '{label}'},
        {'title': 'top-1', 'cell': '{top1:.1f}'},
        {'title': 'FP32', 'cell': '{top1:.1f}', 'stage': 'fp32'},
        {'title': 'beside', 'cell': '{top1:.1f}', 'model': '{beside}'},
    )
    rows = (
        {'label': 'a', 'beside': 'other'},
        {'label': 'b', 'model': 'other', 'beside': ''},
    )
    assert cells(layout_of(rows, columns), zoo) == (
        ('a', '66.0', '72.0', '9.0'),
        ('b', '9.0', '10.0', ''),
    )


def test_a_cell_may_hold_several_numbers_and_is_empty_if_one_is_missing(tmp_path):
    columns = (
        {'title': 'model', 'cell': '{label}'},
        {'title': 'images', 'cell': '{data.training.images:,} + {data.validation.images}'},
        {'title': 'both', 'cell': '{top1:.1f} / {relative_l2:.3f}'},
    )
    zoo = zoo_of(tmp_path, tiny=measured())
    rows = cells(layout_of(STAGES[:2], columns), zoo)
    assert rows == (('FP32', '3,000 + 500', ''), ('PTQ', '3,000 + 500', '51.6 / 0.703'))


def test_the_caption_says_what_to_repeat(tmp_path):
    zoo = zoo_of(tmp_path, tiny=measured(command='make tiny\n'))
    fields = ('commit', 'date', 'machine', 'data', 'seconds', 'command')
    assert below(layout_of(caption=fields), zoo) == (
        'Measured: commit 7765805; Xeon, 2 cores; nette, 3,000 + 500 images; 564 s.\n\n'
        '```bash\nmake tiny\n```'
    )


def test_the_caption_tells_runs_apart_where_they_differ(tmp_path):
    first = measured(command='export A=1\nmake a \\\n    x=1', date='2026-11-02')
    second = measured(command='export A=1\nmake b \\\n    x=1', date='2026-11-01', commit='aaaaaaa')
    zoo = zoo_of(tmp_path, tiny=first, other=second)
    rows = ({'label': 'a'}, {'label': 'b', 'model': 'other'})
    fields = ('commit', 'date', 'machine', 'seconds', 'command')
    assert below(layout_of(rows, caption=fields), zoo) == (
        'Measured: commit 7765805 (`tiny`), aaaaaaa (`other`); 2026-11-01 to 2026-11-02; '
        'Xeon, 2 cores.\n\n'
        '```bash\nexport A=1\nmake a \\\n    x=1\nmake b \\\n    x=1\n```'
    )


def test_the_caption_of_many_runs_is_short(tmp_path):
    """Loads differ from run to run, and six names would be longer than the table."""
    runs = {
        f'run{i}': measured(commit=f'abc{i % 2}123', machine=f'Xeon, 2 cores, mean load {1 + i}.5')
        for i in range(6)
    }
    rows = [{'label': name, 'model': name, 'stage': 'final'} for name in runs]
    layout = layout_of(rows, caption=('commit', 'machine'))
    caption = below(layout, zoo_of(tmp_path, **runs))
    assert 'commit abc0123 or abc1123' in caption
    assert 'Xeon, 2 cores, mean load 1.5 to 6.5' in caption
    assert 'run3' not in caption


def test_a_row_may_say_that_it_has_no_such_number(tmp_path):
    zoo = zoo_of(tmp_path, tiny=measured())
    rows = [{'label': 'PTQ', 'stage': 'ptq', 'relative_l2': None}, {'label': 'Stage 2'}]
    assert cells(layout_of(rows), zoo) == (
        ('PTQ', 'W4A4', '51.6', ''),
        ('Stage 2', 'W4A4', '66.0', '0.518'),
    )


def test_seconds_of_quantizing_are_those_of_the_steps_that_make_the_model(tmp_path):
    steps = {
        'calibration': 2.0, 'pca': 3.0, 'act_qat': 50.0, 'weight_ptq': 5.0, 'baseline': 7.0,
        'diagnostics': 9.0, 'evaluation_w4a4': 100.0, 'transfer_w4a4': 200.0,
    }  # fmt: skip
    zoo = zoo_of(tmp_path, tiny=measured(seconds_by_step=steps), old=measured())
    rows = [{'label': name, 'model': name} for name in ('tiny', 'old')]
    columns = [*COLUMNS[:1], {'title': 'seconds', 'cell': '{quantizing_seconds:.0f}'}]
    assert cells(layout_of(rows, columns), zoo) == (('tiny', '60'),)


def test_a_note_holds_numbers_too(tmp_path):
    layout = layout_of(note='PTQ has {stages.ptq_w4a4.top1:.1f}.', model='tiny')
    assert below(layout, zoo_of(tmp_path, tiny=measured())) == 'PTQ has 51.6.'
    without = measured(stages={'w4a4': {'top1': 1.0}})
    assert below(layout, zoo_of(tmp_path, tiny=without)) == ''


def test_published_figures_stand_alone_with_their_source(tmp_path):
    paper = {
        'source': 'A paper',
        'url': 'https://example.org',
        'note': 'ImageNet.',
        'rows': [{'model': 'Swin-T', 'fp32': 81.2}, {'model': 'Swin-L'}],
    }
    columns = ({'title': 'model', 'cell': '{model}'}, {'title': 'FP32', 'cell': '{fp32:.1f}'})
    layout = {**DEFAULTS, 'columns': columns, 'rows': paper['rows'], 'published': 'paper'}
    _, rows, caption = parsed(make_table(layout, Zoo(tmp_path, {}, {'paper': paper})))
    assert rows == (('Swin-T', '81.2'), ('Swin-L', ''))
    assert caption == ('Published, not measured by us: [A paper](https://example.org). ImageNet.')
    del paper['url']
    _, _, caption = parsed(make_table(layout, Zoo(tmp_path, {}, {'paper': paper})))
    assert caption == 'Published, not measured by us: A paper. ImageNet.'


def test_a_value_that_does_not_fit_its_format_is_an_error(tmp_path):
    columns = ({'title': 'x', 'cell': '{machine:.1f}'},)
    with pytest.raises(ZooError, match=r"cannot be written as '\{machine:\.1f\}'"):
        make_table(layout_of(columns=columns), zoo_of(tmp_path, tiny=measured()))


# -- seeds and intervals ------------------------------------------------------------------------


def scored(wrong: dict[str, int], images: int = 200, name: str = 'photo', **changes) -> dict:
    """A run whose stages decide the first so many photos wrong."""
    labels = [1] * images
    predictions = {stage: [0] * count + [1] * (images - count) for stage, count in wrong.items()}
    decisions = Decisions([f'{name}{i}' for i in range(images)], labels, predictions)
    stages = {stage: {'top1': 100 - 100 * n / images} for stage, n in wrong.items()}
    return measured(stages=stages, decisions=pack(decisions), **changes)


INTERVAL = '{difference.points:+.1f} ({difference.low:+.1f} to {difference.high:+.1f})'
COMPARED = (
    *COLUMNS[:1],
    {'title': 'top-1', 'cell': '{top1:.2f}'},
    {'title': 'to FP32', 'cell': INTERVAL},
    {'title': 'place', 'cell': '{rank}'},
    {'title': 'seeds', 'cell': '{seeds}'},
)


def test_a_difference_has_the_interval_of_paired_decisions(tmp_path):
    zoo = zoo_of(tmp_path, tiny=scored({'fp32': 20, 'w4a4': 40}), old=measured())
    rows = [{'label': 'FP32', 'stage': 'fp32'}, {'label': 'W4A4'}, {'label': 'old', 'model': 'old'}]
    found = cells(layout_of(rows, COMPARED[:3]), zoo)
    expected = accuracy_difference([False] * 40 + [True] * 160, [False] * 20 + [True] * 180)
    assert found[0] == ('FP32', '90.00', '')
    assert found[1] == ('W4A4', '80.00', fill(INTERVAL, {'difference': expected}))
    # What was measured before there were decisions keeps its place.
    assert found[2] == ('old', '66.00', '')


def test_a_difference_in_words():
    run = scored({'fp32': 20, 'w4a4': 40})
    assert re.fullmatch(
        r', top-1 to FP32 -10\.0 \(95 %: -14\.\d to -6\.\d\)', difference_text(run, 'w4a4')
    )
    assert difference_text(run, 'fp32') == difference_text(measured(), 'w4a4') == ''


def test_runs_with_several_seeds_are_one_row(tmp_path):
    runs = {
        'tiny': scored({'fp32': 20, 'w4a4': 40}, seconds=10, seed=0),
        'tiny+seed-1': scored({'fp32': 20, 'w4a4': 30}, seconds=20, seed=1),
        'tiny+seed-12': scored({'fp32': 20, 'w4a4': 50}, seconds=40, seed=12),
        'tiny+seed-1x': scored({'fp32': 0, 'w4a4': 0}),
        'tiny+other': scored({'fp32': 0, 'w4a4': 0}),
    }
    zoo = zoo_of(tmp_path, **runs)
    columns = [*COMPARED, {'title': 'seconds', 'cell': '{seconds:.1f}'}]
    _titles, rows, caption = parsed(
        make_table(layout_of(STAGES[4:], columns, ['commit', 'command']), zoo)
    )
    assert rows[0][:2] == ('Stage 2', '80.00')
    assert rows[0][2].startswith('-10.0 (-')
    assert rows[0][-2:] == ('3', '23.3')
    assert caption.startswith('Measured: commit 7765805.')
    assert load_of(zoo, 'tiny+other') == ['tiny+other']


def load_of(zoo: Zoo, name: str) -> list[str]:
    return [run['Name'] for run in zoo.runs_of(name)]


def test_no_interval_over_runs_on_other_photos(tmp_path):
    runs = {
        'tiny': scored({'fp32': 20, 'w4a4': 40}),
        'tiny+seed-1': scored({'fp32': 20, 'w4a4': 40}, name='other'),
    }
    assert cells(layout_of(STAGES[4:], COMPARED[:3]), zoo_of(tmp_path, **runs)) == (
        ('Stage 2', '80.00'),
    )


def test_what_chance_may_have_done_is_no_place(tmp_path):
    rows = [{'label': name, 'model': name} for name in ('a', 'b', 'c', 'unmeasured')]
    runs = {name: scored({'w4a4': wrong}) for name, wrong in (('a', 20), ('b', 60), ('c', 21))}
    found = cells(layout_of(rows, COMPARED), zoo_of(tmp_path, **runs))
    assert [(row[0], row[2]) for row in found] == [('a', '1'), ('b', '3'), ('c', '1')]
    # A row that cannot be compared with the others leaves nobody a place.
    for other in (measured(), scored({'w4a4': 0}, name='other')):
        found = cells(layout_of(rows, COMPARED), zoo_of(tmp_path, **{**runs, 'b': other}))
        assert [row[1:] for row in found] == [(row[1], '1') for row in found]


@given(st.lists(st.booleans(), max_size=70))
def test_decisions_come_back_from_their_bits(right):
    decisions = Decisions([str(i) for i in range(len(right))], [1] * len(right), {'w4a4': right})
    run = {'Measured': {'decisions': pack(decisions)}}
    assert _correct(run, 'w4a4').tolist() == right


# -- layouts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'colums': []}, 'unknown keys.*colums'),
        ({'rows': None}, 'no rows'),
        ({'rows': 'stagess'}, "rows 'stagess' are none of"),
        ({'columns': [{'title': 'x'}]}, 'has title and cell'),
        ({'columns': [{'title': 'x', 'cell': '{top_1}'}]}, "no run has \\['top_1'\\]"),
        ({'columns': [{'title': 'x', 'cell': '{top1'}]}, 'no template'),
        ({'model': 'tinny'}, 'no config of the name tinny'),
        ({'model': ''}, 'need a model'),
        ({'caption': ['weather']}, 'weather'),
        ({'published': 'paper'}, "'paper' must be one of"),
        ({'note': '{nothing}'}, "no run has \\['nothing'\\]"),
    ],
)
def test_a_wrong_layout_is_named(root, change, message):
    tables = copy.deepcopy(TABLES)
    tables['Tables']['tiny'].update(change)
    write_yaml(root / 'configs' / 'demo' / 'tables.yml', tables)
    with pytest.raises(ZooError, match=message) as error:
        load_layouts(root, load_zoo(root))
    assert 'tiny' in str(error.value)


def test_rows_and_columns_may_be_shared_by_name(root):
    (root / 'configs' / '_base_').mkdir()
    shared = {'Rows': {'all': list(STAGES)}, 'Columns': {'few': list(COLUMNS[:3])}}
    write_yaml(root / 'configs' / '_base_' / 'tables.yml', shared)
    tables = {'Tables': {'tiny': {'model': 'tiny', 'rows': 'all', 'columns': 'few'}}}
    write_yaml(root / 'configs' / 'demo' / 'tables.yml', tables)
    put_entry(root, 'tiny', root / 'configs' / 'demo' / 'tiny.py', measured())
    zoo = load_zoo(root)
    rows = cells(load_layouts(root, zoo)['tiny'], zoo)
    assert [row[2] for row in rows] == [
        '72.0',
        '51.6',
        '68.6',
        '66.0',
    ]


def test_an_unmeasured_config_may_have_its_row_already(root):
    write_config(root, 'later')
    tables = copy.deepcopy(TABLES)
    tables['Tables']['tiny']['rows'].append({'label': 'later', 'model': 'later'})
    write_yaml(root / 'configs' / 'demo' / 'tables.yml', tables)
    assert len(load_layouts(root, load_zoo(root))['tiny']['rows']) == 5


# -- what is written is what is read ------------------------------------------------------------

percent = st.floats(0, 100).map(lambda value: float(f'{value:.6g}'))
stage = st.fixed_dictionaries({'top1': percent}, optional={'relative_l2': percent})
stages = st.fixed_dictionaries(
    {'w4a4': stage}, optional={'fp32': stage, 'ptq_w4a4': stage, 'w32a4': stage}
)
labels = st.text(
    st.characters(codec='utf-8', categories=('L', 'N', 'P', 'S')), min_size=1, max_size=8
).filter(lambda text: not re.search(r'[\\{}]', text))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stages=stages, label=labels)
def test_a_table_gives_back_the_numbers_of_the_metafile(root, stages, label):
    config = root / 'configs' / 'demo' / 'tiny.py'
    put_entry(root, 'tiny', config, measured(stages=stages))
    roles = {'fp32': 'fp32', 'ptq': 'ptq_w4a4', 'act': 'w32a4', 'final': 'w4a4'}
    rows = tuple({'label': f'{label} {role}', 'stage': role} for role in roles)
    titles, found, _ = parsed(make_table(layout_of(rows), load_zoo(root)))
    read = {row[0]: dict(zip(titles, row, strict=True)) for row in found}
    assert set(read) == {f'{label} {role}' for role, name in roles.items() if name in stages}
    for role, name in roles.items():
        if name in stages:
            row = read[f'{label} {role}']
            assert row['top-1'] == f'{stages[name]["top1"]:.1f}'
            distance = stages[name].get('relative_l2')
            assert row.get('distance', '') == ('' if distance is None else f'{distance:.3f}')


def test_bars_in_a_cell_survive(tmp_path):
    zoo = zoo_of(tmp_path, tiny=measured())
    rows = cells(layout_of([{'label': 'x|y'}, {'label': '|'}]), zoo)
    assert [row[0] for row in rows] == ['x|y', '|']
