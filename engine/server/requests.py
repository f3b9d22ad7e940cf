"""Read the bodies of requests: strictly, and with errors that name what is wrong."""

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

from engine.durations import parse_duration
from engine.errors import (
    BodyTooSlow,
    DeadlinePassed,
    EncodingUnsupported,
    LookupInvalid,
    Overloaded,
    RequestTooLarge,
)
from engine.lookup import MAX_FEATURES, Stale
from engine.settings import ServerSettings
from engine.showing import shown

_LARGEST_AT_ONCE = 8
"""So many of the largest bodies may be on their way to a worker at once, or more of smaller ones."""
_DEADLINE = "deadline"
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_ENCODINGS = ("gzip", "deflate", "identity")
"""The encodings that aiohttp always unpacks. If it does not know an encoding, it leaves the body encoded."""
_SPACED_COLON = re.compile(rb'"[ \t\r\n]+:')


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("request", "{message}", {"message": message})


def _duration(value: object) -> object:
    if not isinstance(value, str):
        raise _wrong(f"{shown(value)} is no duration; give a text such as 12h")
    try:
        return parse_duration(value)
    except ValueError as error:
        raise _wrong(str(error)) from None


def _entity(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, list | str | int):
        raise _wrong(f"{shown(value)} is no entity; give a list of keys, or one string or integer for all rows")
    return value


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class LookupRequest(_Body):
    """POST /v1/lookup. The values of an entity are checked by the lookup, against the type of the join key."""

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
        """The features as a lookup takes them."""
        return self.service if self.service is not None else self.features or []


class PushRequest(_Body):
    """POST /v1/push: columns of rows, and of the keys of rows that are to go. Their values are checked against the
    view's schema."""

    view: str
    rows: dict[str, list[Any]] | None = None
    deletes: dict[str, list[Any]] | None = None

    @model_validator(mode="after")
    def _holds_something(self) -> Self:
        if self.rows is None and self.deletes is None:
            raise _wrong("give rows, deletes or both, each an object of columns")
        return self


class ReloadRequest(_Body):
    """POST /v1/reload."""

    view: str | None = None
    snapshot: str | None = None
    accept_schema_change: bool = False


Body = TypeVar("Body", bound=_Body)


def set_deadline(request: web.BaseRequest, seconds: float) -> None:
    """Note that a client waits for so long from now."""
    request[_DEADLINE] = asyncio.get_running_loop().time() + seconds


def remaining_seconds(request: web.BaseRequest) -> float | None:
    """How long the client waits still; None if it has not said."""
    deadline: float | None = request.get(_DEADLINE)
    return None if deadline is None else deadline - asyncio.get_running_loop().time()


class BodyReader:
    """Reads the bodies of a worker's requests, and knows how many bytes it holds of those that are on their way."""

    def __init__(self, settings: ServerSettings) -> None:
        self._most = settings.max_body_bytes
        self._most_held = _LARGEST_AT_ONCE * settings.max_body_bytes
        self._patience = settings.patience_seconds
        self._held = 0

    async def parse(self, request: web.BaseRequest, model: type[Body]) -> Body:
        """The body of a request; raises what `read` does, and LookupInvalid if it is not what `model` says."""
        return parse_body(await self.read(request), model)

    async def read(self, request: web.BaseRequest) -> bytes:
        """The body of a request as it came, unpacked.

        Raises:
            EncodingUnsupported: its Content-Encoding is not known here.
            RequestTooLarge: it has more bytes than the settings allow, as sent or unpacked.
            LookupInvalid: it ends early, or cannot be unpacked.
            BodyTooSlow: the client takes too long to send it.
            DeadlinePassed: it takes longer than the client waits.
            Overloaded: too many bytes of bodies are being received.
        """
        if (encodings := request.headers.getall("Content-Encoding", None)) is not None:
            check_encoding(", ".join(encodings))
        if request.content_length is not None and request.content_length > self._most:
            raise self._too_large(f"{request.content_length} bytes")
        if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
            # curl, .NET and others hold a body back for up to a second until they are told to send it.
            request.transport.write(_CONTINUE)
        try:
            if request.content.is_eof():  # It came with the head, as small ones do: there is nothing to wait for.
                return await request.read()
            return await self._receive(request)
        except web.HTTPRequestEntityTooLarge:
            raise self._too_large("more") from None
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
                        raise self._too_large("more")
                    if self._held > self._most_held:
                        raise Overloaded(
                            f"more than {self._most_held} bytes of requests' bodies are on their way; try again later",
                            "bodies",
                        )
        except TimeoutError:
            if until == deadline:
                raise DeadlinePassed("the body had not come when the time of X-Request-Timeout-Ms was over") from None
            raise BodyTooSlow(
                f"{len(body)} bytes of the body came in {self._patience:g} s; send it faster, in parts, or raise the "
                f"server's patience_seconds"
            ) from None
        finally:
            self._held -= len(body)
        return bytes(body)

    def _too_large(self, size: str) -> RequestTooLarge:
        return RequestTooLarge(
            f"the body has {size}, the server takes {self._most} bytes; ask in parts, or raise its max_body_bytes"
        )


