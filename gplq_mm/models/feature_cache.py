"""Outputs of a frozen network, computed once an image."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from .feature_store import (
    FeatureStore,
    FeatureStoreError,
    FeatureStoreUnavailableError,
    flatten,
    unflatten,
)
from .frozen import frozen_outputs, state_of

__all__ = ['FeatureCache', 'fingerprint', 'image_key']

LARGEST_OUTPUT = 2**20
# Settings of a model that say nothing about what it computes from an image tensor.
WITHOUT_EFFECT = ('data_preprocessor', 'init_cfg', 'train_cfg', 'pretrained')


def _bytes(tensor: Tensor):
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def image_key(image: Tensor) -> bytes:
    """Digest of an image tensor's shape, dtype and bytes."""
    digest = hashlib.blake2b(f'{image.dtype} {tuple(image.shape)} '.encode(), digest_size=32)
    digest.update(_bytes(image))
    return digest.digest()


def fingerprint(
    network: nn.Module, taken: Mapping, dtype: torch.dtype, device: torch.device
) -> bytes:
    """Digest of all that a frozen network's outputs depend on besides the image.

    Args:
        network: The network.
        taken: What it was built from and which outputs are taken, in plain data: equal weights
            compute something else with another number of heads.
        dtype: Precision of the computation.
        device: Its kind counts: devices differ in the last bits.
    """
    settings = {
        'taken': {key: value for key, value in taken.items() if key not in WITHOUT_EFFECT},
        'dtype': str(dtype),
        'device': device.type,
        'torch': torch.__version__,
        'disabled': _disabled(network),
    }
    text = json.dumps(settings, sort_keys=True, default=repr)
    digest = hashlib.blake2b(text.encode(), digest_size=32)
    for name, tensor in state_of(network).items():
        digest.update(f'\n{name} {tensor.dtype} {tuple(tensor.shape)} '.encode())
        digest.update(_bytes(tensor))
    return digest.digest()


def _disabled(network: nn.Module) -> list[str]:
    """Quantizers that are switched off: they change the outputs and no tensor."""
    return [name for name, m in network.named_modules() if getattr(m, 'enabled', True) is False]


