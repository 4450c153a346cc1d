"""A checkout with a zoo of one config, whose tools/train.py measures nothing and takes no time."""

import json
import subprocess
from pathlib import Path

from tools.zoo.files import write_yaml

# Stands for tools/train.py: it leaves what a run leaves, as the config says.
TRAIN = """
import argparse, json, os, sys, time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument('config')
parser.add_argument('--work-dir', type=Path)
parser.add_argument('--resume', action='store_true')
parser.add_argument('--cfg-options', nargs='+', default=[])
args = parser.parse_args()
settings = {}
exec(Path(args.config).read_text(), settings)
with (args.work_dir / 'attempts').open('a') as file:
    file.write('resume\\n' if args.resume else 'start\\n')
print('2026/01/01 00:00:00 - mmengine - INFO - evaluation of fp32', file=sys.stderr)
(args.work_dir / 'last_checkpoint').write_text('iter_1.pth')
end = settings['end']
if end == 'fail':
    sys.exit('ValueError: the loss is not finite')
if end == 'fail once' and not args.resume:
    sys.exit('MemoryError')
if end == 'hang' and not args.resume:
    (args.work_dir / 'hanging').touch()
    time.sleep(60)
(args.work_dir / 'summary.json').write_text(json.dumps(settings['summary']))
"""
CONFIG = """
default_scope = 'mmpretrain'
model = dict(type='gplq_mm.GPLQ', pretrained='x.pth')
data = dict(type='gplq_mm.MNIST5k', pipeline=[], serialize_data=False)
train_dataloader = dict(
    dataset=dict(
        type='gplq_mm.SeededDataset', dataset=dict(data, split='train', indices=[3, 1, 2])
    )
)
val_dataloader = dict(dataset=dict(data, split='val', indices=[0, 4]))
train_cfg = dict(max_epochs=1)
lr = 0.1
end = {end!r}
summary = {summary!r}
"""


def summary(top1: float = 66.04) -> dict:
    """The keys of a summary.json that the zoo reads."""
    stages = {'fp32': 72.0, 'ptq_w4a4': 51.6, 'w32a4': 68.6, 'latent_fp32': 72.2, 'w4a4': top1}
    distances = {'ptq_w4a4': 0.703, 'w32a4': 0.475, 'latent_fp32': 0.103, 'w4a4': 0.5184999}
    return {
        'metrics': {stage: {'accuracy/top1': value} for stage, value in stages.items()},
        'feature_distance': {
            stage: {'relative_l2': value, 'cosine': 1 - value / 2, 'agreement': 80.0}
            for stage, value in distances.items()
        },
        'transfer': {'w4a4': {'top1': 91.25, 'agreement': 97.5}},
        'images': {'training': 6, 'seen': 14},
        'seconds': {'act_qat': 5.5, 'weight_ptq': 1.5},
        'peak_memory_mb': {'act_qat': 900.5, 'weight_ptq': 800.0},
        'weight_drift': {'mae': 1.2345678e-4, 'mse': 2e-8, 'layers': {}},
        'ptq_error': {'with_stage1': {'mae': 0.1, 'mse': 0.0027, 'layers': {}}},
        'pca': {'num_components': 32, 'explained_variance': 0.99, 'spectrum': [1.0]},
        'act_qat_iterations': 3,
        'seed': 0,
    }


def measured(**changes) -> dict:
    """Content of ``Measured`` of an entry."""
    return {
        'command': 'python tools/train.py configs/demo/tiny.py',
        'commit': '7765805',
        'machine': 'Xeon, 2 cores',
        'data': {
            'training': {'type': 'ImageNetFolder', 'folder': 'nette', 'images': 3000},
            'validation': {'type': 'ImageNetFolder', 'folder': 'nette', 'images': 500},
        },
        'seconds': 564,
        'stages': {
            'fp32': {'top1': 72.0},
            'ptq_w4a4': {'top1': 51.6, 'relative_l2': 0.703},
            'w32a4': {'top1': 68.6, 'relative_l2': 0.475},
            'w4a4': {'top1': 66.0, 'relative_l2': 0.518},
        },
        **changes,
    }


TABLES = {
    'Tables': {
        'tiny': {
            'model': 'tiny',
            'rows': [
                {'label': 'FP32', 'stage': 'fp32'},
                {'label': 'plain PTQ', 'stage': 'ptq'},
                {'label': 'Stage 1', 'stage': 'act'},
                {'label': 'Stage 2', 'stage': 'final'},
            ],
            'columns': [
                {'title': 'model', 'cell': '{label}'},
                {'title': 'bits', 'cell': '{bits}'},
                {'title': 'top-1', 'cell': '{top1:.1f}'},
                {'title': 'distance', 'cell': '{relative_l2:.3f}'},
            ],
        }
    }
}
PAGE = """# Demo

Before.

<!-- zoo: tiny -->
<!-- /zoo -->

After.
"""


def git(root: Path, *arguments: str) -> str:
    """Output of a git command."""
    identity = ['-c', 'user.name=nobody', '-c', 'user.email=nobody@example.org']
    command = ['git', '-C', str(root), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def write_config(root: Path, name: str = 'tiny', end: str = 'well', **changes) -> Path:
    """A config whose run ends as it says: ``well``, ``fail``, ``fail once``, ``hang``."""
    path = root / 'configs' / 'demo' / f'{name}.py'
    path.write_text(CONFIG.format(end=end, summary=summary(**changes)))
    return path


def make_checkout(root: Path) -> Path:
    """Writes the checkout and commits it."""
    for folder in ('configs/demo', 'tools', 'gplq_mm'):
        (root / folder).mkdir(parents=True)
    (root / 'tools' / 'train.py').write_text(TRAIN)
    (root / 'gplq_mm' / '__init__.py').write_text('')
    write_config(root)
    write_yaml(root / 'configs' / 'demo' / 'tables.yml', TABLES)
    (root / 'README.md').write_text(PAGE)
    (root / '.gitignore').write_text('work_dirs\n')
    git(root, 'init', '-q')
    commit(root)
    return root


def commit(root: Path) -> str:
    """Commits everything; returns the commit in its short form."""
    git(root, 'add', '-A')
    git(root, 'commit', '-q', '--allow-empty', '-m', 'x')
    return git(root, 'rev-parse', '--short=7', 'HEAD')


def attempts(work_dir: Path) -> list[str]:
    """How the run was called, each time."""
    path = work_dir / 'attempts'
    return path.read_text().split() if path.exists() else []


def read_json(path: Path) -> dict:
    """Content of a JSON file."""
    return json.loads(path.read_text())
