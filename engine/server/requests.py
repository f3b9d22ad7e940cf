"""Read the bodies of requests: strictly, with errors that name the mistake."""

import asyncio
import json
import re
from collections.abc import Sized
from contextlib import suppress
from datetime import timedelta
from typing import Annotated, Any, Self, TypeVar

import orjson
from aiohttp import web
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from shoal.engine.base.durations import parse_duration
from shoal.engine.base.errors import (
    BodyTooSlow,
    DeadlinePassed,
    EncodingUnsupported,
    LookupInvalid,
    Overloaded,
    RequestTooLarge,
)
from shoal.engine.base.quoting import abbreviated
from shoal.engine.lookup.columns import MAX_FEATURES, Stale
from shoal.engine.server.settings import ServerSettings

_LARGEST_AT_ONCE = 8
"""A worker may receive this many bodies of the maximum size at once, or more bodies of a smaller size."""
_DEADLINE = "deadline"
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_ENCODINGS = ("gzip", "deflate", "identity")
"""The encodings that aiohttp always unpacks. If aiohttp does not know an encoding, it leaves the body encoded."""
_SPACED_COLON = re.compile(rb'"[ \t\r\n]+:')


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("request", "{message}", {"message": message})


def _duration(value: object) -> object:
    if not isinstance(value, str):
        raise _wrong(f"{abbreviated(value)} is not a duration; give a string such as 12h")
    try:
        return parse_duration(value)
    except ValueError as error:
        raise _wrong(str(error)) from None


def _entity(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, list | str | int):
        raise _wrong(f"{abbreviated(value)} is not an entity; give a list of keys, or a string or integer for all rows")
    return value


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class LookupRequest(_Body):
    """The body of POST /v1/lookup. The lookup checks the values of entities against the types of the join keys."""

    features: list[str] | None = None
    service: str | None = None
    entities: dict[str, Annotated[Any, BeforeValidator(_entity)]]
    max_age: Annotated[timedelta, BeforeValidator(_duration)] | None = None
    stale: Stale = "null"

    @model_validator(mode="after")
    def _asks_for_one_thing(self) -> Self:
        if (self.features is None) == (self.service is None):
            raise _wrong("give either features, a list of view:feature, or service, the name of a feature service")
        return self

    @property
    def wanted(self) -> str | list[str]:
        """The name of the feature service, or the list of features."""
        return self.service if self.service is not None else self.features or []


class PushRequest(_Body):
    """The body of POST /v1/push: the columns of rows to write, and the key columns of rows to delete. The values are
    checked against the view's schema."""

    view: str
    rows: dict[str, list[Any]] | None = None
    deletes: dict[str, list[Any]] | None = None

    @model_validator(mode="after")
    def _holds_something(self) -> Self:
        if self.rows is None and self.deletes is None:
            raise _wrong("give rows, deletes or both, each an object of columns")
        return self


class ReloadBody(_Body):
    """The body of POST /v1/reload."""

    view: str | None = None
    snapshot: str | None = None
    accept_schema_change: bool = False


Body = TypeVar("Body", bound=_Body)


def set_deadline(request: web.BaseRequest, seconds: float) -> None:
    """Set a request's deadline to `seconds` from now."""
    request[_DEADLINE] = asyncio.get_running_loop().time() + seconds


def remaining_seconds(request: web.BaseRequest) -> float | None:
    """Return the seconds until a request's deadline; None if the client set none."""
    deadline: float | None = request.get(_DEADLINE)
    return None if deadline is None else deadline - asyncio.get_running_loop().time()


class BodyReader:
    """A reader of the bodies of a worker's requests. It limits the total size of the bodies that are being received."""

    def __init__(self, settings: ServerSettings) -> None:
        self._most = settings.max_body_bytes
        self._most_held = _LARGEST_AT_ONCE * settings.max_body_bytes
        self._patience = settings.patience_seconds
        self._held = 0

    async def parse(self, request: web.BaseRequest, model: type[Body]) -> Body:
        """Return the body of a request; raise the errors of `read`, and LookupInvalid if it does not fit `model`."""
        return parse_body(await self.read(request), model)

    async def read(self, request: web.BaseRequest) -> bytes:
        """Return the body of a request, unpacked.

        Raises:
            EncodingUnsupported: the server does not support the body's Content-Encoding.
            RequestTooLarge: the body has more bytes than the settings allow, as sent or unpacked.
            LookupInvalid: the body ends early, or cannot be unpacked.
            BodyTooSlow: the client takes too long to send the body.
            DeadlinePassed: the request's deadline passes before the body has arrived.
            Overloaded: too many bytes of bodies are being received.
        """
        if (encodings := request.headers.getall("Content-Encoding", None)) is not None:
            check_encoding(", ".join(encodings))
        if request.content_length is not None and request.content_length > self._most:
            raise self._too_large(f"{request.content_length} bytes")
        if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
            # Before they send a body, curl, .NET and others wait for this response, for up to a second.
            request.transport.write(_CONTINUE)
        try:
            if request.content.is_eof():  # A small body usually arrives with the head: no need to wait.
                return await request.read()
            return await self._receive(request)
        except web.HTTPRequestEntityTooLarge:
            raise self._too_large("too many bytes") from None
        except (web.RequestPayloadError, ConnectionError) as error:
            raise LookupInvalid(f"the request's body ended early or cannot be unpacked: {error}") from error

    async def _receive(self, request: web.BaseRequest) -> bytes:
        now = asyncio.get_running_loop().time()
        deadline: float | None = request.get(_DEADLINE)
        until = min(now + self._patience, now + self._patience if deadline is None else deadline)
        body = bytearray()
        try:
            async with asyncio.timeout_at(until):
                while chunk := await request.content.readany():
                    body += chunk
                    self._held += len(chunk)
                    if len(body) > self._most:
                        raise self._too_large("too many bytes")
                    if self._held > self._most_held:
                        raise Overloaded(
                            f"the worker is receiving over {self._most_held} bytes of request bodies; try again later",
                            "bodies",
                        )
        except TimeoutError:
            if until == deadline:
                raise DeadlinePassed("the body did not arrive within the time of X-Request-Timeout-Ms") from None
            raise BodyTooSlow(
                f"only {len(body)} bytes of the body arrived in {self._patience:g} s; send it faster, in parts, or "
                f"raise the server's patience_seconds"
            ) from None
        finally:
            self._held -= len(body)
        return bytes(body)

    def _too_large(self, size: str) -> RequestTooLarge:
        return RequestTooLarge(
            f"the body has {size}, the server accepts at most {self._most}; send less, or raise its max_body_bytes"
        )


