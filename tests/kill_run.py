"""Kills a run of quickstart size at random moments, resumes it each time, and compares the end.

    python tests/kill_run.py --kills 30 --seed 0 --work-dir work_dirs/kill

The run is configs/quickstart/gplq_vit_mnist.py with fewer iterations and images, on a model that
is trained for a moment first. An undisturbed run says when what happens, in seconds of its own
computation, which other work on the machine does not stretch. Moments are drawn uniformly in the
time of each stage and taken in order. After every kill all files in the work dir must be complete,
and in the end every tensor must equal, bit by bit, that of the undisturbed run.

Each life is a process forked from this one, which saves the seconds of the imports.
"""

import argparse
import json
import os
import random
import re
import signal
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Before torch: one kernel for all lives, and no threads that a fork would lose.
os.environ['OMP_NUM_THREADS'] = '1'
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402
from tiny_runs import comparable, load_tool, read_summary, weights  # noqa: E402

from gplq_mm.checkpoint import read_checkpoint  # noqa: E402

STAGE_1_SHARE = 2 / 3
POLL = 0.002
# Lines that say in which part of a run the lines after them are.
SECTION = re.compile(r'evaluation of \S+|saved .*/(\S+)|calibration \d/\d|PCA|Weight-PTQ')


@dataclass(frozen=True)
class Event:
    """A line of the log, without what differs from life to life, and when it came."""

    seconds: float
    key: str


@dataclass(frozen=True)
class Moment:
    """A place in the undisturbed run: after an event, and so many seconds later."""

    stage: int
    position: int
    delay: float


class Log:
    """Reads the events of a life while it lives."""

    def __init__(self, path: Path):
        self.file = path.open()
        self.section = ''
        self.rest = ''

    def new_keys(self) -> Iterator[str]:
        """Keys of the lines that have come since the last call."""
        *lines, self.rest = (self.rest + self.file.read()).split('\n')
        for line in lines:
            if ' - INFO - ' not in line:
                continue
            text = line.split(' - INFO - ', 1)[1].strip()
            found = SECTION.match(text)
            if found:
                # w4a4.pth is saved twice, before its evaluation and after.
                place = f' after {self.section}' if self.section.startswith('eval') else ''
                self.section = found[1] or found[0]
                yield self.section + (place if found[1] else '')
                continue
            found = re.match(r'(Epoch\(\w+\))\s+\[(\d+)\]\[\s*(\d+)/', text)
            if found:
                # Evaluations follow each other with the same lines.
                place = '' if 'train' in found[1] else self.section
                yield ' '.join((place, *found.groups())).strip()


