"""A digest of what a client pushed, by which another push under the same Idempotency-Key is told from a repetition.

It is taken of the request's body, before anything is added to its rows: those that come without an event time get
another one each time. A client that adds the time itself, as `shoal_client` does for all replicas to have the same,
says so in the header X-Shoal-Stamped; then event times do not count.
"""

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

import orjson
import pyarrow as pa
import xxhash

from engine.errors import PushInvalid

STAMPED_HEADER = "X-Shoal-Stamped"
"""In which members of a push, `rows` or `deletes`, the event times are those at which the client sent it."""

_MEMBERS = ("rows", "deletes")


def stamped_members(header: str | None) -> Collection[str]:
    """The members that a header names; raises PushInvalid if it names another."""
    members = [name.strip() for name in header.split(",")] if header is not None else []
    if unknown := set(members) - set(_MEMBERS):
        raise PushInvalid(f"{STAMPED_HEADER} names {min(unknown)!r}; it may name {' and '.join(_MEMBERS)}")
    return members


def content_of_json(body: bytes, stamped: Collection[str], time_names: Collection[str | None]) -> bytes:
    """The digest of a body in JSON. Whitespace, escapes in strings and the order of an object's members do not count;
    all else does, such as the order of rows, and 1.0 in place of 1.

    Args:
        stamped: the members in which event times do not count.
        time_names: what event times are called.
    """
    # A body with NaN, which Feast's clients write, counts byte by byte.
    with suppress(orjson.JSONDecodeError, orjson.JSONEncodeError):
        document = orjson.loads(body)
        for member in stamped:
            if isinstance(document, dict) and isinstance(document.get(member), dict):
                document[member] = _without(document[member], time_names)
        body = orjson.dumps(document, option=orjson.OPT_SORT_KEYS)
    return _digest(b"json:", body)


def content_of_arrow(body: bytes, stamped: Collection[str], time_names: Collection[str | None]) -> bytes:
    """The digest of an Arrow stream. Every byte counts. The arguments are those of JSON."""
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
