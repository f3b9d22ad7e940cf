"""The seal of a catalog: whose it is, which commit wrote it, and a checksum over all its entries.

It is one more entry of the catalog, which every commit writes anew, so that entries that vanish or change without a
commit are noticed. A release without seals ignores the entry and leaves it as it is: then the seal names an older
commit than LMDB does, its checksum says nothing, and the next commit of this release seals the catalog again.

The checksum is a sum over the entries, so that a commit only adds and subtracts what it changes: an entry that was
damaged before is still noticed afterwards.
"""

import struct
import uuid
from collections.abc import Mapping
from typing import NamedTuple

import lmdb
import xxhash

from engine.begun import ID_BYTES
from engine.errors import START_ANEW, StoreDamaged

KEY = b"seal"

_SEAL = struct.Struct(f"<{ID_BYTES}sQQQ")  # Store id, commit, number of entries, sum of their hashes.
_CHECKSUM = struct.Struct("<Q")
_MODULUS = 1 << 64


class Seal(NamedTuple):
    """What a catalog's seal says; the seal itself is not among the `entries`."""

    store_id: bytes
    commit: int
    entries: int = 0
    total: int = 0

    def with_entry(self, key: bytes, value: bytes) -> "Seal":
        """The seal once an entry was added."""
        return Seal(self.store_id, self.commit, self.entries + 1, (self.total + _hash(key, value)) % _MODULUS)

    def without_entry(self, key: bytes, value: bytes) -> "Seal":
        """The seal once an entry was removed."""
        entries = (self.entries - 1) % _MODULUS
        return Seal(self.store_id, self.commit, entries, (self.total - _hash(key, value)) % _MODULUS)


def read_seal(transaction: lmdb.Transaction, catalog: lmdb._Database) -> Seal | None:
    """The seal of a catalog; None if no release with seals has written it yet. Raises StoreDamaged."""
    value = transaction.get(KEY, db=catalog)
    return _decode(bytes(value)) if value is not None else None


def check_seal(raw: Mapping[bytes, bytes], commit: int) -> None:
    """Check a whole catalog, undecoded, as LMDB's commit of this id has it.

    Raises:
        StoreDamaged: entries vanished or changed without a commit.
    """
    if KEY not in raw:
        return
    seal = _decode(raw[KEY])
    if seal.commit < commit:
        return  # A release without seals has written since.
    total = sum(_hash(key, value) for key, value in raw.items() if key != KEY) % _MODULUS
    found = Seal(seal.store_id, commit, len(raw) - 1, total)
    if found != seal:
        raise StoreDamaged(
            f"the catalog has {found.entries} entries at commit {commit}, its seal says {seal.entries} at commit "
            f"{seal.commit}, with other checksums: entries were lost or changed; {START_ANEW}"
        )


def begin_sealing(transaction: lmdb.Transaction, catalog: lmdb._Database) -> bytes:
    """Make sure, at the beginning of a write transaction, that the seal fits the catalog, and return the store's id; a
    store that has none gets one."""
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
    """Have the seal name the commit that this write transaction becomes."""
    seal = read_seal(transaction, catalog)
    if seal is not None:
        _write(transaction, catalog, seal._replace(commit=transaction.id()))


def put_entry(transaction: lmdb.Transaction, catalog: lmdb._Database, key: bytes, value: bytes) -> None:
    """Write an entry of a catalog, under its seal."""
    old, seal = transaction.get(key, db=catalog), read_seal(transaction, catalog)
    transaction.put(key, value, db=catalog)
    if seal is not None:
        rest = seal if old is None else seal.without_entry(key, bytes(old))
        _write(transaction, catalog, rest.with_entry(key, value))


def delete_entry(transaction: lmdb.Transaction, catalog: lmdb._Database, key: bytes) -> None:
    """Delete an entry of a catalog, if it is there."""
    old, seal = transaction.get(key, db=catalog), read_seal(transaction, catalog)
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
