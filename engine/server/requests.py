"""Read the bodies of requests: strictly, and with errors that name what is wrong."""

from collections.abc import Sized
from datetime import timedelta
from typing import Annotated, Any, Self, TypeVar

import orjson
from aiohttp import web
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from engine.durations import parse_duration
from engine.errors import LookupInvalid, RequestTooLarge
from engine.lookup import Stale

_SHOWN_CHARACTERS = 60
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("request", "{message}", {"message": message})


def _duration(value: object) -> object:
    if not isinstance(value, str):
        raise _wrong(f"{value!r} is no duration; give a text such as 12h")
    try:
        return parse_duration(value)
    except ValueError as error:
        raise _wrong(str(error)) from None


def _entity(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, list | str | int):
        raise _wrong(f"{value!r} is no entity; give a list of keys, or one string or integer for all rows")
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


async def read_body(request: web.BaseRequest, model: type[Body], max_bytes: int) -> Body:
    """The body of a request.

    Raises:
        RequestTooLarge: it has more than `max_bytes`, as sent or unpacked.
        LookupInvalid: it ends early, is not JSON, or is not what `model` says.
    """
    return parse_body(await read_bytes(request, max_bytes), model)


async def read_bytes(request: web.BaseRequest, max_bytes: int) -> bytes:
    """The body of a request as it came, unpacked.

    Raises:
        RequestTooLarge: it has more than `max_bytes`, as sent or unpacked.
        LookupInvalid: it ends early, or cannot be unpacked.
    """
    if request.content_length is not None and request.content_length > max_bytes:
        raise _too_large(f"{request.content_length} bytes", max_bytes)
    if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
        # curl, .NET and others hold a body back for up to a second until they are told to send it.
        request.transport.write(_CONTINUE)
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise _too_large("more", max_bytes) from None
    except (web.RequestPayloadError, ConnectionError) as error:
        raise LookupInvalid(f"the request's body ended early or cannot be unpacked: {error}") from error


def parse_body(data: bytes, model: type[Body]) -> Body:
    """The body in `data`; raises LookupInvalid."""
    try:
        content = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise LookupInvalid(f"the body is not JSON in UTF-8: {error}") from None
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise LookupInvalid(_describe(error.errors(include_url=False)[0], model)) from None


def check_keys(entities: dict[str, Any], max_keys: int) -> None:
    """Raise RequestTooLarge if a request asks for more keys than `max_keys`."""
    for name, values in entities.items():
        if isinstance(values, Sized) and not isinstance(values, str) and len(values) > max_keys:
            raise RequestTooLarge(
                f"entity {name!r} has {len(values)} values, the server takes {max_keys}; ask in parts, or raise its "
                f"max_keys"
            )


def _too_large(size: str, max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(
        f"the body has {size}, the server takes {max_bytes} bytes; ask in parts, or raise its max_body_bytes"
    )


def _describe(error: ErrorDetails, model: type[BaseModel]) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown field {place!r}; the fields are {', '.join(model.model_fields)}"
    if error["type"] == "missing":
        return f"the field {place!r} is missing"
    if error["type"] == "request":
        return f"{place}: {error['msg']}" if place else error["msg"]
    shown = repr(error["input"])
    if len(shown) > _SHOWN_CHARACTERS:
        shown = shown[:_SHOWN_CHARACTERS] + "..."
    return f"{place or 'the body'} is {shown}: {error['msg']}"
