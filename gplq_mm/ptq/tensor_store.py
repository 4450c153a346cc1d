"""Sequences of batches that together are kept in memory up to a budget and on disk beyond it."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


class _Spilled(NamedTuple):
    """An item whose tensors are in a file. All else, such as annotations, stays in memory."""

    path: Path
    leaves: list
    spec: TreeSpec


def _num_bytes(leaves: list) -> int:
    # Of a view, what it keeps in memory.
    return sum(leaf.untyped_storage().nbytes() for leaf in leaves if torch.is_tensor(leaf))


class Memory:
    """What several stores may keep in memory together.

    Args:
        free: Bytes.
    """

    def __init__(self, free: int):
        self.free = free

    def take(self, size: int) -> bool:
        """Whether ``size`` bytes are free; they are then taken."""
        if size > self.free:
            return False
        self.free -= size
        return True


class TensorStore:
    """List of nested tensors and plain data. Items can be replaced and dropped.

    Args:
        memory: What may stay in memory; the rest goes to a temporary folder.
    """

    def __init__(self, memory: Memory):
        self.memory = memory
        # An item as it is or spilled, and the bytes that it takes in memory.
        self._items: list[tuple[Any, int]] = []
        self._folder: tempfile.TemporaryDirectory | None = None

    def append(self, value: Any) -> None:
        """Adds an item.

        Raises:
            OSError: If the temporary folder's disk is full.
        """
        self._items.append((None, 0))
        self[len(self) - 1] = value

    def __setitem__(self, index: int, value: Any) -> None:
        self.drop(index)
        leaves, spec = tree_flatten(value)
        size = _num_bytes(leaves)
        if self.memory.take(size):
            self._items[index] = (value, size)
        else:
            self._items[index] = (self._spill(index, leaves, spec), 0)

    def _spill(self, index: int, leaves: list, spec: TreeSpec) -> _Spilled:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix='gplq_mm-')
        path = Path(self._folder.name) / f'{index}.pt'
        tensors = {i: leaf for i, leaf in enumerate(leaves) if torch.is_tensor(leaf)}
        try:
            torch.save(tensors, path)
        except (OSError, RuntimeError) as error:
            raise OSError(
                f'the activations of a block do not fit on the disk of {path.parent} ({error}); '
                'free space there, set TMPDIR to another disk, or use fewer calibration images.'
            ) from error
        return _Spilled(path, [None if i in tensors else v for i, v in enumerate(leaves)], spec)

    def drop(self, index: int) -> None:
        """Forgets an item and leaves None in its place."""
        item, size = self._items[index]
        self.memory.free += size
        if isinstance(item, _Spilled):
            item.path.unlink()
        self._items[index] = (None, 0)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        item, _ = self._items[index]
        if not isinstance(item, _Spilled):
            return item
        tensors = torch.load(item.path, weights_only=True)
        return tree_unflatten(
            [tensors.get(i, leaf) for i, leaf in enumerate(item.leaves)], item.spec
        )

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def close(self) -> None:
        """Drops all items and removes the temporary folder."""
        for index in range(len(self)):
            self.drop(index)
        self._items = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