def start(config: Path, log: Path, resume: bool = False) -> int:
    """Forks a life; returns its process id."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        load_tool('train').main([str(config), *(['--resume'] if resume else [])])
        code = 0
    except SystemExit as error:
        print(error)
    finally:
        sys.stdout.flush()
        os._exit(code)


def has_ended(process: int) -> bool:
    """Whether a life is over; raises if it failed."""
    done, status = os.waitpid(process, os.WNOHANG)
    if done and status:
        raise RuntimeError(f'a run has failed with status {status}; its log says why.')
    return bool(done)


def computed(process: int) -> float:
    """Seconds that a process has computed."""
    # The number of another process's clock, as clock_getcpuclockid(3) makes it.
    return time.clock_gettime((~process << 3) | 2)


def run_undisturbed(config: Path, log: Path) -> list[Event]:
    """Runs to the end and notes what happened when, the first time that it did."""
    process = start(config, log)
    while not log.exists():
        time.sleep(POLL)
    reader, events, now = Log(log), {}, 0.0
    while not has_ended(process):
        now = computed(process)
        for key in reader.new_keys():
            events.setdefault(key, Event(now, key))
        time.sleep(POLL)
    return list(events.values())


def draw_moments(events: list[Event], kills: int, seed: int) -> list[Moment]:
    """Moments of both stages, in order."""
    times = [event.seconds for event in events]
    keys = [event.key for event in events]
    border = times[keys.index('w32a4.pth after evaluation of latent_fp32')]
    # After it the run might be through before it is killed, and nothing left for the next kill.
    last = times[-2]
    generator = random.Random(seed)
    in_stage_1 = round(kills * STAGE_1_SHARE)
    drawn = [generator.uniform(times[0], border) for _ in range(in_stage_1)]
    drawn += [generator.uniform(border, last) for _ in range(kills - in_stage_1)]
    moments = []
    for moment in sorted(drawn):
        position = bisect_right(times, moment) - 1
        moments.append(Moment(1 + (moment >= border), position, moment - times[position]))
    return moments


def kill_at(moment: Moment, order: dict[str, int], config: Path, log: Path, resume: bool) -> str:
    """One life up to ``moment``, or to the first event after it; returns the last event."""
    log.unlink(missing_ok=True)
    process = start(config, log, resume)
    while not log.exists():
        time.sleep(POLL)
    reader, last, place, reached = Log(log), 'start', -1, None
    while True:
        for key in reader.new_keys():
            if order.get(key, -1) > place:
                last, place = key, order[key]
        if place == moment.position and reached is None:
            reached = computed(process)
        if place > moment.position:
            break
        if reached is not None and computed(process) - reached >= moment.delay:
            break
        if has_ended(process):
            raise RuntimeError(f'the run ended before event {moment.position}, after {last!r}.')
        time.sleep(POLL)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if not os.WIFSIGNALED(status):
        raise RuntimeError('the run ended by itself before it was killed.')
    return last


def check_files(work_dir: Path) -> tuple[int, int, str]:
    """Reads everything that a killed run left.

    Returns:
        Complete checkpoints, temporary files, and the name of the checkpoint to resume from.

    Raises:
        CheckpointError: If one is torn.
    """
    files = sorted(path for path in work_dir.glob('*.pth') if not path.name.startswith('.'))
    for path in files:
        read_checkpoint(path)
    pointer, last = work_dir / 'last_checkpoint', 'none yet'
    if pointer.exists():
        last = Path(pointer.read_text())
        if last not in files:
            raise RuntimeError(f'{pointer} names {last}, which is not there.')
        last = last.name
    if (work_dir / 'summary.json').exists():
        json.loads((work_dir / 'summary.json').read_text())
    return len(files), len(list(work_dir.glob('.*'))), last


def write_configs(folder: Path) -> dict[str, Path]:
    """Configs of the float model and of both runs, by name."""
    quickstart = ROOT / 'configs' / 'quickstart'
    fp32 = Config.fromfile(quickstart / 'vit_mnist_fp32.py')
    fp32.work_dir = str(folder / 'fp32')
    fp32.train_cfg.update(max_epochs=2, val_interval=2)
    # The warm-up of the real schedule takes half of these two epochs.
    fp32.param_scheduler = None
    paths = {'fp32': fp32}
    for name in ('undisturbed', 'killed'):
        cfg = Config.fromfile(quickstart / 'gplq_vit_mnist.py')
        cfg.work_dir = str(folder / name)
        cfg.model.pretrained = str(folder / 'fp32' / 'epoch_2.pth')
        cfg.train_cfg.update(max_epochs=1, num_diagnostic_images=250)
        cfg.custom_hooks[1].num_images = 256
        cfg.default_hooks.checkpoint.interval = 6
        cfg.default_hooks.logger.interval = 1
        paths[name] = cfg
    for name, cfg in paths.items():
        paths[name] = folder / f'{name}.py'
        cfg.dump(paths[name])
    return paths


def compare(folder: Path) -> int:
    """Number of tensors compared; raises if one differs."""
    count = 0
    for name in ('calibrated', 'w32a4', 'w4a4'):
        first, second = (weights(folder / run, name) for run in ('undisturbed', 'killed'))
        different = [k for k in first if k not in second or not torch.equal(first[k], second[k])]
        if first.keys() != second.keys() or different:
            raise RuntimeError(f'{name}.pth: {len(different)} tensors differ: {different[:3]}')
        count += len(first)
    first, second = (comparable(read_summary(folder / run)) for run in ('undisturbed', 'killed'))
    if first != second:
        different = [key for key in first if first[key] != second[key]]
        raise RuntimeError(f'summary.json: {different} differ.')
    return count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--kills', type=int, default=30)
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'kill')
    args = parser.parse_args()
    folder = args.work_dir.resolve()
    if (folder / 'killed').exists():
        parser.error(f'{folder} holds an earlier run; remove it or choose another folder.')
    torch.set_num_threads(1)
    begin = time.monotonic()

    def tell(text: str) -> None:
        print(f'{time.monotonic() - begin:5.0f} s  {text}', flush=True)

    tell(f'seed {args.seed}; float model, two epochs')
    folder.mkdir(parents=True, exist_ok=True)
    configs = write_configs(folder)
    run_undisturbed(configs['fp32'], folder / 'fp32.log')
    tell('undisturbed run')
    events = run_undisturbed(configs['undisturbed'], folder / 'undisturbed.log')
    tell(f'the undisturbed run has computed for {events[-1].seconds:.1f} s')
    moments = draw_moments(events, args.kills, args.seed)
    order = {event.key: index for index, event in enumerate(events)}
    config, log = configs['killed'], folder / 'killed.log'
    temporary = 0
    for number, moment in enumerate(moments):
        wanted = events[moment.position].key
        found = kill_at(moment, order, config, log, resume=number > 0)
        complete, torn, last = check_files(folder / 'killed')
        temporary += torn
        late = '' if found == wanted else f', in fact after {found!r}'
        tell(
            f'kill {number + 1}/{args.kills}: stage {moment.stage}, {moment.delay:.2f} s after '
            f'{wanted!r}{late}; {complete} checkpoints complete, {torn} temporary; '
            f'resume from {last}'
        )
    process = start(config, log, resume=True)
    while not has_ended(process):
        time.sleep(POLL)
    count = compare(folder)
    left = list((folder / 'killed').glob('.*'))
    if left:
        raise RuntimeError(f'temporary files were left behind: {left}')
    in_stage_1 = sum(moment.stage == 1 for moment in moments)
    tell(
        f'{args.kills} kills ({in_stage_1} in Stage 1, {args.kills - in_stage_1} in Stage 2; '
        f'{temporary} amid a write), no file torn; {count} tensors and the summary are equal'
    )


if __name__ == '__main__':
    main()
