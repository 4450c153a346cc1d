"""Reading checkpoints without running code from them, writing them without tearing them."""

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import nn

from .errors import GPLQError

QUANTIZER_KEYS = (
    'act_quantizer.',
    'weight_quantizer.',
    'quant_attention.',
    'scaled_dot_product_attention.',
    'compensation.',
)


class CheckpointError(GPLQError, RuntimeError):
    """A checkpoint that cannot be read or does not belong to the model."""


def _history_method(owner: type, name: str) -> Callable:
    """All that a runner's checkpoint needs ``getattr`` for: the statistics of a history."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise UnpicklingError(f'the file asks for the attribute {name!r} of {owner!r}.')
    return getattr(owner, name)


def _safe_types() -> list:
    """Types beyond torch's own that OpenMMLab's files hold: numbers and histories."""
    types = [HistoryBuffer, np.ndarray, np.dtype]
    types += [type(np.dtype(name)) for name in ('float32', 'float64', 'int32', 'int64', 'bool')]
    multiarray = np._core.multiarray if hasattr(np, '_core') else np.core.multiarray
    types += [multiarray.scalar, multiarray._reconstruct]
    # Files written under numpy 1 name the module without the underscore.
    types += [(multiarray.scalar, 'numpy.core.multiarray.scalar')]
    types += [(multiarray._reconstruct, 'numpy.core.multiarray._reconstruct')]
    # The name under which torch's weights-only reader looks up the builtin.
    types += [(_history_method, 'getattr'), (_history_method, 'builtins.getattr')]
    return types


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a ``.pth`` file (``weights_only=True``), a ``.safetensors`` file or a URL, to CPU.

    Args:
        path: Local file, or an http(s) address (downloaded once, torch hub's cache).

    Returns:
        The content; a safetensors file as ``{'state_dict': ...}``.

    Raises:
        CheckpointError: For a missing, empty, truncated or foreign file, or one that holds more
            than tensors and plain data.
    """
    source = str(path)
    try:
        with torch.serialization.safe_globals(_safe_types()):
            if source.startswith(('http://', 'https://')):
                content = torch.hub.load_state_dict_from_url(
                    source, map_location='cpu', weights_only=True
                )
            elif not Path(source).is_file():
                raise CheckpointError(
                    f'checkpoint {source} does not exist; correct the path, or make the file first.'
                )
            elif source.endswith('.safetensors'):
                from safetensors.torch import load_file

                content = {'state_dict': load_file(source)}
            else:
                content = torch.load(source, map_location='cpu', weights_only=True)
    except UnpicklingError as error:
        raise CheckpointError(
            f'checkpoint {source} is damaged, or holds objects other than tensors and plain data, '
            'which are not loaded because that could run foreign code. Download or save it '
            f'again, weights only. ({str(error).partition(chr(10))[0]})'
        ) from error
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f'checkpoint {source} cannot be read: it is truncated or no checkpoint. Copy or '
            f'download it again. ({type(error).__name__}: {str(error).partition(chr(10))[0]})'
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f'checkpoint {source} holds a {type(content).__name__}, not a dict.')
    return dict(content)


