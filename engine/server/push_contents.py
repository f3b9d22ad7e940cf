"""A digest of what a client pushed, by which another push under the same Idempotency-Key is told from a repetition.

It is taken of the request's body, before anything is added to its rows: those that come without an event time get
another one each time.
"""

from contextlib import suppress

import orjson
import xxhash


def content_of_json(body: bytes) -> bytes:
    """The digest of a body in JSON. Whitespace, escapes in strings and the order of an object's members do not count;
    all else does, such as the order of rows, and 1.0 in place of 1."""
    # A body with NaN, which Feast's clients write, counts byte by byte.
    with suppress(orjson.JSONDecodeError, orjson.JSONEncodeError):
        body = orjson.dumps(orjson.loads(body), option=orjson.OPT_SORT_KEYS)
    return _digest(b"json:", body)


def content_of_arrow(body: bytes) -> bytes:
    """The digest of an Arrow stream, of which every byte counts."""
    return _digest(b"arrow:", body)


def _digest(kind: bytes, body: bytes) -> bytes:
    digest = xxhash.xxh3_128(kind)
    digest.update(body)
    return digest.digest()
