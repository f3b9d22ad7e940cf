"""The ids of pushes that were applied, what was answered, and a digest of what the client had sent: a push that comes
again is not applied again, and another one under the same id is known to be another.

They are written in the transaction that applies the push, so that whichever of the two a crash leaves, it leaves both.
Old ones are forgotten as new ones come.

In the database `requests`, `i` and a digest of view and id lead to the time (in ms) and the answer, and `t`, that time
and the same digest to the digest of the content. The latter is empty if it is not known: version 0.1.0 wrote none, and
must be able to read what stands here.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import lmdb
import xxhash

from engine import catalog
from engine.environment import LiveEnvironment

REMEMBERED = timedelta(hours=24)
MOST_REMEMBERED = 200_000

_ANSWER = struct.Struct("<QQQ")
_TIME = struct.Struct(">Q")
_BY_ID = b"i"
_BY_TIME = b"t"
_FORGOTTEN_AT_ONCE = 1000


@dataclass(frozen=True)
class Applied:
    """What became of a push: how many rows it had, and how many of them found a newer row in the store."""

    rows: int
    superseded: int


@dataclass(frozen=True)
class Known:
    """An earlier push: what became of it, and the digest of its content, empty if it is not known."""

    applied: Applied
    content: bytes


class RequestLog:
    """The log of one store; `LiveEnvironment.requests` holds each id twice, by itself and by time."""

    def __init__(self, live: LiveEnvironment) -> None:
        self._live = live

    def known(self, view: str, request_id: str) -> Known | None:
        """The push to a view that was applied under an id, if there was one."""
        with self._live.env.begin() as transaction:
            digest = self._digest(transaction, view, request_id)
            value = transaction.get(_BY_ID + digest, db=self._live.requests)
            if value is None:
                return None
            time, rows, superseded = _ANSWER.unpack(value)
            content = transaction.get(_BY_TIME + _TIME.pack(time) + digest, b"", db=self._live.requests)
        return Known(Applied(rows, superseded), bytes(content))

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
        """The digest of an id of a push to a view, and not to an earlier view of the same name."""
        removals = catalog.removals(transaction, self._live.catalog, view)
        of_view = f"{view}\0{request_id}"
        return xxhash.xxh3_128_digest((f"{of_view}\0{removals}" if removals else of_view).encode())