def check_encoding(encoding: str) -> None:
    """Raise EncodingUnsupported if the server cannot unpack a Content-Encoding."""
    if encoding.strip().lower() not in _ENCODINGS:
        raise EncodingUnsupported(unsupported(abbreviated(encoding)))


def unsupported(encoding: str) -> str:
    """Return the message for a body with an unsupported Content-Encoding."""
    return f"the body's Content-Encoding is {encoding}; send the body in gzip or deflate, or not encoded"


def parse_body(data: bytes, model: type[Body]) -> Body:
    """Return the body in `data`; raise LookupInvalid if it is invalid or has a duplicate key, and RequestTooLarge as
    `check_members` does."""
    try:
        content = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise LookupInvalid(f"the body is not JSON in UTF-8: {error}") from None
    check_members(content)
    try:
        body = model.model_validate(content)
    except ValidationError as error:
        raise LookupInvalid(_describe(error.errors(include_url=False)[0], model)) from None
    if _may_repeat_members(data, content):
        with suppress(RecursionError):  # Lists nested so deeply are invalid in any request.
            json.loads(data, object_pairs_hook=_without_repetition)
    return body


def _may_repeat_members(data: bytes, content: dict[str, Any]) -> bool:
    """Return whether a key may occur more than once in `data`.

    The parser keeps only the last member of a repeated key, so `data` then has more colons after quotes than parsed
    members. Strings may contain such colons too, so True may be a false alarm. A quicker test comes first: without a
    repetition, and if no other text has a colon, `data` has at most one colon per member and one per feature reference
    (`view:feature`).
    """
    members = len(content) + sum(len(member) for member in content.values() if isinstance(member, dict))
    references = sum(len(member) for member in content.values() if isinstance(member, list))
    if data.count(b":") <= members + references:
        return False
    return data.count(b'":') + sum(1 for _ in _SPACED_COLON.finditer(data)) > members


def _without_repetition(members: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in members:
        if name in found:
            raise LookupInvalid(f"{abbreviated(name)} appears twice in an object of the body; give it once")
        found[name] = value
    return found


def check_members(content: Any) -> None:
    """Raise RequestTooLarge if a request's JSON has more features, entities or columns than MAX_FEATURES. Otherwise the
    validation of all these names, and the error messages, would block the worker for seconds."""
    if not isinstance(content, dict):
        return
    check_count("the body", content)
    for name, member in content.items():
        if isinstance(member, list | dict):
            check_count(abbreviated(name), member)


def check_count(what: str, names: Sized) -> None:
    """Raise RequestTooLarge if there are more names than MAX_FEATURES."""
    if len(names) > MAX_FEATURES:
        raise RequestTooLarge(f"{what} has {len(names)} members, a request may have {MAX_FEATURES}; ask in parts")


def check_keys(entities: dict[str, Any], max_keys: int) -> None:
    """Raise RequestTooLarge if a request asks for more keys than `max_keys`."""
    for name, values in entities.items():
        if isinstance(values, Sized) and not isinstance(values, str) and len(values) > max_keys:
            raise RequestTooLarge(
                f"entity {name!r} has {len(values)} values, the server accepts at most {max_keys}; ask in parts, or "
                f"raise its max_keys"
            )


def _describe(error: ErrorDetails, model: type[BaseModel]) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown field {place!r}; the fields are {', '.join(model.model_fields)}"
    if error["type"] == "missing":
        return f"the field {place!r} is missing"
    if error["type"] == "request":
        return f"{place}: {error['msg']}" if place else error["msg"]
    return f"{place or 'the body'} is {abbreviated(error['input'])}: {error['msg']}"