def check_encoding(encoding: str) -> None:
    """Raise EncodingUnsupported if the server cannot unpack a Content-Encoding."""
    if encoding.strip().lower() not in _ENCODINGS:
        raise EncodingUnsupported(unsupported(shown(encoding)))


def unsupported(encoding: str) -> str:
    """Return the message for a body with an unsupported Content-Encoding."""
    return f"the body's Content-Encoding is {encoding}; send the body in gzip or deflate, or not encoded"


def parse_body(data: bytes, model: type[Body]) -> Body:
    """The body in `data`; raises LookupInvalid, also of a member that stands twice, and RequestTooLarge as
    `check_members`."""
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
        with suppress(RecursionError):  # Lists in lists are none of the values that a request may have.
            json.loads(data, object_pairs_hook=_without_repetition)
    return body


def _may_repeat_members(data: bytes, content: dict[str, Any]) -> bool:
    """Whether there are more colons behind quotes than members, of which the parser keeps the last of a name. Texts
    may have some too. Colons alone, of which a feature's reference has one, are counted in a fraction of the time."""
    members = len(content) + sum(len(member) for member in content.values() if isinstance(member, dict))
    references = sum(len(member) for member in content.values() if isinstance(member, list))
    if data.count(b":") <= members + references:
        return False
    return data.count(b'":') + sum(1 for _ in _SPACED_COLON.finditer(data)) > members


def _without_repetition(members: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in members:
        if name in found:
            raise LookupInvalid(f"{shown(name)} stands twice in an object of the body; give it once")
        found[name] = value
    return found


def check_members(content: Any) -> None:
    """Raise RequestTooLarge if a request's JSON names more features, entities or columns than any request has reason
    to: a worker would do nothing else for seconds than look at each, and write down what is wrong with it."""
    if not isinstance(content, dict):
        return
    check_count("the body", content)
    for name, member in content.items():
        if isinstance(member, list | dict):
            check_count(shown(name), member)


def check_count(what: str, names: Sized) -> None:
    """Raise RequestTooLarge if there are more than a request takes."""
    if len(names) > MAX_FEATURES:
        raise RequestTooLarge(f"{what} has {len(names)} members, a request takes {MAX_FEATURES}; ask in parts")


def check_keys(entities: dict[str, Any], max_keys: int) -> None:
    """Raise RequestTooLarge if a request asks for more keys than `max_keys`."""
    for name, values in entities.items():
        if isinstance(values, Sized) and not isinstance(values, str) and len(values) > max_keys:
            raise RequestTooLarge(
                f"entity {name!r} has {len(values)} values, the server takes {max_keys}; ask in parts, or raise its "
                f"max_keys"
            )


def _describe(error: ErrorDetails, model: type[BaseModel]) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown field {place!r}; the fields are {', '.join(model.model_fields)}"
    if error["type"] == "missing":
        return f"the field {place!r} is missing"
    if error["type"] == "request":
        return f"{place}: {error['msg']}" if place else error["msg"]
    return f"{place or 'the body'} is {shown(error['input'])}: {error['msg']}"
