"""One file with outputs of frozen networks: SQLite outside, safetensors inside."""

import os
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

__all__ = [
    'FeatureStore',
    'FeatureStoreError',
    'FeatureStoreUnavailableError',
    'flatten',
    'unflatten',
]

APPLICATION_ID = 0x47504C51  # 'GPLQ'
FORMAT = 1
SECONDS_FOR_A_LOCK = 60
SCHEMA = (
    'CREATE TABLE networks (id INTEGER PRIMARY KEY, fingerprint BLOB NOT NULL UNIQUE)',
    'CREATE TABLE outputs (network INTEGER NOT NULL, image BLOB NOT NULL, '
    'checksum INTEGER NOT NULL, value BLOB NOT NULL, PRIMARY KEY (network, image))',
)


class FeatureStoreError(RuntimeError):
    """A feature cache that cannot be used, or outputs that it cannot keep."""


class FeatureStoreUnavailableError(FeatureStoreError):
    """The file may be good, but cannot be read or written now."""


def flatten(value: Any, path: str = '') -> dict[str, Tensor]:
    """Nested tuples, lists and dicts of tensors as one dict.

    Args:
        value: The nested tensors.
        path: Name of ``value`` itself.

    Returns:
        ``'/t1/l0'`` -> item 0 of the list that is item 1 of a tuple, and so on.

    Raises:
        FeatureStoreError: For anything else inside, or an empty container.
    """
    if isinstance(value, Tensor):
        return {path: value}
    if isinstance(value, Mapping):
        items = [(f'd{key}', item) for key, item in value.items()]
    elif type(value) in (tuple, list):
        items = [(f'{type(value).__name__[0]}{i}', item) for i, item in enumerate(value)]
    else:
        items = []
    if not items or any('/' in step for step, _ in items):
        raise FeatureStoreError(
            f'the network gives a {type(value).__name__}, and the feature cache keeps tensors and '
            'tuples, lists and dicts of them; switch it off for this network (None).'
        )
    flat = {}
    for step, item in items:
        flat.update(flatten(item, f'{path}/{step}'))
    return flat


def unflatten(flat: Mapping[str, Any]) -> Any:
    """Inverse of :func:`flatten`."""
    if '' in flat:
        return flat['']
    parts: dict[str, dict[str, Any]] = {}
    for path, item in flat.items():
        step, slash, rest = path[1:].partition('/')
        parts.setdefault(step, {})[slash + rest] = item
    kind = next(iter(parts))[0]
    items = {step[1:]: unflatten(part) for step, part in parts.items()}
    if kind == 'd':
        return items
    ordered = [items[key] for key in sorted(items, key=int)]
    return tuple(ordered) if kind == 't' else ordered


