"""Errors in a views.yaml: all errors at once, in the words of the file, each with its line and the fix."""

import difflib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from shoal.engine.base.errors import DefinitionError
from shoal.engine.format.schema import is_name
from shoal.spark_export.views.yaml_document import Place, YamlDocument

_SHOWN_CHARACTERS = 60
_MOST_ERRORS = 100

_MEANT_KEYS = {
    **dict.fromkeys(("entity", "entities", "key", "keys", "join_keys", "join_key", "primary_key"), "join_keys"),
    **dict.fromkeys(("columns", "fields", "schema"), "features"),
    **dict.fromkeys(("timestamp", "timestamp_column", "event_timestamp", "event_timestamp_column"), "timestamp_field"),
    **dict.fromkeys(("dtype", "data_type", "value_type"), "type"),
    "batch_source": "source",
}
"""Common wrong names of the keys of a views.yaml → the right names."""

_MEANT_TYPES = {
    **dict.fromkeys(("int", "integer", "long", "bigint", "number"), "int64"),
    **dict.fromkeys(("float", "real"), "float32"),
    "double": "float64",
    **dict.fromkeys(("str", "text", "varchar"), "string"),
    "boolean": "bool",
    **dict.fromkeys(("binary", "bytea"), "bytes"),
    **dict.fromkeys(("datetime", "date"), "timestamp"),
}
"""Common wrong names of the types → the right names."""

_EXAMPLES = {
    "join_keys": "join_keys: [{{name: {}, type: string}}]",
    "features": "features: [{{name: {}, type: int64}}]",
    "source": "source: {{path: data/docs, format: parquet}}",
}
"""Key with a structured value → an example of it, with a placeholder for a name."""


class Finding(NamedTuple):
    """An error about the value at the path `at`. The path is relative to the model that reports the error."""

    message: str
    at: Place = ()


def wrong(message: str, *at: str | int) -> PydanticCustomError:
    """Return a finding as an error that a pydantic validator can raise."""
    return PydanticCustomError("definition", "{message}", {"message": message, "at": at})


