"""Which checkpoints there are at which moment, and what the pointer names."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from gplq_mm.engine import GPLQCheckpointHook


class FakeRunner:
    """Writes files as the runner does, and looks at the folder while it does."""

    max_iters = 20
    epoch = 0
    param_schedulers = None
    train_dataloader = range(5)

    def __init__(self, work_dir):
        self.work_dir = str(work_dir)
        self.folder = work_dir
        self.iter = 0
        self.saved = []
        self.logger = SimpleNamespace(info=lambda *_args: None)

    def save_checkpoint(self, out_dir, filename, save_optimizer, **kwargs):
        pointer = self.folder / 'last_checkpoint'
        # Whoever is killed here resumes from what the pointer names.
        if pointer.exists():
            assert Path(pointer.read_text()).is_file()
        (self.folder / filename).write_text('complete')
        self.saved.append((filename, save_optimizer, kwargs['meta']['iter']))


@pytest.fixture
def runner(tmp_path):
    return FakeRunner(tmp_path)


def train(hook, runner, iterations: int) -> None:
    for index in range(iterations):
        runner.iter = index
        hook.after_train_iter(runner, index % 5)
        if index % 5 == 4:
            runner.iter = index + 1
            hook.after_train_epoch(runner)


def names(runner) -> list[str]:
    return sorted(path.name for path in runner.folder.glob('*.pth'))


def test_interval(runner):
    train(GPLQCheckpointHook(interval=6), runner, 20)
    assert runner.saved == [(f'iter_{n}.pth', True, n) for n in (6, 12, 18)]


def test_the_last_iteration_belongs_to_the_stage(runner):
    train(GPLQCheckpointHook(interval=10), runner, 20)
    assert runner.saved == [('iter_10.pth', True, 10)]


@pytest.mark.parametrize('keep', [1, 2, 5])
def test_old_files_go_and_the_newest_stay(runner, keep):
    train(GPLQCheckpointHook(interval=3, max_keep_ckpts=keep), runner, 20)
    kept = [f'iter_{n}.pth' for n in (3, 6, 9, 12, 15, 18)][-keep:]
    assert names(runner) == sorted(kept)
    assert (runner.folder / 'last_checkpoint').read_text() == str(runner.folder / 'iter_18.pth')


def test_files_of_stages_are_kept(runner):
    hook = GPLQCheckpointHook(interval=2, max_keep_ckpts=1)
    hook.after_stage(runner, 'calibrated', optimizer=False)
    train(hook, runner, 20)
    runner.iter = 20
    hook.after_stage(runner, 'w32a4', optimizer=False)
    assert names(runner) == ['calibrated.pth', 'iter_18.pth', 'w32a4.pth']
    assert (runner.folder / 'last_checkpoint').read_text().endswith('w32a4.pth')
    assert runner.saved[-1] == ('w32a4.pth', False, 20)


def test_pointer_stays_when_the_write_fails(runner, monkeypatch):
    hook = GPLQCheckpointHook(interval=4, max_keep_ckpts=1)
    train(hook, runner, 4)

    def full(*_args, **_kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(runner, 'save_checkpoint', full)
    runner.iter = 7
    with pytest.raises(OSError, match='No space left'):
        hook.after_train_iter(runner, 2)
    assert names(runner) == ['iter_4.pth']
    assert (runner.folder / 'last_checkpoint').read_text() == str(runner.folder / 'iter_4.pth')


def test_no_interval(runner):
    train(GPLQCheckpointHook(interval=-1), runner, 20)
    assert runner.saved == []


def test_keeping_none_is_refused():
    with pytest.raises(ValueError, match='max_keep_ckpts=0'):
        GPLQCheckpointHook(max_keep_ckpts=0)


def test_half_written_files_of_a_killed_run_go(runner):
    torn = ('.iter_4.pth.x7', '.last_checkpoint.ab', '.summary.json.q')
    kept = ('iter_4.pth', 'last_checkpoint', '.hidden')
    for name in (*torn, *kept):
        (runner.folder / name).write_text('x')
    GPLQCheckpointHook().before_train(runner)
    assert sorted(path.name for path in runner.folder.iterdir()) == sorted(kept)
