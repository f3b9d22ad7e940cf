"""Remember applied pushes by request id: the answer to each push, and a digest of what the client sent.

A repeated push is not applied again. A different push under the same id is recognized by its digest.

The transaction that applies a push also writes its record here, so a crash keeps both or neither. Old records are
removed as new ones arrive.

The database `requests` has two keys per push. The first key is `i` and a digest of the view and the id. Its value is
the time (in ms) and the answer. The second key is `t`, that time and the same digest. Its value is the digest of the
content, or empty if that digest is not known. Version 0.1.0 wrote no digest of the content, and must be able to read
this database.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import lmdb
import xxhash

from shoal.engine.format import catalog
from shoal.engine.store.environment import LiveEnvironment

REMEMBERED = timedelta(hours=24)
MOST_REMEMBERED = 200_000

_ANSWER = struct.Struct("<QQQ")
_TIME = struct.Struct(">Q")
_BY_ID = b"i"
_BY_TIME = b"t"
_FORGOTTEN_AT_ONCE = 1000


@dataclass(frozen=True)
class PushOutcome:
    """The outcome of a push: its number of rows, and the number of rows superseded by a newer row in the store."""

    rows: int
    superseded: int


@dataclass(frozen=True)
class Known:
    """An earlier push: its outcome, and the digest of its content. The digest is empty if it is not known."""

    applied: PushOutcome
    content: bytes


class RequestLog:
    """The applied pushes of one store. The database `LiveEnvironment.requests` lists each push by id, and by time."""

    def __init__(self, live: LiveEnvironment) -> None:
        self._live = live

    def known(self, view: str, request_id: str) -> Known | None:
        """Return the push that was applied to a view under an id; None if there was none."""
        with self._live.env.begin() as transaction:
            digest = self._digest(transaction, view, request_id)
            value = transaction.get(_BY_ID + digest, db=self._live.requests)
            if value is None:
                return None
            time, rows, superseded = _ANSWER.unpack(value)
            content = transaction.get(_BY_TIME + _TIME.pack(time) + digest, b"", db=self._live.requests)
        return Known(PushOutcome(rows, superseded), bytes(content))

    def write(self, transaction: lmdb.Transaction, view: str, pushes: Mapping[str, Known]) -> None:
        """Remember pushes by their ids, and forget those that are too old or too many."""
        now = int(datetime.now(UTC).timestamp() * 1000)
        for request_id, known in pushes.items():
            digest = self._digest(transaction, view, request_id)
            value = _ANSWER.pack(now, known.applied.rows, known.applied.superseded)
            transaction.put(_BY_ID + digest, value, db=self._live.requests)
            transaction.put(_BY_TIME + _TIME.pack(now) + digest, known.content, db=self._live.requests)
        self._forget(transaction, now - REMEMBERED // timedelta(milliseconds=1))

    def _forget(self, transaction: lmdb.Transaction, before: int) -> None:
        surplus = transaction.stat(self._live.requests)["entries"] // 2 - MOST_REMEMBERED
        with transaction.cursor(db=self._live.requests) as cursor:
            for _ in range(_FORGOTTEN_AT_ONCE):
                if not cursor.set_range(_BY_TIME):
                    return
                key = bytes(cursor.key())
                if surplus <= 0 and _TIME.unpack_from(key, 1)[0] >= before:
                    return
                cursor.delete()
                transaction.delete(_BY_ID + key[1 + _TIME.size :], db=self._live.requests)
                surplus -= 1

    def _digest(self, transaction: lmdb.Transaction, view: str, request_id: str) -> bytes:
        """Return the digest of a push's id in a view. The digest is different for an earlier view of the same name that
        was removed."""
        removals = catalog.removals(transaction, self._live.catalog, view)
        of_view = f"{view}\0{request_id}"
        return xxhash.xxh3_128_digest((f"{of_view}\0{removals}" if removals else of_view).encode())
