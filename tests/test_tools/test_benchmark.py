"""tools/benchmark.py measures all candidates in one run and writes what it measured."""

import csv
import json
from pathlib import Path

import pytest
import torch
from builders import NUM_CLASSES, build_float, images, vit_cfg
from mmengine.config import Config
from tiny_runs import load_tool

from gplq_mm.benchmark import linear, model
from gplq_mm.benchmark.peers import PeerUnavailable
from gplq_mm.benchmark.report import OURS

ROW = {'name', 'threads', 'impl', 'median_ms', 'gops', 'times_ours', 'rounds'}


@pytest.fixture(scope='module')
def tool():
    return load_tool('benchmark')


@pytest.fixture
def config(tmp_path) -> Path:
    """Config file of a tiny model."""
    path = tmp_path / 'tiny.py'
    Config(dict(default_scope='mmpretrain', model=vit_cfg())).dump(path)
    return path


@pytest.fixture(autouse=True)
def one_thread():
    """The tool sets torch's threads for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(tool, out: Path, *arguments) -> dict:
    """Runs the tool for two rounds on one thread; returns what it wrote."""
    options = ['--rounds', '2', '--threads', '1', '--out', str(out)]
    tool.main([*map(str, arguments), *options])
    result = json.loads(out.read_text())
    with out.with_suffix('.csv').open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(result['rows'])
    for line, row in zip(table, result['rows'], strict=True):
        assert line == {key: str(value) for key, value in row.items()}
    assert out.with_suffix('.png').read_bytes().startswith(b'\x89PNG')
    for row in result['rows']:
        assert row.keys() >= ROW
        assert row['median_ms'] > 0
        assert row['quartile1_ms'] <= row['median_ms'] <= row['quartile3_ms']
        assert (row['threads'], row['rounds']) == (1, 2)
    return result


def by_impl(rows: list[dict], **subject) -> dict[str, dict]:
    return {r['impl']: r for r in rows if all(r[k] == v for k, v in subject.items())}


def test_linear(tool, tmp_path, config, capsys):
    result = run(tool, tmp_path / 'a' / 'b.json', 'linear', '--shapes', '24x64x48', config)
    first = by_impl(result['rows'], shape='24x64x48')
    assert set(first) == set(linear.IMPLS)
    for row in first.values():
        assert row['gops'] == pytest.approx(2 * 24 * 64 * 48 / row['median_ms'] / 1e6)
        ratio = row['median_ms'] / first[OURS]['median_ms']
        assert row['times_ours'] == pytest.approx(ratio)
    # The layers of the model at batch 8: 17 tokens, width 32; the head sees one token.
    shapes = {row['shape'] for row in result['rows']}
    layers = {'136x32x96', '136x32x32', '136x32x64', '136x64x32', f'8x32x{NUM_CLASSES}'}
    assert shapes == {'24x64x48', *layers}
    assert result['environment']['kernels']
    assert result['environment']['versions']['torch']
    shown = capsys.readouterr().out
    assert '24x64x48' in shown
    assert 'torch_bf16' in shown


def test_model(tool, tmp_path, config, capsys):
    impls = ['gplq_int4', 'gplq_levels', 'torch_fp32', 'torch_bf16']
    arguments = ('--impls', *impls, '--batch', 1, 3)
    result = run(tool, tmp_path / 'r.json', 'model', '--model', config, *arguments)
    assert result['skipped'] == {}
    for batch in (1, 3):
        rows = by_impl(result['rows'], batch=batch)
        assert list(rows) == impls
        assert {row['model'] for row in rows.values()} == {'tiny'}
        assert {row['compensation'] for row in rows.values()} == {'none'}
    assert 'our compensation: none' in ' '.join(capsys.readouterr().out.split())


def test_compensation_is_stated(tool, tmp_path, config, capsys):
    arguments = ('--impls', 'gplq_int4', '--batch', 2, '--compensation', 'QwT')
    result = run(tool, tmp_path / 'r.json', 'model', '--model', config, *arguments)
    assert [row['compensation'] for row in result['rows']] == ['QwT']
    assert 'our compensation: QwT' in ' '.join(capsys.readouterr().out.split())


def test_ptq(tool, tmp_path, config, capsys):
    out = tmp_path / 'a' / 'ptq.json'
    arguments = ['--model', config, '--images', 6, '--batch', 3, '--threads', 1, '--out', out]
    tool.main(['ptq', *map(str, arguments)])
    result = json.loads(out.read_text())
    assert result['model'] == str(config)
    assert (result['images'], result['image_source'], result['batch_size']) == (6, 'random', 3)
    assert (result['method'], result['compensation']) == ('GPTQ', 'QwT')
    assert result['environment']['load_at_end'] >= 0
    shown = capsys.readouterr().out
    assert 'weight_ptq' in shown
    assert 'backbone.layers.1' in shown


def test_absent_peer_is_named(tool, tmp_path, config, capsys, monkeypatch):
    def build(name, *_args):
        raise PeerUnavailable(f'{name} needs what is not here')

    monkeypatch.setattr(model, 'build_peer', build)
    arguments = ('--impls', 'openvino_int8', '--batch', 1)
    result = run(tool, tmp_path / 'r.json', 'model', '--model', config, *arguments)
    # Ours is there without being asked for: ratios are those to ours.
    assert [row['impl'] for row in result['rows']] == ['gplq_int4']
    assert result['skipped'] == {'openvino_int8': 'openvino_int8 needs what is not here'}
    assert 'skipped openvino_int8: openvino_int8 needs' in capsys.readouterr().out


def test_operations_are_those_of_the_model(tool):
    tokens, width, hidden, layers = 17, 32, 64, 2
    patches = 16 * 3 * 8 * 8 * width
    block = tokens * width * (3 * width + width + 2 * hidden) + 2 * tokens**2 * width
    expected = 2 * (patches + layers * block + width * NUM_CLASSES)
    assert model.count_operations(build_float('vit'), images(1)) == expected
    assert model.count_operations(build_float('vit'), images(3)) == 3 * expected


@pytest.mark.parametrize('name', ['vit-tiny', 'deit-small', 'swin-tiny'])
def test_named_models_have_the_layers_of_the_papers(tool, name):
    width, classes = {'vit-tiny': 192, 'deit-small': 384, 'swin-tiny': 96}[name], 1000
    shapes = tool.parse_shapes([name], [2])
    rows = 2 * (3136 if name == 'swin-tiny' else 197)
    assert shapes[:3] == [
        (rows, width, 3 * width),
        (rows, width, width),
        (rows, width, 4 * width),
    ]
    assert shapes[-1] == (2, width * (8 if name == 'swin-tiny' else 1), classes)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['linear', '--shapes', '3x4'], "shape '3x4' is not of the form MxKxN"),
        (['linear', '--shapes', '3x0x4'], 'empty side'),
        (['linear', '--shapes', 'resnext'], "unknown model 'resnext'"),
        (['model', '--model', 'resnext'], "unknown model 'resnext'"),
        (['model', '--model', 'gone.py'], 'gone.py'),
        (['linear', '--threads', '4096'], '--threads 4096'),
        (['ptq', '--model', 'resnext'], "unknown model 'resnext'"),
        (['ptq', '--data', 'gone'], 'gone'),
        (['ptq', '--method', 'OBQ', '--images', '1', '--model', 'vit-tiny'], 'OBQ'),
    ],
)
def test_bad_input_is_one_line(tool, arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        tool.main(arguments)
    text = f'{error.value}{capsys.readouterr().err}'
    assert message in text
    assert 'Traceback' not in text


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['model', '--impls', 'tensorrt'], 'invalid choice'),
        (['model', '--batch', '0'], 'at least 1'),
        (['linear', '--rounds', '-1'], 'at least 1'),
        (['model', '--out', 'x.csv'], 'must end in .json'),
        ([], 'required'),
    ],
)
def test_bad_arguments(tool, arguments, message, capsys):
    with pytest.raises(SystemExit):
        tool.parse_args(arguments)
    assert message in capsys.readouterr().err


def test_training_is_compared_with_fp32(tool, config, tmp_path, capsys):
    out = tmp_path / 'train.json'
    options = ['--batch', '2', '--impls', 'gplq', '--rounds', '2', '--threads', '1']
    tool.main(['train', '--model', str(config), *options, '--out', str(out)])
    rows = json.loads(out.read_text())['rows']
    assert [row['impl'] for row in rows] == ['fp32', 'gplq']
    assert {'impl', 'saved_mb', 'peak_mb', 'step_ms'} <= set(rows[0])
    assert rows[0]['saved_ratio'] == rows[0]['step_ratio'] == 1.0
    assert rows[1]['saved_ratio'] == rows[1]['saved_mb'] / rows[0]['saved_mb'] < 1
    assert out.with_suffix('.png').read_bytes().startswith(b'\x89PNG')
    assert 'kept for backward' in capsys.readouterr().out
