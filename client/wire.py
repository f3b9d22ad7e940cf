"""The wire format: requests as bytes, raw responses, and their errors."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeGuard
from urllib.parse import quote

import numpy as np
import orjson

from shoal.client.errors import BY_CODE, RequestInvalid, ServerError

if TYPE_CHECKING:
    import pyarrow as pa

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
"""The response headers that the client reads."""
EVENT_TIME = "event_timestamp"
_SHOWN_BYTES = 200
_MOST_DIGITS = 10


@dataclass(frozen=True)
class Request:
    """A request without its deadline and its server. `may_hedge` says whether a second copy of the request may run in
    parallel. `may_retry` says whether the request may be sent again."""

    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    may_hedge: bool = False
    may_retry: bool = True


@dataclass(frozen=True)
class Response:
    """A response. Its `headers` contain only names from READ_HEADERS."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    address: str = ""

    @property
    def retry_after(self) -> float | None:
        """The value of the Retry-After header in seconds; None if the response lacks a valid one."""
        text = self.headers.get(RETRY_HEADER, "")
        return float(text) if text.isascii() and text.isdecimal() and len(text) < _MOST_DIGITS else None

    @property
    def document(self) -> Any:
        """The parsed JSON body; raises orjson.JSONDecodeError if the body is not JSON."""
        return orjson.loads(self.body)

    def error(self) -> ServerError:
        """Return the error that the response describes."""
        code = ""
        message = f"{self.address} answered with {self.status}: {self.body[:_SHOWN_BYTES]!r}"
        try:
            error = self.document["error"]
            code = str(error["code"])
            message = str(error["message"])
        except (orjson.JSONDecodeError, LookupError, TypeError):
            pass  # The response comes from a proxy or another system between the client and the server.
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
    """Return the request that looks up features (a list of references, or a feature service's name) of entities."""
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


def split_reference(reference: str) -> tuple[str, str]:
    """Return the view and the feature that a reference such as `docs:ctr` names. The feature is empty if the reference
    has no colon."""
    view, _, feature = reference.partition(":")
    return view, feature


def is_arrow(rows: Any) -> TypeGuard["pa.RecordBatch | pa.Table"]:
    """Return whether rows are an Arrow table or record batch; this does not import PyArrow."""
    return type(rows).__module__.partition(".")[0] == "pyarrow" and hasattr(rows, "schema")


def push_request(
    view: str,
    rows: "Columns | pa.RecordBatch | None",
    deletes: Columns | None,
    key: str,
    headers: Mapping[str, str],
    stamped: Sequence[str],
) -> Request:
    """Return the request that pushes rows, as columns or in Arrow, and deletions, as columns.

    `stamped` names the members ("rows", "deletes") that came without event times and got the current time. If the push
    is repeated under its key, these members get another time, and the server must still recognize the push.
    """
    headers = {**headers, "Idempotency-Key": key, "Accept": MEDIA_TYPES["json"]}
    if stamped:
        headers["X-Shoal-Stamped"] = ", ".join(stamped)
    if is_arrow(rows):
        from shoal.client.arrow import write_batch

        path = f"/v1/push?view={quote(view)}"
        return Request("POST", path, write_batch(rows), {**headers, "Content-Type": MEDIA_TYPES["arrow"]})
    document: dict[str, Any] = {"view": view}
    for member, columns in (("rows", rows), ("deletes", deletes)):
        if columns is not None:
            document[member] = {name: _column(values) for name, values in columns.items()}
    return Request("POST", "/v1/push", _dumps(document), {**headers, "Content-Type": MEDIA_TYPES["json"]})


def get_request(path: str, headers: Mapping[str, str], *, may_hedge: bool = False, may_retry: bool = True) -> Request:
    """Return the request for a document."""
    headers = {**headers, "Accept": MEDIA_TYPES["json"]}
    return Request("GET", path, headers=headers, may_hedge=may_hedge, may_retry=may_retry)


def _entity(values: Any) -> Any:
    return values.item() if isinstance(values, np.generic) else _column(values)


def _column(values: Any) -> Any:
    """Return values in a form that orjson can write."""
    if hasattr(values, "to_pylist"):
        return values.to_pylist()
    if isinstance(values, np.ndarray) and not (values.dtype.kind in "iufb" and values.flags.c_contiguous):
        return values.tolist()
    return values


def _dumps(document: Any) -> bytes:
    try:
        return orjson.dumps(document, default=_as_text, option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError as error:
        raise RequestInvalid(f"a value cannot be written as JSON: {error}; give lists, NumPy or Arrow arrays") from None


def _as_text(value: Any) -> Any:
    """Convert a value that orjson cannot write: bytes to base64, and an array of any library to a list."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(type(value).__name__)
