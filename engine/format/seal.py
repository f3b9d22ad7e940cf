"""The seal of a catalog: the id of its store, its last commit, and a checksum over all its entries.

The seal is an entry of the catalog itself, and every commit rewrites it. With the seal, Shoal detects entries that
vanished or changed without a commit. A release without seals ignores the seal and does not change it. After a commit of
such a release, the seal names an older commit than LMDB does. Its checksum is then not checked, and the next commit of
this release seals the catalog again.

The checksum is a sum over the entries, so a commit adds and subtracts only the entries that it changes. An entry that
was damaged before the commit is still detected after the commit.
"""

import struct
import uuid
from collections.abc import Mapping
from typing import NamedTuple

import lmdb
import xxhash

from shoal.engine.base.errors import START_ANEW, StoreDamaged
from shoal.engine.format.progress import ID_BYTES

KEY = b"seal"

_SEAL = struct.Struct(f"<{ID_BYTES}sQQQ")  # Store id, commit, number of entries, sum of their hashes.
_CHECKSUM = struct.Struct("<Q")
_MODULUS = 1 << 64


class Seal(NamedTuple):
    """The content of a catalog's seal. `entries` does not count the seal itself."""

    store_id: bytes
    commit: int
    entries: int = 0
    total: int = 0

    def with_entry(self, key: bytes, value: bytes) -> "Seal":
        """Return the seal after an entry is added."""
        return Seal(self.store_id, self.commit, self.entries + 1, (self.total + _hash(key, value)) % _MODULUS)

    def without_entry(self, key: bytes, value: bytes) -> "Seal":
        """Return the seal after an entry is removed."""
        entries = (self.entries - 1) % _MODULUS
        return Seal(self.store_id, self.commit, entries, (self.total - _hash(key, value)) % _MODULUS)


def read_seal(transaction: lmdb.Transaction, catalog: lmdb._Database) -> Seal | None:
    """Read the seal of a catalog; return None if no release with seals has written the catalog yet. Raise StoreDamaged
    if the seal is damaged."""
    value = transaction.get(KEY, db=catalog)
    return _decode(bytes(value)) if value is not None else None


def check_seal(raw: Mapping[bytes, bytes], commit: int) -> None:
    """Check all entries of an undecoded catalog against its seal. `commit` is the id of the LMDB commit from which the
    catalog was read.

    Raises:
        StoreDamaged: entries vanished or changed without a commit.
    """
    if KEY not in raw:
        return
    seal = _decode(raw[KEY])
    if seal.commit < commit:
        return  # A release without seals wrote the catalog after this seal.
    total = sum(_hash(key, value) for key, value in raw.items() if key != KEY) % _MODULUS
    found = Seal(seal.store_id, commit, len(raw) - 1, total)
    if found != seal:
        raise StoreDamaged(
            f"the catalog has {found.entries} entries at commit {commit}, but its seal says {seal.entries} at commit "
            f"{seal.commit}, or the checksums differ: entries were lost or changed; {START_ANEW}"
        )


def begin_sealing(transaction: lmdb.Transaction, catalog: lmdb._Database) -> bytes:
    """At the beginning of a write transaction, make sure that the seal fits the catalog. Return the store's id. A store
    without an id gets a new id."""
    seal = read_seal(transaction, catalog)
    if seal is not None and seal.commit + 1 == transaction.id():
        return seal.store_id
    seal = Seal(seal.store_id if seal is not None else uuid.uuid4().bytes, 0)
    for key, value in transaction.cursor(db=catalog):
        if bytes(key) != KEY:
            seal = seal.with_entry(bytes(key), bytes(value))
    _write(transaction, catalog, seal)
    return seal.store_id


def seal_commit(transaction: lmdb.Transaction, catalog: lmdb._Database) -> None:
    """Write the id of this write transaction's commit into the seal."""
    seal = read_seal(transaction, catalog)
    if seal is not None:
        _write(transaction, catalog, seal._replace(commit=transaction.id()))


def put_entry(transaction: lmdb.Transaction, catalog: lmdb._Database, key: bytes, value: bytes) -> None:
    """Write an entry of a catalog, and update the seal."""
    old = transaction.get(key, db=catalog)
    seal = read_seal(transaction, catalog)
    transaction.put(key, value, db=catalog)
    if seal is not None:
        rest = seal if old is None else seal.without_entry(key, bytes(old))
        _write(transaction, catalog, rest.with_entry(key, value))


def delete_entry(transaction: lmdb.Transaction, catalog: lmdb._Database, key: bytes) -> None:
    """Delete an entry of a catalog if it exists, and update the seal."""
    old = transaction.get(key, db=catalog)
    seal = read_seal(transaction, catalog)
    if old is None:
        return
    transaction.delete(key, db=catalog)
    if seal is not None:
        _write(transaction, catalog, seal.without_entry(key, bytes(old)))


def _write(transaction: lmdb.Transaction, catalog: lmdb._Database, seal: Seal) -> None:
    content = _SEAL.pack(seal.store_id, seal.commit, seal.entries, seal.total)
    transaction.put(KEY, content + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(content)), db=catalog)


def _decode(value: bytes) -> Seal:
    if len(value) == _SEAL.size + _CHECKSUM.size:
        content, (checksum,) = value[: _SEAL.size], _CHECKSUM.unpack_from(value, _SEAL.size)
        if checksum == xxhash.xxh3_64_intdigest(content):
            return Seal(*_SEAL.unpack(content))
    raise StoreDamaged(f"the catalog's seal is damaged: {value[:64]!r}; {START_ANEW}")


def _hash(key: bytes, value: bytes) -> int:
    return xxhash.xxh3_64_intdigest(value, seed=xxhash.xxh3_64_intdigest(key))