class Definition(BaseModel):
    """A part of a views.yaml. Its `findings` are reported together with its other errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def findings(cls, data: dict[str, Any]) -> Iterator[Finding]:
        """Yield the errors that depend on several members. The members are not yet validated."""
        yield from ()

    @model_validator(mode="wrap")
    @classmethod
    def _all_at_once(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        found = cls.findings(data) if isinstance(data, dict) else ()
        errors = [InitErrorDetails(type=wrong(message, *at), loc=(), input=data) for message, at in found]
        try:
            made = handler(data)
        except ValidationError as error:
            errors += [_again(details) for details in error.errors(include_url=False)]
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return made


def _again(details: ErrorDetails) -> InitErrorDetails:
    """Return an error of a nested model in a form that the enclosing model can report."""
    context = {"message": details["msg"], "at": details.get("ctx", {}).get("at", ())}
    kind = PydanticCustomError(details["type"], "{message}", context)
    return InitErrorDetails(type=kind, loc=details["loc"], input=details["input"])


def member(thing: Any, name: str) -> Any:
    """Return a member of a mapping or of a model; None if the member is missing."""
    return thing.get(name) if isinstance(thing, dict) else getattr(thing, name, None)


def listed(thing: Any) -> list[Any]:
    """Return the items of a list or tuple; an empty list for any other value."""
    return list(thing) if isinstance(thing, list | tuple) else []


def closest(name: str, known: Iterable[str]) -> str:
    """Return the fix for an unknown name: the most similar known name, or to remove it."""
    matches = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else "; remove it"


def definition_error(document: YamlDocument, error: ValidationError, known_keys: set[str]) -> DefinitionError:
    """Return one DefinitionError that lists all errors in the order of the file, one per line."""
    found = [(_place(details), details) for details in error.errors()]
    places = [place for place, details in found if details["type"] != "definition"]
    lines: list[tuple[int, str]] = []
    for place, details in found:
        # Errors inside a list also make pydantic report the list as too short.
        if details["type"] == "too_short" and any(len(other) > len(place) == _shared(place, other) for other in places):
            continue
        if details["type"] == "missing" and _is_misspelt(place, found, known_keys):
            continue
        lines.append((document.line(place), _explain(details, known_keys)))
    lines.sort(key=lambda entry: entry[0])
    messages = [f"{document.path}:{line}: {message}" for line, message in dict.fromkeys(lines)]
    more = [f"{document.path}: and {len(messages) - _MOST_ERRORS} more"] if len(messages) > _MOST_ERRORS else []
    return DefinitionError("\n".join(messages[:_MOST_ERRORS] + more))


def _shared(place: Place, other: Place) -> int:
    return len(place) if other[: len(place)] == place else -1


def _place(details: ErrorDetails) -> Place:
    return (*details["loc"], *details.get("ctx", {}).get("at", ()))


def _is_misspelt(missing: Place, found: list[tuple[Place, ErrorDetails]], known: set[str]) -> bool:
    """Return whether a key is missing only because it was misspelt. The misspelt key has an error of its own."""
    return any(
        details["type"] == "extra_forbidden"
        and place[:-1] == missing[:-1]
        and (_meant(str(place[-1]), known) == missing[-1] or str(place[-1]).startswith(f"{missing[-1]}:"))
        for place, details in found
    )


def _meant(name: str, known: set[str]) -> str | None:
    """Return the key that was probably meant by an unknown key; None if no known key is similar."""
    meant = _MEANT_KEYS.get(name.lower())
    return meant or next(iter(difflib.get_close_matches(name, known, n=1)), None)


def _explain(details: ErrorDetails, known_keys: set[str]) -> str:
    """Return an error's message in the words of the file instead of pydantic's."""
    name = next((step for step in reversed(details["loc"]) if isinstance(step, str)), "the file")
    match details["type"]:
        case "definition":
            return details["msg"]
        case "value_error":
            return f"{name}: {details['msg'].removeprefix('Value error, ')}{_meant_type(name, details)}"
        case "missing":
            return f"{name!r} is missing; add it{_example(name)}"
        case "tuple_type":
            return f"{name}: expected a list, found {_shown(details)}{_example(name, details['input'])}"
        case "model_type" | "dict_type":
            item = isinstance(details["loc"][-1], int) if details["loc"] else False
            example = _example(name, details["input"]) if item or name == "source" else ""
            return f"{name}: expected a mapping of names to values, found {_shown(details)}{example}"
        case "too_short":
            return f"{name}: expected at least one entry, found none{_example(name)}"
        case "extra_forbidden":
            return _unknown_key(name, details, known_keys)
        case "string_pattern_mismatch" if name == "table":
            return f"{_shown(details)} is not a table name; use 3 to 255 letters, digits and any of _ . -"
        case "string_pattern_mismatch" if name == "name":
            return f"{_shown(details)} is not a name; use a letter, then letters, digits and underscores (at most 128)"
        case "string_pattern_mismatch":
            return f"{_shown(details)} names no feature; write view:feature, or view:* for all of a view's features"
        case _:
            message = f"{details['msg'][:1].lower()}{details['msg'][1:]}"
            return f"{name}: {message}, but it is {_shown(details)}{_meant_type(name, details)}"


def _unknown_key(name: str, details: ErrorDetails, known_keys: set[str]) -> str:
    key, colon, value = name.partition(":")
    if colon and key in known_keys and details["input"] is None:
        return f"unknown key {name!r}; a colon needs a space after it: {key}: {value}"
    meant = _meant(name, known_keys)
    if meant is None:
        return f"unknown key {name!r}; remove it"
    return f"unknown key {name!r}; did you mean {meant!r}?{_example(meant, details['input']).replace(';', '', 1)}"


def _meant_type(name: str, details: ErrorDetails) -> str:
    """Return a hint with the type that was probably meant by an unknown type; an empty string if there is none."""
    given = details["input"]
    if name != "type" or not isinstance(given, str):
        return ""
    plain = given.lower().removeprefix("pa.").removesuffix("()")
    meant = _MEANT_TYPES.get(plain)
    items = plain.partition("[")[2].removesuffix("]")
    if plain.startswith(("list[", "array[")) and not items.isdigit():
        meant = f"list<{_MEANT_TYPES.get(items, items)}>"
    return f"; did you mean {meant!r}?" if meant is not None else ""


def _example(name: str, given: object = None) -> str:
    """Return an example value for a key, with the given name if that name is valid. Return an empty string if there is
    no example for the key."""
    if name not in _EXAMPLES:
        return ""
    named = given if isinstance(given, str) and is_name(given) else "user_id" if name == "join_keys" else "clicks"
    return f"; write {_EXAMPLES[name].format(named)}"


def _shown(details: ErrorDetails) -> str:
    text = repr(details["input"])
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
