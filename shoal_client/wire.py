"""What goes over the wire: requests as bytes, answers as they come, and the errors that they mean."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
import orjson
import pyarrow as pa

from shoal_client.errors import BY_CODE, RequestInvalid, ServerError

Format = Literal["arrow", "npy", "json"]
Stale = Literal["null", "serve", "fail"]
Partial = Literal["serve", "fail"]
Columns = Mapping[str, Any]
"""Join key or feature → a list, NumPy array or Arrow array of values."""

MEDIA_TYPES: Mapping[str, str] = {
    "arrow": "application/vnd.apache.arrow.stream",
    "npy": "application/x-npy",
    "json": "application/json",
}
TIMEOUT_HEADER = "X-Request-Timeout-Ms"
VERSION_HEADER = "x-shoal-version"
APPLIED_HEADER = "x-shoal-applied"
PARTIAL_HEADER = "x-shoal-partial"
RETRY_HEADER = "retry-after"
READ_HEADERS = (VERSION_HEADER, APPLIED_HEADER, PARTIAL_HEADER, RETRY_HEADER)
"""Those of an answer that say something to the client."""
EVENT_TIME = "event_timestamp"
_SHOWN_BYTES = 200
_MOST_DIGITS = 10


@dataclass(frozen=True)
class Request:
    """A request, but for its deadline and where it goes. `may_hedge` says that a second one costs nothing but time."""

    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    may_hedge: bool = False
    may_retry: bool = True


@dataclass(frozen=True)
class Response:
    """An answer; its `headers` are those of READ_HEADERS that it has."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    address: str = ""

    @property
    def retry_after(self) -> float | None:
        """After how many seconds the server wants to be asked again, if it says so."""
        text = self.headers.get(RETRY_HEADER, "")
        return float(text) if text.isascii() and text.isdecimal() and len(text) < _MOST_DIGITS else None

    @property
    def document(self) -> Any:
        """The JSON that it holds; raises orjson.JSONDecodeError."""
        return orjson.loads(self.body)

    def error(self) -> ServerError:
        """The error that it is."""
        code, message = "", f"{self.address} answered with {self.status}: {self.body[:_SHOWN_BYTES]!r}"
        try:
            error = self.document["error"]
            code, message = str(error["code"]), str(error["message"])
        except (orjson.JSONDecodeError, LookupError, TypeError):
            pass  # It comes from something between the client and the server.
        kind = BY_CODE.get(code, ServerError)
        return kind(message, code=code, status=self.status, retry_after=self.retry_after, address=self.address)


def lookup_request(
    features: str | Sequence[str],
    entities: Columns,
    *,
    max_age: str | None,
    stale: Stale,
    partial: Partial,
    form: Format,
    headers: Mapping[str, str],
) -> Request:
    """A lookup of features (a list of references, or a feature service's name) of some entities."""
    document: dict[str, Any] = {"service" if isinstance(features, str) else "features": features}
    if not isinstance(features, str):
        document["features"] = list(features)
    document["entities"] = {name: _entity(values) for name, values in entities.items()}
    if max_age is not None:
        document["max_age"] = max_age
    if stale != "null":
        document["stale"] = stale
    body = _dumps(document)
    accept = {"Content-Type": MEDIA_TYPES["json"], "Accept": MEDIA_TYPES[form]}
    if partial != "serve":
        accept["X-Shoal-Partial"] = partial
    return Request("POST", "/v1/lookup", body, {**headers, **accept}, may_hedge=True)


def push_request(
    view: str,
    rows: Columns | pa.RecordBatch | None,
    deletes: Columns | None,
    key: str,
    headers: Mapping[str, str],
    stamped: Sequence[str],
) -> Request:
    """A push of rows, as columns or in Arrow, and of deletions, as columns.

    In `stamped` are those of `rows` and `deletes` that had no event times and got that of now: a push that is repeated
    under its key gets another, and is to be known all the same.
    """
    headers = {**headers, "Idempotency-Key": key, "Accept": MEDIA_TYPES["json"]}
    if stamped:
        headers["X-Shoal-Stamped"] = ", ".join(stamped)
    if isinstance(rows, pa.RecordBatch):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as stream:
            stream.write_batch(rows)
        path = f"/v1/push?view={quote(view)}"
        return Request("POST", path, sink.getvalue().to_pybytes(), {**headers, "Content-Type": MEDIA_TYPES["arrow"]})
    document: dict[str, Any] = {"view": view}
    for member, columns in (("rows", rows), ("deletes", deletes)):
        if columns is not None:
            document[member] = {name: _column(values) for name, values in columns.items()}
    return Request("POST", "/v1/push", _dumps(document), {**headers, "Content-Type": MEDIA_TYPES["json"]})


def get_request(path: str, headers: Mapping[str, str], *, may_hedge: bool = False, may_retry: bool = True) -> Request:
    """A request for a document."""
    headers = {**headers, "Accept": MEDIA_TYPES["json"]}
    return Request("GET", path, headers=headers, may_hedge=may_hedge, may_retry=may_retry)


def _entity(values: Any) -> Any:
    return values.item() if isinstance(values, np.generic) else _column(values)


def _column(values: Any) -> Any:
    """Values as orjson writes them."""
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values.to_pylist()
    if isinstance(values, np.ndarray) and not (values.dtype.kind in "iufb" and values.flags.c_contiguous):
        return values.tolist()
    return values


def _dumps(document: Any) -> bytes:
    try:
        return orjson.dumps(document, default=_as_text, option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError as error:
        raise RequestInvalid(f"a value has no form in JSON: {error}; give lists, NumPy or Arrow arrays") from None


def _as_text(value: Any) -> Any:
    """What orjson has no form for: bytes are sent in base64, and whatever has a list of its values as that."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(type(value).__name__)
