"""tools/zoo.py: a real run from config to table, runs that are taken over, and the check."""

import subprocess
import sys

import pytest
from tiny_runs import ROOT, gplq_config, read_summary
from zoo_checkout import commit, git, make_checkout, measured

from tools.zoo import command
from tools.zoo.metafile import load_zoo, put_entry


@pytest.fixture(scope='module')
def tool():
    return command


@pytest.fixture
def root(tmp_path, monkeypatch):
    root = make_checkout(tmp_path / 'checkout')
    monkeypatch.setattr('tools.zoo.origin.IMPORTED', root.resolve())
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def finished(root, undisturbed):
    """A checkout with the config of a real run that tools/train.py has left."""
    (root / 'configs' / 'demo' / 'gplq_vit_mnist.py').write_text('# the settings are in the run\n')
    return undisturbed['vit']


TOLD = ['--command', 'make tiny', '--machine', 'a Xeon', '--seconds', '12.4']


def test_check_passes_on_our_own_files(tool, capsys):
    tool.main(['--check'])
    assert 'all tables are as measured' in capsys.readouterr().out


def test_check_fails_on_a_wrong_number(tool, root, capsys):
    put_entry(root, 'tiny', root / 'configs' / 'demo' / 'tiny.py', measured())
    tool.main([], root)
    assert 'README.md: tables written' in capsys.readouterr().out
    page = root / 'README.md'
    page.write_text(page.read_text().replace('| 66.0 |', '| 67.0 |'))
    with pytest.raises(SystemExit, match='Correct the metafile'):
        tool.main(['--check'], root)
    output = capsys.readouterr().out
    assert '- | Stage 2 | W4A4 | 67.0 | 0.518 |\n+ | Stage 2 | W4A4 | 66.0 |' in output
    assert '| 67.0 |' in page.read_text()


def test_a_finished_run_is_taken_over(tool, root, finished, capsys):
    head = git(root, 'rev-parse', '--short=7', 'HEAD')
    tool.main(['--collect', str(finished), '--commit', 'HEAD', *TOLD], root)
    entry = load_zoo(root).models['gplq_vit_mnist']['Measured']
    summary = read_summary(finished)
    assert entry['commit'] == head
    assert (entry['command'], entry['machine'], entry['seconds']) == ('make tiny', 'a Xeon', 12)
    assert entry['data']['training'] == {'type': 'MNIST5k', 'images': 96}
    assert {stage: values['top1'] for stage, values in entry['stages'].items()} == summary['top1']
    distance = summary['feature_distance']['w4a4']['relative_l2']
    assert entry['stages']['w4a4']['relative_l2'] == pytest.approx(distance, rel=1e-5)
    assert entry['iterations'] == 12


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (TOLD, "give \\['--commit'\\]"),
        (['--commit', 'HEAD'], "give \\['--command'\\]"),
        (['--commit', '1234567', *TOLD], 'no commit 1234567'),
    ],
)
def test_a_run_of_unknown_origin_is_refused(tool, root, finished, arguments, message):
    with pytest.raises(SystemExit, match=message):
        tool.main(['--collect', str(finished), *arguments], root)
    assert not load_zoo(root).models


def test_an_unfinished_run_is_refused(tool, root, finished, tmp_path):
    work_dir = tmp_path / 'killed'
    work_dir.mkdir()
    (work_dir / 'gplq_vit_mnist.py').write_text((finished / 'gplq_vit_mnist.py').read_text())
    with pytest.raises(SystemExit, match='ZooError: the run is not finished'):
        tool.main(['--collect', str(work_dir), '--commit', 'HEAD', *TOLD], root)


def test_a_run_of_the_zoo_is_written_down(tool, root, capsys):
    tool.main(['configs/demo/tiny.py'], root)
    assert 'measured' in capsys.readouterr().out
    assert load_zoo(root).models['tiny']['Measured']['stages']['w4a4']['top1'] == 66.04


def test_a_failure_is_the_exit_status(tool, root, capsys):
    (root / 'configs' / 'demo' / 'broken.py').write_text('model = dict(')
    commit(root)
    with pytest.raises(SystemExit, match='broken: SyntaxError'):
        tool.main(['configs/demo/broken.py', 'configs/demo/tiny.py'], root)
    assert list(load_zoo(root).models) == ['tiny']
    assert 'tiny: measured' in capsys.readouterr().out


@pytest.mark.parametrize(
    'arguments', [['x.py', '--check'], ['--check', '--collect', 'x'], ['x.py', '--collect', 'y']]
)
def test_one_thing_at_a_time(tool, arguments, capsys):
    with pytest.raises(SystemExit):
        tool.parse_args(arguments)
    assert 'give configs, --collect or --check' in capsys.readouterr().err


def test_errors_are_one_line(tool, root, capsys):
    with pytest.raises(SystemExit, match=r'^ZooError: the config .* does not exist\.$'):
        tool.main(['configs/demo/none.py'], root)


@pytest.mark.slow
def test_a_real_run_from_config_to_table(root, float_checkpoints, tmp_path):
    cfg = gplq_config('unused', float_checkpoints['vit'])
    cfg.dump(root / 'configs' / 'demo' / 'tiny.py')
    (root / 'tools' / 'train.py').write_text((ROOT / 'tools' / 'train.py').read_text())
    head = commit(root)
    command = [sys.executable, str(ROOT / 'tests' / 'zoo_call.py'), str(root)]
    command += ['configs/demo/tiny.py', '--work-dir-root', str(tmp_path / 'runs')]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert 'evaluation of w4a4' in ran.stdout
    entry = load_zoo(root).models['tiny']['Measured']
    summary = read_summary(tmp_path / 'runs' / 'tiny')
    assert entry['commit'] == head
    assert entry['data']['validation']['images'] == 100
    assert {stage: values['top1'] for stage, values in entry['stages'].items()} == summary['top1']
    page = (root / 'README.md').read_text()
    assert f'| Stage 2 | W4A4 | {summary["top1"]["w4a4"]:.1f} |' in page
