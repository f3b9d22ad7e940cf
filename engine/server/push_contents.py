"""A digest of a push's content, to tell a repeated push from a different one under the same Idempotency-Key.

The digest is computed from the request's body, before the server adds event times, because rows without an event time
get a new event time at each repetition. A client may add the event times itself, as `shoal.client` does, so that all
replicas have the same event times. Such a client names the rows in the header X-Shoal-Stamped, and the digest then
ignores their event times.
"""

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

import orjson
import pyarrow as pa
import xxhash

from shoal.engine.base.errors import PushInvalid

STAMPED_HEADER = "X-Shoal-Stamped"
"""The header that names the members of a push (`rows`, `deletes`) to which the client added event times when it sent
the push."""

_MEMBERS = ("rows", "deletes")


def stamped_members(header: str | None) -> Collection[str]:
    """Return the members that a header names; raise PushInvalid if the header names anything else."""
    members = [name.strip() for name in header.split(",")] if header is not None else []
    if unknown := set(members) - set(_MEMBERS):
        raise PushInvalid(f"{STAMPED_HEADER} names {min(unknown)!r}; it may name {' and '.join(_MEMBERS)}")
    return members


def content_of_json(body: bytes, stamped: Collection[str], time_names: Collection[str | None]) -> bytes:
    """Return the digest of a JSON body. The digest ignores whitespace, escapes in strings, and the order of an object's
    members. All other differences count, such as the order of rows, or 1.0 in place of 1.

    Args:
        stamped: the members in which event times are ignored.
        time_names: the names of the event time column.
    """
    # A body with NaN, as Feast's clients write it, is not valid JSON: its raw bytes are digested.
    with suppress(orjson.JSONDecodeError, orjson.JSONEncodeError):
        document = orjson.loads(body)
        for member in stamped:
            if isinstance(document, dict) and isinstance(document.get(member), dict):
                document[member] = _without(document[member], time_names)
        body = orjson.dumps(document, option=orjson.OPT_SORT_KEYS)
    return _digest(b"json:", body)


def content_of_arrow(body: bytes, stamped: Collection[str], time_names: Collection[str | None]) -> bytes:
    """Return the digest of an Arrow stream. Every byte counts. For the arguments, see `content_of_json`."""
    if "rows" in stamped:
        with pa.ipc.open_stream(body) as stream:
            table = stream.read_all()
        table = table.select([name for name in table.column_names if name not in time_names])
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        body = sink.getvalue().to_pybytes()
    return _digest(b"arrow:", body)


def _without(columns: Mapping[str, Any], names: Collection[str | None]) -> dict[str, Any]:
    return {name: values for name, values in columns.items() if name not in names}


def _digest(kind: bytes, body: bytes) -> bytes:
    digest = xxhash.xxh3_128(kind)
    digest.update(body)
    return digest.digest()
