"""Which device a packed model can run on."""

import functools
import logging

import torch

from ..errors import SettingError

_logger = logging.getLogger(__name__)


@functools.cache
def _warn_no_cuda() -> None:
    _logger.warning('no CUDA device is usable: the model runs on the CPU.')


def resolve_device(device: str | torch.device) -> torch.device:
    """Device to run on when ``device`` is asked for.

    ``'cuda'`` on a machine without a usable GPU becomes ``'cpu'``, and a warning is logged once a
    process.

    Args:
        device: ``'cpu'``, ``'cuda'``, ``'cuda:1'`` or a torch device.

    Raises:
        SettingError: If a GPU is named by a number that this machine does not have, or the device
            is neither a CPU nor a CUDA one.
    """
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise SettingError(f'{device!r} is not a device: {error}') from error
    if device.type == 'cpu':
        return device
    if device.type != 'cuda':
        raise SettingError(f"packed models run on 'cpu' or 'cuda', got {str(device)!r}.")
    if not torch.cuda.is_available():
        _warn_no_cuda()
        return torch.device('cpu')
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise SettingError(f'this machine has {count} CUDA devices, {str(device)!r} is not one.')
    return device
