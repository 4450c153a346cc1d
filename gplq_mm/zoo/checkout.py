"""What identifies a run: its config with all options, the code, and the commit of both."""

import hashlib
import json
import os
import re
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction

from ..evaluation.provenance import code_commit, describe_machine, git
from .files import ZooError

__all__ = [
    'clean_commit',
    'code_hash',
    'config_hash',
    'load_config',
    'machine_text',
    'run_command',
    'shorten_paths',
]

# The checkout of the code that runs.
IMPORTED = Path(__file__).resolve().parents[2]
ENVIRONMENT = re.compile(r'\{\{\s*\$(\w+)\s*:')
ABSOLUTE = re.compile(r'(?<![\w:/.])/[^\s\'",;\])]+')


def load_config(path: Path, options: list[str]) -> Config:
    """The config as tools/train.py sees it, with the options of ``--cfg-options``.

    Raises:
        ZooError: If an option is no ``key=value``.
    """
    cfg = Config.fromfile(path)
    for option in options:
        if '=' not in option:
            raise ZooError(f'--cfg-options {option} is not of the form key=value.')
    if options:
        parser = ArgumentParser()
        parser.add_argument('--cfg-options', nargs='+', action=DictAction)
        cfg.merge_from_dict(parser.parse_args(['--cfg-options', *options]).cfg_options)
    return cfg


def _hash(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def config_hash(cfg: Config) -> str:
    """Changes with every setting."""
    return _hash(json.dumps(cfg.to_dict(), sort_keys=True, default=str).encode())


def code_hash(root: Path) -> str:
    """Changes with all code that a run may execute."""
    files = [*root.glob('gplq_mm/**/*'), root / 'tools' / 'train.py']
    digest = hashlib.sha256()
    for path in sorted(files):
        place = path.relative_to(root)
        if path.suffix in ('.py', '.cpp', '.h') and not {'zoo', '.mim'} & set(place.parts):
            digest.update(place.as_posix().encode() + b'\0' + path.read_bytes())
    return digest.hexdigest()[:16]


def _untracked(root: Path, cfg: Config) -> list[str]:
    """The config's own files and files of the package that git does not know."""
    # mmengine puts the name of every file before its text.
    named = {Path(line) for line in cfg.text.splitlines() if line.endswith('.py')}
    own = [path.relative_to(root) for path in named if path.is_file() and root in path.parents]
    found = git(
        root, 'ls-files', '--others', '--exclude-standard', '--', 'gplq_mm/*.py', *map(str, own)
    )
    return found.split('\n') if found else []


def clean_commit(root: Path, cfg: Config, allow_dirty: bool) -> str:
    """The commit of code and config, in git's short form.

    Args:
        root: The checkout.
        cfg: Config that is about to run.
        allow_dirty: Whether files may differ from the commit, which then has ``-dirty`` behind it.

    Raises:
        ZooError: If they do and may not, there is no commit, or the code that is imported is not
            that of the checkout.
    """
    if root.resolve() != IMPORTED:
        raise ZooError(
            f'gplq_mm is imported from {IMPORTED}, but the configs are those of {root}: install '
            'this checkout, or set PYTHONPATH to it.'
        )
    commit = code_commit(root / 'tools' / 'train.py')
    if commit is None:
        raise ZooError(f'{root} is no git checkout: results would not say what code they are of.')
    untracked = _untracked(root, cfg)
    if untracked and not commit.endswith('-dirty'):
        commit += '-dirty'
    if commit.endswith('-dirty') and not allow_dirty:
        detail = f' ({", ".join(untracked)} is not in git)' if untracked else ''
        raise ZooError(
            f'files differ from commit {commit[:7]}{detail}: commit them, so that the results '
            'belong to a commit, or give --allow-dirty.'
        )
    short = git(root, 'rev-parse', '--short=7', 'HEAD')
    return f'{short}-dirty' if commit.endswith('-dirty') else short


def machine_text() -> str:
    """This machine in words."""
    machine = describe_machine(())
    cores, threads = machine['cores'], torch.get_num_threads()
    parts = [re.sub(r'\((R|TM)\)', '', machine['cpu']), machine['isa']]
    parts += [f'{cores} core{"s" * (cores > 1)}', f'{threads} thread{"s" * (threads > 1)}']
    return ', '.join(parts + ([machine['gpu']] if machine['gpu'] else []))


def run_command(root: Path, config: Path, cfg: Config, options: list[str]) -> str:
    """The command that repeats a run, in the checkout, without paths of this machine.

    Args:
        root: The checkout.
        config: Config file.
        cfg: What it holds; environment variables that it names are put before the command.
        options: Of ``--cfg-options``.
    """
    names = sorted(set(ENVIRONMENT.findall(cfg.text)))
    lines = [
        f'export {name}={shorten_paths(root, os.environ[name])}'
        for name in names
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
