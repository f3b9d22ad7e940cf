"""POST /get-online-features as Feast's feature server has it: what its clients send, what they read, what they raise.

`docs/feast.md` compares the two, answer by answer. Requests are read as leniently as Feast reads them; what is unusual
in one takes a slower way.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError

from engine.allowance import Allowance
from engine.encoders import json_feast
from engine.encoders.feast_names import feature_names
from engine.errors import FeastBodyInvalid, LookupInvalid, RequestTooLarge, TokenInvalid, UnknownFeature
from engine.feature_store import FeatureStore
from engine.lookup import resolve_features
from engine.remote_rows import Fetched, Partial
from engine.result import LookupResult
from engine.schema import JoinKeyType
from engine.server.requests import check_members
from engine.server.responses import answer_json, sendable
from engine.showing import shown
from engine.version import StoreVersion

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
"""A view in a reference, of which the newest version is asked for, in so many words."""
_LONGEST_REPEATED, _MOST_DETAILS = 64 << 10, 20
"""An error repeats what was sent, as Feast's do, while that is no more bytes; else it is cut, and so many are told."""
_NOT_JSON = "Input should be a valid dictionary or object to extract fields from"


class FeastRequest(BaseModel):
    """The body; members that Feast does not know are left out, and a feature service goes before features."""

    model_config = ConfigDict(frozen=True)
    entities: dict[str, list[Any]]
    feature_service: str | None = None
    features: list[str] = []
    full_feature_names: bool = False
    include_feature_view_version_metadata: bool = False

    @property
    def wanted(self) -> str | list[str]:
        """The features as a lookup takes them; raises LookupInvalid if there are none."""
        if not self.feature_service and not self.features:
            raise LookupInvalid(
                "No features specified for retrieval: give features, a list of view:feature, or feature_service"
            )
        return self.feature_service or self.features


_Body = TypeVar("_Body", bound=BaseModel)


def parse_request(body: bytes, content_type: str) -> FeastRequest:
    """The request for features in a body; raises as `parse_body`."""
    return parse_body(body, content_type, FeastRequest)


def parse_body(body: bytes, content_type: str, model: type[_Body], *, nan: bool = False) -> _Body:
    """What a body says; with `nan` it may say NaN, which JSON has not but Python writes.

    Raises:
        FeastBodyInvalid: it is not JSON, or has not the members, or they are not of the types that Feast takes.
        RequestTooLarge: it has more of them than a request takes.
    """
    if not body:
        raise _refused({"type": "missing", "loc": ["body"], "msg": "Field required", "input": None})
    if not _is_json(content_type):
        shown = body.decode(errors="replace")
        raise _refused({"type": "model_attributes_type", "loc": ["body"], "msg": _NOT_JSON, "input": shown})
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
    """The content of a body; the words for what is not JSON are those of Python's own parser, which Feast's server
    uses."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        refusal: json.JSONDecodeError = error
    try:
        content = json.loads(body)
        if nan:
            # Half a surrogate pair is no text: nothing could be answered that names it.
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
    """What `answer` looks up if what was asked is not right to the letter: names and keys as Feast reads them.

    Raises:
        LookupInvalid, UnknownFeature: the request does not fit the store.
    """
    wanted = asked.wanted
    if not isinstance(wanted, str):
        wanted = [_LATEST.sub(r"\1", reference) for reference in wanted]
    # Of several things that are wrong, Feast tells views that do not exist first, and then names that are the same.
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
    """Look up the features; return the result, and the encoder of the answer's body.

    The answer has every entity that is a join key of any view, and no other entities. A key with a null or missing part
    is not found.

    Args:
        strict: answer exactly as Feast does: rows of any age count as present.
        max_values: the most values that the answer may hold.
        max_bytes: the most bytes that it may take, as it is gathered.
        fetched: the rows of views that are kept in tables, by the keys that `lenient` gives.
        partial: what to do if such rows did not arrive in time.

    Raises:
        LookupInvalid, UnknownFeature: the request does not fit the store.
    """
    wanted, entities = asked.wanted, asked.entities
    how: dict[str, Any] = {
        "max_age": timedelta.max if strict else None,
        "max_values": max_values,
        "max_bytes": max_bytes,
        "fetched": fetched,
        "partial": partial,
    }
    try:
        result = store.lookup(wanted, entities, incomplete="not_found", **how)
    except RequestTooLarge:
        raise
    except LookupInvalid:
        wanted, entities = lenient(store.version(), asked)
        result = store.lookup(wanted, entities, incomplete="not_found", **how)
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
    """The types of the join keys by which features are looked up."""
    views = {reference.partition(":")[0] for reference in references}
    return {key.name: key.type for name in views for key in version.view(name).join_keys}


def coerced(entities: Mapping[str, list[Any]], types: Mapping[str, JoinKeyType]) -> dict[str, list[Any]]:
    """Entities with their values as Feast reads them: what Python's int or str makes of them, nulls excepted.

    Raises:
        LookupInvalid: a value is a list or an object, or no whole number where there must be one.
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


def answer_error(error: Exception, message: str, status: int, *, strict: bool) -> web.Response:
    """An error as Feast's server says it.

    A body that has not the right shape is answered with a list of what is wrong, anything else with a JSON text that
    holds the JSON of the exception to raise in the client.

    Args:
        strict: answer 500, as Feast does, for a request that does not fit the store. Feast's own client tries again
            what is answered so, and then does not tell why.
    """
    message = sendable(message)
    if isinstance(error, FeastBodyInvalid):
        try:
            content = orjson.dumps({"detail": error.details}, default=str)
        except TypeError:
            # An integer of more than 64 bits was sent, which only Python's own JSON has.
            content = b""
        if not content or len(content) > _LONGEST_REPEATED:
            few = error.details[:_MOST_DETAILS]
            content = orjson.dumps(
                {"detail": [{**detail, "input": sendable(shown(detail["input"]))} for detail in few]}
            )
        return web.Response(body=content, status=status, content_type=MEDIA_TYPE)
    if isinstance(error, TokenInvalid):
        return answer_json({"detail": message}, status=status)
    kind = _EXCEPTIONS.get(type(error).__name__, "FeastError")
    if isinstance(error, UnknownFeature) and error.what in _MISSING:
        kind, pattern = _MISSING[error.what]
        message = f"{pattern.format(error.name)}: {message}"
    elif strict and isinstance(error, LookupInvalid) and status in (400, 404):
        status = 500
    detail = orjson.dumps({"module": "feast.errors", "class": kind, "message": message}).decode()
    return answer_json(detail, status=status)
