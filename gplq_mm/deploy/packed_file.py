"""The packed file: safetensors with one JSON document in its metadata.

The metadata has one entry, ``gplq_mm``: ``{"format", "version", "sha256", "header"}``. The
checksum covers the header and name, type, shape and bytes of every tensor. What the header says
stands in :mod:`.export`.
"""

import hashlib
import json
import os
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from ..checkpoint import atomic_write
from ..layers import DeployError

FORMAT = 'gplq_mm packed model'
VERSION = 1
KEY = 'gplq_mm'
AGAIN = 'Copy or download it again, or deploy the checkpoint again with tools/deploy.py.'


def _canonical(header: dict) -> str:
    return json.dumps(header, sort_keys=True, separators=(',', ':'), allow_nan=False)


def _checksum(header: dict, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(_canonical(header).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f'\n{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_file(path: str | os.PathLike, header: dict, tensors: dict[str, Tensor]) -> None:
    """Writes a packed file; it appears complete or not at all.

    Args:
        path: The file.
        header: JSON data.
        tensors: Tensors on the CPU.

    Raises:
        OSError: If the file cannot be written.
    """
    tensors = {name: tensors[name].contiguous() for name in sorted(tensors)}
    document = {
        'format': FORMAT,
        'version': VERSION,
        'sha256': _checksum(header, tensors),
        'header': header,
    }
    data = safetensors.torch.save(tensors, {KEY: json.dumps(document, allow_nan=False)})
    atomic_write(path, lambda file: file.write(data))


def _no_constant(name: str):
    raise ValueError(f'{name} is no number')


def read_file(path: str | os.PathLike) -> tuple[dict, dict[str, Tensor]]:
    """Reads a packed file and verifies it.

    Returns:
        Header, and tensors on the CPU. What they hold is not checked here.

    Raises:
        DeployError: For a missing, truncated, changed or foreign file, or another version.
    """
    path = Path(path)
    if not path.is_file():
        raise DeployError(f'{path} does not exist; correct the path, or run tools/deploy.py first.')
    # Into memory, not mapped: a file that changes while it is used must not crash the process.
    data = path.read_bytes()
    if data[:2] in (b'PK', b'\x80\x02'):
        raise DeployError(
            f'{path} is a checkpoint, not a packed model; make one of it with tools/deploy.py.'
        )
    try:
        with safe_open(path, 'pt') as file:
            metadata = file.metadata() or {}
        tensors = safetensors.torch.load(data)
    except Exception as error:
        raise DeployError(
            f'{path} is damaged, truncated or no safetensors file ({error}). {AGAIN}'
        ) from error
    if KEY not in metadata:
        raise DeployError(
            f'{path} is a safetensors file that gplq_mm did not write; a packed model is made '
            'with tools/deploy.py.'
        )
    try:
        document = json.loads(metadata[KEY], parse_constant=_no_constant)
        name, version, header = (document[key] for key in ('format', 'version', 'header'))
        is_whole = document['sha256'] == _checksum(header, tensors)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DeployError(f'{path} has a damaged header. {AGAIN}') from error
    if name != FORMAT or type(version) is not int:
        raise DeployError(f'{path} is not of the format "{FORMAT}". {AGAIN}')
    if version != VERSION:
        advice = 'Update gplq_mm.' if version > VERSION else 'Deploy the checkpoint again.'
        raise DeployError(
            f'{path} is of format version {version}, this gplq_mm reads version {VERSION}. {advice}'
        )
    if not is_whole or not isinstance(header, dict):
        raise DeployError(f'{path} was changed or damaged: its checksum does not match. {AGAIN}')
    return header, tensors
