"""POST /get-online-features, compatible with Feast's feature server: its requests, answers and errors.

`docs/feast.md` compares the two servers, answer by answer. Requests are parsed as leniently as in Feast; unusual
requests take a slower path.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError

from shoal.engine.base.errors import (
    FeastBodyInvalid,
    LookupInvalid,
    RequestTooLarge,
    TokenInvalid,
    UnknownFeature,
)
from shoal.engine.base.quoting import abbreviated
from shoal.engine.encoders import json_feast
from shoal.engine.encoders.feast_names import feature_names
from shoal.engine.feature_store import FeatureStore
from shoal.engine.format.schema import JoinKeyType, split_reference
from shoal.engine.lookup.allowance import Allowance
from shoal.engine.lookup.columns import resolve_features
from shoal.engine.lookup.remote_rows import Fetched, Partial
from shoal.engine.lookup.result import LookupResult
from shoal.engine.server.requests import check_members
from shoal.engine.server.responses import json_response, sendable
from shoal.engine.store.version import StoreVersion

MEDIA_TYPE = json_feast.MEDIA_TYPE

_EXCEPTIONS = {
    "AmbiguousFeature": "FeatureNameCollisionError",
    "RoleMissing": "FeastPermissionError",
    "UnknownFeature": "FeastObjectNotFoundException",
    "PushSourceUnknown": "PushSourceNotFoundException",
}
_MISSING = {
    "view": ("FeatureViewNotFoundException", "Feature view {} does not exist"),
    "service": ("FeatureServiceNotFoundException", "Feature service {} does not exist"),
}
_LATEST = re.compile(r"^([^@:]*)@(?:latest)?(?=:)", re.IGNORECASE)
"""Matches the view of a reference that names the newest version explicitly: `view@latest:feature`, or
`view@:feature`."""
_LONGEST_REPEATED = 64 << 10
_MOST_DETAILS = 20
"""An error repeats the input, as Feast's errors do. An error that would be longer than `_LONGEST_REPEATED` bytes has at
most `_MOST_DETAILS` details, and their input is abbreviated."""
_NOT_JSON = "Input should be a valid dictionary or object to extract fields from"


class FeastRequest(BaseModel):
    """The body of a request. Members unknown to Feast are ignored, and `feature_service` takes precedence over
    `features`."""

    model_config = ConfigDict(frozen=True)
    entities: dict[str, list[Any]]
    feature_service: str | None = None
    features: list[str] = []
    full_feature_names: bool = False
    include_feature_view_version_metadata: bool = False

    @property
    def wanted(self) -> str | list[str]:
        """The features or the feature service for a lookup; raises LookupInvalid if the request names none."""
        if not self.feature_service and not self.features:
            raise LookupInvalid(
                "No features specified for retrieval: give features, a list of view:feature, or feature_service"
            )
        return self.feature_service or self.features


_Body = TypeVar("_Body", bound=BaseModel)


def parse_feast_request(body: bytes, content_type: str) -> FeastRequest:
    """Return the lookup request in a body; raise the same errors as `parse_feast_body`."""
    return parse_feast_body(body, content_type, FeastRequest)


def parse_feast_body(body: bytes, content_type: str, model: type[_Body], *, nan: bool = False) -> _Body:
    """Return the content of a body. If `nan` is true, the body may contain NaN, which is not valid JSON, but which
    Python writes.

    Raises:
        FeastBodyInvalid: the body is not JSON, lacks a member, or has a member of a type that Feast does not accept.
        RequestTooLarge: the body has too many members.
    """
    if not body:
        raise _refused({"type": "missing", "loc": ["body"], "msg": "Field required", "input": None})
    if not _is_json(content_type):
        abbreviated = body.decode(errors="replace")
        raise _refused({"type": "model_attributes_type", "loc": ["body"], "msg": _NOT_JSON, "input": abbreviated})
    content = _loads(body, nan)
    check_members(content)
    try:
        return model.model_validate(content, from_attributes=True)
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise _refused(*({**detail, "loc": ["body", *detail["loc"]]} for detail in details)) from None


def _is_json(content_type: str) -> bool:
    kind, _, subtype = content_type.lower().partition("/")
    return kind == "application" and (subtype == "json" or subtype.endswith("+json"))


def _loads(body: bytes, nan: bool) -> Any:
    """Return the content of a body. If the body is not JSON, the error has the words of Python's own parser, as in
    Feast's server."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        refusal: json.JSONDecodeError = error
    try:
        content = json.loads(body)
        if nan:
            # Reject half a surrogate pair: it is not valid text, so no answer could repeat it.
            json.dumps(content, ensure_ascii=False).encode()
            return content
    except json.JSONDecodeError as error:
        refusal = error
    except (ValueError, RecursionError):
        pass
    why = {"loc": ["body", refusal.pos], "ctx": {"error": refusal.msg}}
    raise _refused({"type": "json_invalid", "msg": "JSON decode error", "input": {}, **why})


def _refused(*details: Mapping[str, Any]) -> FeastBodyInvalid:
    return FeastBodyInvalid(f"{details[0]['loc']}: {details[0]['msg']}", details)


