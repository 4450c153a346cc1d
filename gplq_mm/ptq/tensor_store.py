"""A sequence of batches that is kept in memory up to a budget and on disk beyond it."""

import tempfile
from pathlib import Path
from typing import Any

import torch

__all__ = ['TensorStore']


def _num_bytes(value: Any) -> int:
    if torch.is_tensor(value):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_num_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_num_bytes, value))
    return 0


class TensorStore:
    """Append-only list of nested tensors and plain data.

    Args:
        memory_bytes: What may stay in memory; the rest goes to a temporary folder.
    """

    def __init__(self, memory_bytes: int = 2**30):
        self.memory_bytes = memory_bytes
        self._items: list[Any] = []
        self._folder: tempfile.TemporaryDirectory | None = None

    def append(self, value: Any) -> None:
        """Adds an item.

        Raises:
            OSError: If the temporary folder's disk is full.
        """
        size = _num_bytes(value)
        if size <= self.memory_bytes:
            self.memory_bytes -= size
            self._items.append(value)
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix='gplq_mm-')
        path = Path(self._folder.name) / f'{len(self._items)}.pt'
        try:
            torch.save(value, path)
        except (OSError, RuntimeError) as error:
            raise OSError(
                f'the activations of a block do not fit on the disk of {path.parent} ({error}); '
                'free space there, set TMPDIR to another disk, or use fewer calibration images.'
            ) from error
        self._items.append(path)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        item = self._items[index]
        return torch.load(item, weights_only=True) if isinstance(item, Path) else item

    def __iter__(self):
        return (self[index] for index in range(len(self)))

    def close(self) -> None:
        """Drops all items and removes the temporary folder."""
        self._items = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
