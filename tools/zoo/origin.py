"""Where a result comes from: code and settings, commit, command, machine and data of a run."""

import hashlib
import json
import os
import re
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import DefaultScope

import gplq_mm
from gplq_mm.evaluation.provenance import describe_machine, git
from gplq_mm.registry import DATASETS

from .files import ZooError

__all__ = [
    'ENVIRONMENT',
    'clean_commit',
    'describe_data',
    'load_config',
    'machine_text',
    'run_command',
    'run_key',
    'shorten_paths',
]

# The checkout of the code that runs.
IMPORTED = Path(gplq_mm.__file__).resolve().parents[1]
ENVIRONMENT = re.compile(r'\{\{\s*\$(\w+)\s*:')
ABSOLUTE = re.compile(r'(?<![\w:/.])/[^\s\'",;\])]+')
CODE = {'.py', '.cpp', '.h'}


def load_config(path: Path, options: list[str]) -> Config:
    """The config as tools/train.py sees it, with the options of ``--cfg-options``.

    Raises:
        ZooError: If an option is no ``key=value``.
    """
    if wrong := [option for option in options if '=' not in option]:
        raise ZooError(f'--cfg-options {wrong} are not of the form key=value.')
    cfg = Config.fromfile(path)
    parser = ArgumentParser()
    parser.add_argument('--cfg-options', nargs='*', action=DictAction)
    cfg.merge_from_dict(parser.parse_args(['--cfg-options', *options]).cfg_options)
    return cfg


def run_key(root: Path, cfg: Config) -> str:
    """Changes with every setting, and with all code that a run may execute."""
    digest = hashlib.sha256(json.dumps(cfg.to_dict(), sort_keys=True, default=str).encode())
    for path in sorted([*root.glob('gplq_mm/**/*'), root / 'tools' / 'train.py']):
        place = path.relative_to(root)
        if path.suffix in CODE and '.mim' not in place.parts:
            digest.update(place.as_posix().encode() + b'\0' + path.read_bytes())
    return digest.hexdigest()[:16]


def clean_commit(root: Path, cfg: Config, allow_dirty: bool) -> str:
    """The commit of code and config, in git's short form.

    Files that differ from it may do so with ``allow_dirty`` only; it has ``-dirty`` behind it then.

    Raises:
        ZooError: If they do and may not, there is no commit, or the code that is imported is not
            that of the checkout.
    """
    if root.resolve() != IMPORTED:
        raise ZooError(
            f'gplq_mm is imported from {IMPORTED}, but the configs are those of {root}: install '
            'this checkout, or set PYTHONPATH to it.'
        )
    commit = git(root, 'rev-parse', '--short=7', 'HEAD')
    if commit is None:
        raise ZooError(f'{root} is no git checkout: results would not say what code they are of.')
    # mmengine puts the name of every file before its text.
    named = {Path(line) for line in cfg.text.splitlines() if line.endswith('.py')}
    own = [str(path) for path in named if path.is_file() and root in path.parents]
    changed = git(root, 'status', '--porcelain', '--', 'gplq_mm', 'tools/train.py', *own)
    if changed and not allow_dirty:
        raise ZooError(
            f'files differ from commit {commit} ({", ".join(changed.split()[1::2])}): commit them, '
            'so that the results belong to a commit, or give --allow-dirty.'
        )
    return f'{commit}-dirty' if changed else commit


def machine_text() -> str:
    """This machine in words."""
    machine = describe_machine(())
    cores, threads = machine['cores'], torch.get_num_threads()
    parts = [re.sub(r'\((R|TM)\)', '', machine['cpu']), machine['isa']]
    parts += [f'{cores} core{"s" * (cores > 1)}', f'{threads} thread{"s" * (threads > 1)}']
    return ', '.join(parts + ([machine['gpu']] if machine['gpu'] else []))


def run_command(root: Path, config: Path, cfg: Config, options: list[str]) -> str:
    """The command that repeats a run, in the checkout, without paths of this machine.

    Environment variables that the config names are put before it.
    """
    lines = [
        f'export {name}={shorten_paths(root, os.environ[name])}'
        for name in sorted(set(ENVIRONMENT.findall(cfg.text)))
        if os.environ.get(name)
    ]
    command = f'python tools/train.py {config.relative_to(root).as_posix()}'
    if options:
        quoted = (shorten_paths(root, option) for option in options)
        quoted = [f"'{text}'" if re.search(r'[\s"\[\](){}*?$]', text) else text for text in quoted]
        command += ' --cfg-options \\\n    ' + ' \\\n    '.join(quoted)
    return '\n'.join([*lines, command])


def shorten_paths(root: Path, text: str) -> str:
    """``text`` with absolute paths relative to the checkout or the working directory.

    Of paths outside only the last part stays.
    """

    def shorten(match: re.Match) -> str:
        path = Path(match[0])
        for base in (root, Path.cwd()):
            if path.is_relative_to(base):
                return path.relative_to(base).as_posix()
        return path.name

    return ABSOLUTE.sub(shorten, text)


def describe_data(cfg: Config) -> dict[str, dict[str, Any]]:
    """Builds the data sets of a config and counts their images.

    Args:
        cfg: Config of a run.

    Returns:
        ``training`` and ``validation`` (where the config has them) to ``type`` of the data set,
        ``folder`` (last part of its path; missing for data that comes with the package) and
        ``images``.

    Raises:
        OSError, ValueError: What the data set raises if its files are missing or damaged.
    """
    described = {}
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope') or 'mmengine'):
        for name, key in (('training', 'train_dataloader'), ('validation', 'val_dataloader')):
            if cfg.get(key) is None:
                continue
            leaves = list(_leaves(cfg[key]['dataset']))
            types = [leaf['type'].split('.')[-1] for leaf in leaves]
            folders = [folder for leaf in leaves if (folder := _folder(leaf))]
            described[name] = {
                'type': '+'.join(dict.fromkeys(types)),
                **({'folder': '+'.join(dict.fromkeys(folders))} if folders else {}),
                'images': len(DATASETS.build(cfg[key]['dataset'])),
            }
    return described


def _leaves(dataset: Mapping) -> Iterator[Mapping]:
    """The data sets inside wrappers."""
    inner = dataset.get('datasets') or ([dataset['dataset']] if 'dataset' in dataset else [])
    for item in inner:
        yield from _leaves(item)
    if not inner:
        yield dataset


def _folder(dataset: Mapping) -> str:
    prefix = dataset.get('data_prefix')
    return Path(dataset.get('data_root') or (prefix if isinstance(prefix, str) else '')).name