def lenient(version: StoreVersion, asked: FeastRequest) -> tuple[str | list[str], dict[str, list[Any]]]:
    """Return the features and entities of a request, for `look_up`. Names and keys are read as leniently as in Feast.

    Raises:
        LookupInvalid, UnknownFeature: the request does not fit the store.
    """
    wanted = asked.wanted
    if not isinstance(wanted, str):
        wanted = [_LATEST.sub(r"\1", reference) for reference in wanted]
    # If several things are wrong, Feast reports missing views first, and then names that collide.
    references = resolve_features(version, wanted)
    types = _key_types(version, references)
    feature_names(references, full=asked.full_feature_names)
    return wanted, coerced(asked.entities, types)


def look_up(
    store: FeatureStore,
    asked: FeastRequest,
    *,
    strict: bool,
    max_values: int | None = None,
    max_bytes: int | None = None,
    fetched: Fetched | None = None,
    partial: Partial = "serve",
) -> tuple[LookupResult, Callable[[Allowance], bytes]]:
    """Look up the features; return the result, and a function that encodes the answer's body.

    The answer has every entity that is a join key of any view, and no other entities. A key with a null or missing part
    counts as not found.

    Args:
        strict: answer exactly as Feast does: rows of any age count as present.
        max_values: the maximum number of values in the answer.
        max_bytes: the maximum size of the answer in bytes while it is gathered.
        fetched: the rows of views that are kept in tables, for the keys that `lenient` returns.
        partial: what to do if such rows did not arrive in time.

    Raises:
        LookupInvalid, UnknownFeature: the request does not fit the store.
    """
    wanted = asked.wanted
    entities = asked.entities
    options: dict[str, Any] = {
        "max_age": timedelta.max if strict else None,
        "max_values": max_values,
        "max_bytes": max_bytes,
        "fetched": fetched,
        "partial": partial,
    }
    try:
        result = store.lookup(wanted, entities, incomplete="not_found", **options)
    except RequestTooLarge:
        raise
    except LookupInvalid:
        wanted, entities = lenient(store.version(), asked)
        result = store.lookup(wanted, entities, incomplete="not_found", **options)
    known = store.version().join_key_names
    join_keys = {name: values for name, values in entities.items() if name in known}

    def encode(allowance: Allowance) -> bytes:
        return json_feast.encode(
            result,
            join_keys,
            full_feature_names=asked.full_feature_names,
            view_names=asked.include_feature_view_version_metadata,
            strict=strict,
            allowance=allowance,
        )

    return result, encode


def _key_types(version: StoreVersion, references: Sequence[str]) -> dict[str, JoinKeyType]:
    """Return the types of the join keys of the requested views, by name."""
    views = {split_reference(reference)[0] for reference in references}
    return {key.name: key.type for name in views for key in version.view(name).join_keys}


def coerced(entities: Mapping[str, list[Any]], types: Mapping[str, JoinKeyType]) -> dict[str, list[Any]]:
    """Return the entities with each value converted as in Feast, by Python's int or str; nulls stay null.

    Raises:
        LookupInvalid: a value is a list or an object, or is not a whole number although its join key is an int64.
    """
    return {
        name: [_coerced(name, value, types[name]) for value in values] if name in types else values
        for name, values in entities.items()
    }


def _coerced(name: str, value: Any, key_type: JoinKeyType) -> Any:
    if value is None:
        return None
    if isinstance(value, list | dict):
        raise LookupInvalid(f"entity {name!r} must be {key_type}, but holds {type(value).__name__}s; give plain values")
    if key_type == "string":
        return str(value)
    try:
        return int(value)
    except (ValueError, OverflowError) as error:
        raise LookupInvalid(f"entity {name!r} must be int64: {error}") from None


def feast_error_response(error: Exception, message: str, status: int, *, strict: bool) -> web.Response:
    """Return an error in the format of Feast's server.

    For a body of the wrong shape, the answer is a list of the mistakes. For any other error, the answer is a JSON
    string. This string contains the JSON of the exception that Feast's client raises.

    Args:
        strict: answer 500, as Feast does, if a request does not fit the store. Feast's own client retries after a 500,
            and then does not report the reason.
    """
    message = sendable(message)
    if isinstance(error, FeastBodyInvalid):
        try:
            content = orjson.dumps({"detail": error.details}, default=str)
        except TypeError:
            # The request has an integer of more than 64 bits, and orjson cannot write it.
            content = b""
        if not content or len(content) > _LONGEST_REPEATED:
            few = error.details[:_MOST_DETAILS]
            content = orjson.dumps(
                {"detail": [{**detail, "input": sendable(abbreviated(detail["input"]))} for detail in few]}
            )
        return web.Response(body=content, status=status, content_type=MEDIA_TYPE)
    if isinstance(error, TokenInvalid):
        return json_response({"detail": message}, status=status)
    kind = _EXCEPTIONS.get(type(error).__name__, "FeastError")
    if isinstance(error, UnknownFeature) and error.what in _MISSING:
        kind, pattern = _MISSING[error.what]
        message = f"{pattern.format(error.name)}: {message}"
    elif strict and isinstance(error, LookupInvalid) and status in (400, 404):
        status = 500
    detail = orjson.dumps({"module": "feast.errors", "class": kind, "message": message}).decode()
    return json_response(detail, status=status)