class FeatureStore:
    """Outputs by network and image, in one SQLite file.

    Several processes may use the file at once. What was put is there at once, and a process that
    dies at any moment leaves a valid file (write-ahead logging; ``-wal`` and ``-shm`` beside the
    file belong to it while it is in use). Nothing is kept in memory.

    Args:
        path: The file, on a local disk. It and its folder are made when first used.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._connection: sqlite3.Connection | None = None
        self._owner = 0

    def __getstate__(self) -> dict:
        return {'path': self.path, '_connection': None, '_owner': 0}

    # -- the file -------------------------------------------------------------------------

    def _foreign(self, what: str) -> FeatureStoreError:
        return FeatureStoreError(
            f'{self.path} is {what}; give the feature cache another path, or remove the file.'
        )

    def _damaged(self, error: object) -> FeatureStoreError:
        return FeatureStoreError(
            f'the feature cache {self.path} is damaged ({error}); remove it together with '
            f'{self.path.name}-wal and {self.path.name}-shm and run again, it is made anew.'
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise FeatureStoreUnavailableError(
                f'the feature cache {self.path} cannot be used ({error}): its disk is full or not '
                'a local one, it must not be written, or another process holds it. Free the '
                'disk, give it another path, or switch it off (None).'
            ) from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None and self._owner == os.getpid():
            return self._connection
        if self._connection is not None:
            # SQLite forbids a child to use or even to close what its parent has opened.
            _INHERITED.append(self._connection)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                with self.path.open('rb') as file:
                    magic = file.read(16)
                if magic not in (b'', b'SQLite format 3\0'):
                    raise self._foreign('no feature cache')
        except OSError as error:
            raise FeatureStoreUnavailableError(
                f'the feature cache {self.path} cannot be opened ({error}); give it another path.'
            ) from error
        with self._explained():
            connection = sqlite3.connect(
                self.path, timeout=SECONDS_FOR_A_LOCK, isolation_level=None
            )
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
        self._connection, self._owner = connection, os.getpid()
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        # Several KB a row.
        connection.execute('PRAGMA page_size = 16384')
        with _transaction(connection):
            tables = connection.execute('SELECT count(*) FROM sqlite_master').fetchone()[0]
            (application,) = connection.execute('PRAGMA application_id').fetchone()
            (version,) = connection.execute('PRAGMA user_version').fetchone()
            if tables == 0 and application == 0:
                for statement in SCHEMA:
                    connection.execute(statement)
                connection.execute(f'PRAGMA application_id = {APPLICATION_ID}')
                connection.execute(f'PRAGMA user_version = {FORMAT}')
            elif application != APPLICATION_ID:
                raise self._foreign('a database of another program')
            elif version != FORMAT:
                raise self._foreign(f'a feature cache of format {version}, not {FORMAT}')
        (mode,) = connection.execute('PRAGMA journal_mode = WAL').fetchone()
        if mode != 'wal':
            raise FeatureStoreError(
                f'the disk of {self.path} cannot share a file between processes (journal mode '
                f'{mode!r}); give the feature cache a path on a local disk.'
            )
        # A crash of the machine may cost the last outputs, never the file.
        connection.execute('PRAGMA synchronous = NORMAL')

    def close(self) -> None:
        """Closes the file; the next use opens it again."""
        if self._connection is not None and self._owner == os.getpid():
            with self._explained():
                self._connection.close()
        self._connection = None

    # -- content --------------------------------------------------------------------------

    def network(self, fingerprint: bytes) -> int:
        """Number under which the file keeps a network's outputs.

        Raises:
            FeatureStoreError: If the file is damaged, of another program, or cannot be used.
        """
        connection = self._open()
        query = 'SELECT id FROM networks WHERE fingerprint = ?'
        with self._explained():
            row = connection.execute(query, (fingerprint,)).fetchone()
            if row is None:
                with _transaction(connection):
                    connection.execute(
                        'INSERT OR IGNORE INTO networks (fingerprint) VALUES (?)', (fingerprint,)
                    )
                    row = connection.execute(query, (fingerprint,)).fetchone()
        return row[0]

    def get(self, network: int, images: Sequence[bytes]) -> dict[bytes, dict[str, Tensor]]:
        """What is known of some images.

        Args:
            network: From :meth:`network`.
            images: Keys of images.

        Returns:
            Key -> flat outputs of one image, without those that are not in the file.

        Raises:
            FeatureStoreError: If the file is damaged or cannot be used.
        """
        connection, found = self._open(), {}
        query = 'SELECT checksum, value FROM outputs WHERE network = ? AND image = ?'
        for image in dict.fromkeys(images):
            with self._explained():
                row = connection.execute(query, (network, image)).fetchone()
            if row is None:
                continue
            checksum, value = row
            # SQLite itself does not notice a flipped bit inside a value.
            if zlib.crc32(value) != checksum:
                raise self._damaged('a checksum does not match')
            try:
                found[image] = load(value)
            except SafetensorError as error:
                raise self._damaged(error) from error
        return found

    def put(self, network: int, outputs: Mapping[bytes, Mapping[str, Tensor]]) -> None:
        """Adds outputs, all or none of them. An image that is there stays as it is.

        Args:
            network: From :meth:`network`.
            outputs: Key -> flat outputs of one image, on any device.

        Raises:
            FeatureStoreError: If the file is damaged or cannot be written.
        """
        rows = []
        for image, flat in outputs.items():
            value = save({name: tensor.cpu().contiguous() for name, tensor in flat.items()})
            rows.append((network, image, zlib.crc32(value), value))
        connection = self._open()
        with self._explained(), _transaction(connection):
            connection.executemany('INSERT OR IGNORE INTO outputs VALUES (?, ?, ?, ?)', rows)

    def count(self, network: int) -> int:
        """Number of images of a network in the file."""
        query = 'SELECT count(*) FROM outputs WHERE network = ?'
        connection = self._open()
        with self._explained():
            return connection.execute(query, (network,)).fetchone()[0]


_INHERITED: list[sqlite3.Connection] = []


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Writes of this process alone, all or none."""
    connection.execute('BEGIN IMMEDIATE')
    try:
        yield
        connection.execute('COMMIT')
    except BaseException:
        if connection.in_transaction:
            connection.execute('ROLLBACK')
        raise