class FeatureCache:
    """Outputs of a frozen network, looked up by the content of the preprocessed image.

    An image is found again if every one of its pixels is the same, so the outputs are right
    whatever the pipeline does; they are found only where it is deterministic. Outputs of another
    network, or of the same one in another precision, are not found. An output that was computed
    in another batch may differ in its last bits.

    Args:
        path: The file; may be shared by networks, runs and processes.
        taken: As in :func:`fingerprint`.
    """

    def __init__(self, path: str | os.PathLike, taken: Mapping):
        self.store = FeatureStore(path)
        self.taken = dict(taken)
        self.lookups = self.hits = 0
        # Of training alone: validation images are the same each time, and would hide that
        # training images are not.
        self._in_epoch = False
        self._epochs = self._epoch_lookups = self._epoch_hits = 0
        self._useless = self._full = False
        self._known: tuple | None = None
        self._number = 0

    # -- epochs of training ---------------------------------------------------------------

    def begin_epoch(self) -> None:
        """Look-ups are those of training until :meth:`end_epoch`."""
        self._in_epoch = True
        self._epoch_lookups = self._epoch_hits = 0

    def end_epoch(self) -> None:
        """Says so once if an epoch after the first has found nothing, and stops storing."""
        self._in_epoch = False
        if not self._epoch_lookups:
            return
        if self._epochs and not self._epoch_hits and not self._useless:
            self._useless = True
            print_log(
                f'feature cache {self.store.path}: nothing of a second epoch was found, so the '
                'pipeline of the training images is random and the cache cannot help within a '
                'run. Their outputs are no longer looked up or stored.',
                logger='current',
            )
        self._epochs += 1

    @property
    def _stores(self) -> bool:
        """Whether new outputs are kept: after the first epoch not before one was found."""
        return not self._full and not (self._in_epoch and self._epochs and not self._epoch_hits)

    def close(self) -> None:
        """Closes the file until the next look-up."""
        self.store.close()

    # -- look-up --------------------------------------------------------------------------

    def outputs(
        self,
        network: nn.Module,
        compute: Callable[[Tensor], Any],
        images: Tensor,
        dtype: torch.dtype = torch.float32,
    ) -> Any:
        """What ``compute(images)`` gives, as :func:`frozen_outputs` computes it.

        Args:
            network: The network that ``compute`` calls, in eval mode.
            compute: Forward; every tensor of its outputs begins with the axis of the images.
            images: ``(N, C, H, W)``.
            dtype: Precision of the computation.

        Raises:
            FeatureStoreError: If the file is damaged, of another program, or cannot be used; if
                the outputs are no tensors of one row an image, or larger than 1 MiB an image.
        """
        if self._in_epoch and self._useless:
            return frozen_outputs(compute, images, dtype)
        number = self._network(network, dtype, images.device)
        keys = [image_key(image) for image in images.detach().cpu()]
        found = self.store.get(number, keys)
        missing = [i for i, key in enumerate(keys) if key not in found]
        self._count(len(keys), len(keys) - len(missing))
        if missing:
            fresh = frozen_outputs(
                compute, images if len(missing) == len(keys) else images[missing], dtype
            )
            rows = self._rows(fresh, len(missing))
            if self._stores:
                self._put(number, {keys[i]: row for i, row in zip(missing, rows, strict=True)})
            if len(missing) == len(keys):
                return fresh
            found.update({keys[i]: row for i, row in zip(missing, rows, strict=True)})
        ordered = [found[key] for key in keys]
        return unflatten(
            {
                name: torch.stack([row[name].to(images.device) for row in ordered])
                for name in ordered[0]
            }
        )

    def _network(self, network: nn.Module, dtype: torch.dtype, device: torch.device) -> int:
        """The store's number of the network as it is now."""
        # Reading all weights takes far longer than a look-up; a changed tensor has another
        # version or another place.
        token = (
            dtype,
            device.type,
            tuple(_disabled(network)),
            tuple((t.data_ptr(), t._version) for t in state_of(network).values()),
        )
        if token != self._known:
            self._number = self.store.network(fingerprint(network, self.taken, dtype, device))
            self._known = token
        return self._number

    def _count(self, lookups: int, hits: int) -> None:
        self.lookups += lookups
        self.hits += hits
        if self._in_epoch:
            self._epoch_lookups += lookups
            self._epoch_hits += hits

    @staticmethod
    def _rows(outputs: Any, count: int) -> list[dict[str, Tensor]]:
        """Flat outputs of every image."""
        flat = flatten(outputs)
        for tensor in flat.values():
            if tensor.dim() == 0 or len(tensor) != count:
                raise FeatureStoreError(
                    f'an output of shape {tuple(tensor.shape)} for {count} image(s) has no row an '
                    'image; switch the feature cache off for this network (None).'
                )
        size = sum(tensor.numel() * tensor.element_size() for tensor in flat.values()) // count
        if size > LARGEST_OUTPUT:
            raise FeatureStoreError(
                f'the outputs for one image take {size / 2**20:.1f} MiB, and the feature cache '
                'keeps 1 MiB at most: it is made for features of classifiers, not for maps of '
                'detectors. Switch it off for this network (None).'
            )
        return [{name: tensor[i] for name, tensor in flat.items()} for i in range(count)]

    def _put(self, number: int, rows: dict[bytes, dict[str, Tensor]]) -> None:
        try:
            self.store.put(number, rows)
        except FeatureStoreUnavailableError as error:
            # What is optional must not end a run of hours.
            self._full = True
            print_log(f'nothing more is stored: {error}', logger='current', level=30)