def state_dict_of(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights inside a checkpoint, whatever the key they are filed under.

    Raises:
        CheckpointError: If there are no tensors.
    """
    for key in ('state_dict', 'model'):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    state = {key: value for key, value in checkpoint.items() if torch.is_tensor(value)}
    if not state:
        raise CheckpointError('the checkpoint holds no weights (no "state_dict" with tensors).')
    return {key.removeprefix('module.'): value for key, value in state.items()}


def adopt_biases(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Gives layers without a bias one, where the weights to be loaded have one.

    Reparametrized LayerNorms (RepQ-ViT) move a constant into the bias of the layers behind them.
    Left out, it would make another model of the same weights.

    Args:
        model: Model that ``state`` is about to be loaded into; changed in place.
        state: Weights by the names of the model.
    """
    for name, module in model.named_modules():
        bias = state.get(f'{name}.bias')
        if bias is None or not isinstance(module, (nn.Linear, nn.LayerNorm)):
            continue
        if module.bias is None:
            value = torch.zeros_like(bias, device=module.weight.device)
            module.bias = nn.Parameter(value, requires_grad=False)


def load_float_weights(model: nn.Module, path: str | os.PathLike, quantizers: bool = True) -> None:
    """Loads FP32 weights into ``model``, which may already be quantized.

    Args:
        model: Float or quantized model; the keys of both are the same.
        path: As in :func:`read_checkpoint`. ``architecture.`` in front of keys is dropped.
        quantizers: Whether the entries of quantizers are loaded, too, where the file has some.

    Raises:
        CheckpointError: If a parameter of the model is missing or has another shape.
    """
    state = state_dict_of(read_checkpoint(path))
    state = {
        key.removeprefix('architecture.'): value
        for key, value in state.items()
        if quantizers or not _is_quantizer_key(key)
    }
    adopt_biases(model, state)
    own = dict(model.named_parameters())
    # Statistics of BatchNorm are weights too: with the initial ones the model would be another.
    own |= {
        key: value
        for key, value in model.named_buffers()
        if key.endswith(('running_mean', 'running_var'))
    }
    try:
        # The models' own load hooks may reshape entries (position embeddings of another image
        # size), so whether the shapes fit is known only afterwards.
        missing = model.load_state_dict(state, strict=False).missing_keys
        wrong_shape = {}
    except RuntimeError:
        missing = [key for key in own if key not in state]
        wrong_shape = {
            key: (tuple(state[key].shape), tuple(own[key].shape))
            for key in own
            if key in state and state[key].shape != own[key].shape
        }
        if not wrong_shape:
            raise
    for key, (found, wanted) in wrong_shape.items():
        # Anchor heads have several rows a class and say nothing about their number.
        counts_classes = not re.search(r'(?<!fc)_cls\.weight$', key)
        if 'head' in key and key.endswith('.weight') and found[1:] == wanted[1:] and counts_classes:
            # mmdet's box classifier has one row more, the background's.
            background = key.endswith('fc_cls.weight')
            raise CheckpointError(
                f'checkpoint {path} classifies {found[0] - background} classes ({key}), the config '
                f'{wanted[0] - background}; set num_classes of the head to '
                f'{found[0] - background} or fine-tune first.'
            )
    missing = [key for key in missing if key in own and not _is_quantizer_key(key)]
    if wrong_shape or missing:
        example = next(iter(wrong_shape), None) or missing[0]
        detail = 'missing'
        if example in wrong_shape:
            detail = 'of shape {} instead of {}'.format(*wrong_shape[example])
        raise CheckpointError(
            f'checkpoint {path} is of another architecture: {len(missing)} parameters are missing '
            f'and {len(wrong_shape)} have another shape, for example {example} is {detail}. Use '
            'the checkpoint that belongs to the model config.'
        )


def _is_quantizer_key(key: str) -> bool:
    return any(part in key for part in QUANTIZER_KEYS)


def atomic_write(path: str | os.PathLike, write: Callable[[Any], None]) -> None:
    """Calls ``write(file)`` on a temporary neighbour of ``path`` and renames it into place.

    A reader sees the old file or the complete new one, also after a crash. On failure the
    temporary file is removed and the old file stays.

    Raises:
        OSError: If the disk is full or the folder cannot be written; the message says so.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f'.{path.name}.', dir=path.parent)
        with os.fdopen(descriptor, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)
        # torch.save reports a failed write as RuntimeError.
        if isinstance(error, (OSError, RuntimeError)):
            raise OSError(
                f'{path} could not be written ({error}); the earlier file, if any, is intact. '
                'Free some disk space, or choose another folder, and run again (training goes on '
                'with --resume).'
            ) from error
        raise
    # The rename itself must survive a power cut.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def atomic_write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text in UTF-8 as :func:`atomic_write` does.

    Raises:
        OSError: If the disk is full or the folder cannot be written; the message says so.
    """
    atomic_write(path, lambda file: file.write(text.encode()))


def to_plain(value: Any) -> Any:
    """Copies nested data into what ``weights_only=True`` can read: tensors, numbers, strings."""
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (
            type(value)(to_plain(item) for item in value)
            if type(value) in (list, tuple)
            else [to_plain(item) for item in value]
        )
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    return value
