"""Where a measurement was taken, and of which code."""

import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# What cannot change a result: documents, and the tables that are written after a measurement.
NOT_CODE = (':(exclude,glob)**/*.md', ':(exclude,glob)**/*.yml')


def git(folder: str | os.PathLike, *arguments: str) -> str | None:
    """Output of a git command in ``folder``, or None if it fails or there is no git."""
    command = ['git', '-C', str(folder), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def code_commit(file: str | os.PathLike = __file__) -> str | None:
    """Commit of the checkout that a file is part of, 40 hex digits.

    Args:
        file: Defaults to this module.

    Returns:
        The commit, with ``-dirty`` behind it if a file that is code differs from it; None outside
        a checkout.
    """
    file = Path(file).resolve()
    # Inside a virtual environment git may find a checkout of something else.
    if git(file.parent, 'ls-files', '--error-unmatch', file.name) is None:
        return None
    commit = git(file.parent, 'rev-parse', 'HEAD')
    root = git(file.parent, 'rev-parse', '--show-toplevel')
    if commit is None or root is None:
        return None
    changed = git(root, 'status', '--porcelain', '--untracked-files=no', '--', '.', *NOT_CODE)
    return commit if changed == '' else f'{commit}-dirty'


def _cpu_name() -> str:
    try:
        text = Path('/proc/cpuinfo').read_text(encoding='utf-8')
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(':')[2].strip() for line in text.splitlines() if 'model name' in line]
    return names[0] if names else platform.machine()


def describe_machine(packages: Iterable[str]) -> dict[str, Any]:
    """Where a measurement was taken.

    Args:
        packages: Distributions whose versions are noted.

    Returns:
        ``cpu``, ``isa`` (as torch names it), ``cores`` (those this process may use), ``gpu`` (name,
        None where there is none), ``load`` (runnable processes, mean over the last minute),
        ``python``, ``platform``, ``versions`` (None where a package is absent), ``commit`` (of
        :func:`code_commit`), ``time`` (UTC).
    """
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        'cpu': _cpu_name(),
        'isa': torch.backends.cpu.get_cpu_capability(),
        'cores': len(os.sched_getaffinity(0)),
        'gpu': torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        'load': os.getloadavg()[0],
        'python': platform.python_version(),
        'platform': platform.platform(),
        'versions': versions,
        'commit': code_commit(),
        'time': datetime.now(timezone.utc).isoformat(timespec='seconds'),
    }
