"""Convert the weights of a timm ViT or DeiT to mmpretrain's names.

Usage: python tools/convert_timm.py SRC.safetensors DST.pth

Either file may be .safetensors or .pth. mmengine's ``load_from`` and ``Pretrained`` read .pth.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from gplq_mm.checkpoint import atomic_write
from gplq_mm.errors import DataError, SettingError, one_line_errors
from gplq_mm.models.timm_conversion import convert_timm_vit_state_dict

_FORMATS = ('.safetensors', '.pth')


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict, also one that a checkpoint holds under 'model' or 'state_dict'.

    Args:
        path (Path): A .safetensors or .pth file.

    Raises:
        DataError: If the file is missing, truncated or holds no state dict; names the file.
    """
    if not path.is_file():
        raise DataError(f'{path} does not exist: give the file with the timm weights.')
    try:
        if path.suffix == '.safetensors':
            return load_file(path)
        content = torch.load(path, map_location='cpu', weights_only=True)
    # The readers have many kinds of errors, from SafetensorError to UnpicklingError and EOFError.
    except Exception as error:
        reason = str(error).partition('\n')[0]
        raise DataError(
            f'{path} cannot be read as weights ({type(error).__name__}: {reason}): it is '
            'truncated or of another format, fetch it again.'
        ) from error
    for key in ('model', 'state_dict'):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise DataError(f'{path} holds no state dict: give a file that maps names to tensors.')
    return dict(content)


def write_state_dict(state_dict: dict[str, torch.Tensor], path: Path) -> None:
    """Write a state dict so that ``path`` is at any moment absent, the old file or the whole one.

    Args:
        state_dict (dict[str, Tensor]): What to write.
        path (Path): A .safetensors or .pth file.
    """
    if path.suffix == '.safetensors':
        tensors = {key: value.contiguous() for key, value in state_dict.items()}
        atomic_write(path, lambda file: file.write(save(tensors, {'format': 'pt'})))
    else:
        atomic_write(path, lambda file: torch.save({'state_dict': state_dict, 'meta': {}}, file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('src', type=Path, help='timm weights, .safetensors or .pth')
    parser.add_argument('dst', type=Path, help='file to write, .safetensors or .pth')
    args = parser.parse_args()
    with one_line_errors():
        for path in (args.src, args.dst):
            if path.suffix not in _FORMATS:
                raise SettingError(f'{path} ends in neither .safetensors nor .pth: rename it.')
        if not args.dst.parent.is_dir():
            raise SettingError(f'The folder {args.dst.parent} does not exist: create it first.')
        source = read_state_dict(args.src)
        try:
            state_dict = convert_timm_vit_state_dict(source)
        except DataError as error:
            raise DataError(f'{args.src}: {error}') from error
        write_state_dict(state_dict, args.dst)
    count = sum(tensor.numel() for tensor in state_dict.values())
    print(f'Wrote {len(state_dict)} tensors, {count:,} parameters, to {args.dst}.')


if __name__ == '__main__':
    main()
