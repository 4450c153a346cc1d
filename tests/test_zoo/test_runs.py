"""A list of runs goes on after failures, kills and new calls, and measures only committed code."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from zoo_checkout import attempts, commit, read_json, write_config

from tools.zoo.files import ZooError
from tools.zoo.metafile import load_zoo, put_entry
from tools.zoo.pages import check_pages
from tools.zoo.run import plan_jobs, run_jobs

TESTS = Path(__file__).resolve().parents[1]


class Zookeeper:
    """Runs configs of a checkout."""

    def __init__(self, root: Path):
        self.root = root
        self.lines: list[str] = []

    def work_dir(self, name: str) -> Path:
        return self.root / 'work_dirs' / name

    def run(self, *names: str, options=(), variant=None, seeds=(0,), **flags) -> dict[str, str]:
        """What became of each: 'measured', 'unchanged', or why it failed."""
        configs = [self.root / 'configs' / 'demo' / f'{name}.py' for name in names]
        place = self.root / 'work_dirs'
        jobs = plan_jobs(self.root, configs, list(options), variant, place, seeds)
        return run_jobs(self.root, jobs, self.lines.append, **flags)

    def measured(self, name: str) -> dict:
        return load_zoo(self.root).models[name]['Measured']


@pytest.fixture
def keeper(root) -> Zookeeper:
    return Zookeeper(root)


def test_a_run_is_written_down_with_its_origin(keeper):
    head = commit(keeper.root)
    assert keeper.run('tiny') == {'tiny': 'measured'}
    measured = keeper.measured('tiny')
    assert measured['commit'] == head
    assert measured['command'] == 'python tools/train.py configs/demo/tiny.py'
    # Its own folder and no other is named.
    assert measured['data'] == {
        'training': {'type': 'MNIST5k', 'images': 3},
        'validation': {'type': 'MNIST5k', 'images': 2},
    }
    assert 'core' in measured['machine']
    assert 'mean load' in measured['machine']
    assert measured['stages']['w4a4']['top1'] == 66.04
    assert check_pages(keeper.root) == []
    assert '| Stage 2 | W4A4 | 66.0 |' in (keeper.root / 'README.md').read_text()


def test_a_finished_run_is_not_repeated(keeper):
    keeper.run('tiny')
    assert keeper.run('tiny') == {'tiny': 'unchanged'}
    assert attempts(keeper.work_dir('tiny')) == ['start']
    assert keeper.run('tiny', rerun=True) == {'tiny': 'measured'}
    assert attempts(keeper.work_dir('tiny')) == ['start']
    assert attempts(keeper.work_dir('tiny.earlier')) == ['start']


def test_a_lost_metafile_is_written_again_from_the_finished_run(keeper):
    keeper.run('tiny')
    measured = keeper.measured('tiny')
    (keeper.root / 'configs' / 'demo' / 'metafile.yml').unlink()
    assert keeper.run('tiny') == {'tiny': 'unchanged'}
    assert keeper.measured('tiny') == measured


def test_a_later_commit_that_changes_no_code_repeats_nothing(keeper):
    head = commit(keeper.root)
    keeper.run('tiny')
    write_config(keeper.root, 'other')
    assert commit(keeper.root) != head
    assert keeper.run('tiny', 'other') == {'tiny': 'unchanged', 'other': 'measured'}
    assert keeper.measured('tiny')['commit'] == head


def test_other_code_or_settings_are_another_run(keeper):
    keeper.run('tiny')
    (keeper.root / 'gplq_mm' / 'more.py').write_text('')
    commit(keeper.root)
    assert keeper.run('tiny') == {'tiny': 'measured'}
    config = keeper.root / 'configs' / 'demo' / 'tiny.py'
    config.write_text(config.read_text() + 'lr = 0.2\n')
    head = commit(keeper.root)
    assert keeper.run('tiny') == {'tiny': 'measured'}
    assert attempts(keeper.work_dir('tiny')) == ['start']
    assert keeper.measured('tiny')['commit'] == head
    assert any('code or settings have changed' in line for line in keeper.lines)


def test_a_failure_does_not_stop_the_others(keeper):
    for name, end in (('bad', 'fail'), ('good', 'well')):
        write_config(keeper.root, name, end)
    (keeper.root / 'configs' / 'demo' / 'broken.py').write_text('model = dict(')
    commit(keeper.root)
    outcomes = keeper.run('bad', 'broken', 'good')
    assert 'the loss is not finite' in outcomes['bad']
    assert 'console.log' in outcomes['bad']
    assert 'SyntaxError' in outcomes['broken']
    assert outcomes['good'] == 'measured'
    assert list(load_zoo(keeper.root).models) == ['good']
    log = '\n'.join(keeper.lines)
    assert '[1/3] bad: 0:00:00 elapsed' in log
    assert '[3/3] good: measured' in log
    assert 'evaluation of fp32' in log


def test_what_failed_is_resumed(keeper):
    write_config(keeper.root, 'tiny', 'fail once')
    commit(keeper.root)
    assert 'MemoryError' in keeper.run('tiny')['tiny']
    first = read_json(keeper.work_dir('tiny') / 'zoo.json')
    assert keeper.run('tiny') == {'tiny': 'measured'}
    assert attempts(keeper.work_dir('tiny')) == ['start', 'resume']
    second = read_json(keeper.work_dir('tiny') / 'zoo.json')
    assert second['seconds'] > first['seconds'] > 0
    assert second['key'] == first['key']


def test_a_failed_run_of_other_settings_is_not_resumed(keeper):
    write_config(keeper.root, 'tiny', 'fail once')
    commit(keeper.root)
    keeper.run('tiny')
    write_config(keeper.root, 'tiny', 'well')
    commit(keeper.root)
    assert keeper.run('tiny') == {'tiny': 'measured'}
    assert attempts(keeper.work_dir('tiny')) == ['start']
    assert attempts(keeper.work_dir('tiny.earlier')) == ['start']


def test_a_summary_of_an_earlier_run_does_not_pass_for_the_new_one(keeper):
    keeper.run('tiny')
    write_config(keeper.root, 'tiny', 'fail', top1=1.0)
    commit(keeper.root)
    assert 'the loss is not finite' in keeper.run('tiny')['tiny']
    work_dir = keeper.work_dir('tiny')
    assert not (work_dir / 'summary.json').exists()
    assert (work_dir.with_name('tiny.earlier') / 'summary.json').exists()
    assert keeper.measured('tiny')['stages']['w4a4']['top1'] == 66.04


def test_a_run_that_was_started_otherwise_is_not_overwritten(keeper):
    work_dir = keeper.work_dir('tiny')
    work_dir.mkdir(parents=True)
    (work_dir / 'summary.json').write_text('{}')
    assert '--collect' in keeper.run('tiny')['tiny']
    assert attempts(work_dir) == []


def test_settings_need_a_name_and_paths_do_not(keeper):
    with pytest.raises(ZooError, match=r'lr=0\.3 changes what is measured: name it with --variant'):
        keeper.run('tiny', options=['lr=0.3'])
    assert keeper.run('tiny', options=['lr=0.3'], variant='fast') == {'tiny+fast': 'measured'}
    assert keeper.measured('tiny+fast')['options'] == ['lr=0.3']
    assert keeper.measured('tiny+fast')['command'] == (
        'python tools/train.py configs/demo/tiny.py --cfg-options \\\n    lr=0.3'
    )
    place = keeper.root / 'work_dirs' / 'x.pth'
    keeper.run('tiny', options=[f'model.pretrained={place}'])
    assert keeper.measured('tiny')['options'] == ['model.pretrained=work_dirs/x.pth']
    keeper.run('tiny', options=['model.pretrained=/elsewhere/y.pth'])
    assert keeper.measured('tiny')['options'] == ['model.pretrained=y.pth']


def test_variables_of_the_environment_are_part_of_the_command(keeper, monkeypatch):
    config = keeper.root / 'configs' / 'demo' / 'tiny.py'
    config.write_text(config.read_text() + "place = '{{$GPLQ_PLACE:none}}'\n")
    commit(keeper.root)
    monkeypatch.setenv('GPLQ_PLACE', '/data/of/mine')
    keeper.run('tiny')
    assert keeper.measured('tiny')['command'].startswith('export GPLQ_PLACE=mine\npython tools/')


def test_a_variable_that_is_a_setting_needs_a_name(keeper, monkeypatch):
    config = keeper.root / 'configs' / 'demo' / 'tiny.py'
    config.write_text(config.read_text() + "hold_out = '{{$GPLQ_HOLD_OUT:none}}'\n")
    commit(keeper.root)
    monkeypatch.setenv('GPLQ_HOLD_OUT', '0/5')
    assert 'GPLQ_HOLD_OUT=0/5 names no file or folder' in keeper.run('tiny')['tiny']
    assert keeper.run('tiny', variant='held-out') == {'tiny+held-out': 'measured'}
    command = keeper.measured('tiny+held-out')['command']
    assert command.startswith('export GPLQ_HOLD_OUT=0/5\npython tools/')


def test_every_seed_is_a_run(keeper):
    commit(keeper.root)
    names = ['tiny', 'tiny+seed-1', 'tiny+seed-2']
    assert keeper.run('tiny', seeds=(0, 1, 2)) == dict.fromkeys(names, 'measured')
    assert 'options' not in keeper.measured('tiny')
    assert keeper.measured('tiny+seed-2')['options'] == ['randomness.seed=2']
    assert keeper.run('tiny', seeds=(2,), variant='x') == {'tiny+x+seed-2': 'measured'}
    assert '| Stage 2 | W4A4 | 66.0 |' in (keeper.root / 'README.md').read_text()
    assert check_pages(keeper.root) == []


def test_a_run_on_stage_1_of_another_has_the_seed_of_that(keeper):
    config = keeper.root / 'configs' / 'demo' / 'tiny.py'
    config.write_text(config.read_text() + "train_cfg['act_qat_from'] = 'x.pth'\n")
    commit(keeper.root)
    outcomes = keeper.run('tiny', seeds=(0, 1))
    assert outcomes['tiny'] == 'measured'
    assert 'has the seed of that one: leave --seeds out' in outcomes['tiny+seed-1']


@pytest.mark.parametrize('name', ['configs/demo/tiny.py', 'gplq_mm/__init__.py'])
def test_changed_files_are_refused(keeper, name):
    path = keeper.root / name
    path.write_text(path.read_text() + '\n')
    assert 'files differ from commit' in keeper.run('tiny')['tiny']
    assert attempts(keeper.work_dir('tiny')) == []
    assert keeper.run('tiny', allow_dirty=True) == {'tiny': 'measured'}
    assert keeper.measured('tiny')['commit'].endswith('-dirty')


def test_files_that_git_does_not_know_are_refused(keeper):
    write_config(keeper.root, 'new')
    assert 'files differ from commit' in keeper.run('new')['new']
    # It is no part of this run.
    assert keeper.run('tiny') == {'tiny': 'measured'}


def test_documents_and_tables_may_change_between_runs(keeper):
    write_config(keeper.root, 'other')
    head = commit(keeper.root)
    keeper.run('tiny')
    (keeper.root / 'README.md').write_text((keeper.root / 'README.md').read_text() + 'More.\n')
    keeper.run('other')
    assert keeper.measured('other')['commit'] == head


def test_code_of_another_checkout_is_refused(keeper, monkeypatch):
    monkeypatch.setattr('tools.zoo.origin.IMPORTED', Path('/elsewhere'))
    assert 'imported from /elsewhere' in keeper.run('tiny')['tiny']


def test_a_broken_page_is_found_before_the_first_run(keeper):
    (keeper.root / 'README.md').write_text('<!-- zoo: tiny -->\n')
    with pytest.raises(ZooError, match='has no partner'):
        keeper.run('tiny')
    assert attempts(keeper.work_dir('tiny')) == []


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('configs/demo/none.py', 'does not exist'),
        ('tools/train.py', 'does not lie in a folder of'),
    ],
)
def test_files_that_are_no_configs_of_the_zoo(root, name, message):
    with pytest.raises(ZooError, match=message):
        plan_jobs(root, [root / name], [], None, root / 'work_dirs')


def test_remaining_time_is_that_of_runs_known(keeper):
    for name in ('a', 'b'):
        write_config(keeper.root, name)
    commit(keeper.root)
    keeper.run('a')
    put_entry(
        keeper.root,
        'a',
        keeper.root / 'configs' / 'demo' / 'a.py',
        {**keeper.measured('a'), 'seconds': 100},
    )
    keeper.lines.clear()
    keeper.run('b', 'a')
    # One that is unknown is taken to last as long as the known ones.
    assert keeper.lines[0] == '[1/2] b: 0:00:00 elapsed, about 0:03:20 remaining'


# -- killed -----------------------------------------------------------------------------------


def start(root: Path) -> subprocess.Popen:
    """The tool in a process of its own."""
    command = [sys.executable, str(TESTS / 'zoo_call.py'), str(root), 'configs/demo/tiny.py']
    return subprocess.Popen(command, cwd=root, text=True, stderr=subprocess.PIPE)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f'{path} never appeared'
        time.sleep(0.05)


def start_amid(keeper, kind: str) -> tuple[subprocess.Popen, Path]:
    """A zoo in the midst of a run of some kind, and the run's work dir."""
    write_config(keeper.root, 'tiny', kind)
    commit(keeper.root)
    work_dir = keeper.work_dir('tiny')
    process = start(keeper.root)
    wait_for(work_dir / 'hanging')
    return process, work_dir


def test_sigterm_ends_the_run_and_leaves_it_to_be_resumed(keeper):
    process, work_dir = start_amid(keeper, 'hang')
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert 'call again to go on' in errors
    state = read_json(work_dir / 'zoo.json')
    assert 'stages' not in state['measured']
    assert state['seconds'] > 0
    # The run has ended: nobody holds its folder, and it goes on from its checkpoint.
    assert keeper.run('tiny') == {'tiny': 'measured'}
    assert attempts(work_dir) == ['start', 'resume']
