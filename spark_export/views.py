"""views.yaml: which feature views there are, where their rows come from, and which feature services name them.

    views:
      - name: docs
        join_keys: [{name: doc_id, type: string}]
        features:
          - {name: clicks_7d, type: int64}
          - {name: ctr, type: float32, tolerance: 0.001}
        timestamp_field: event_timestamp
        ttl: 7d
        source: {path: data/docs, format: parquet}
    services:
      - {name: ranker_v1, features: ["docs:*"]}

A view as the store knows it, without its source, is an `engine.schema.ViewSchema`.
"""

import difflib
import os
import re
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from engine.durations import parse_duration
from engine.errors import DefinitionError
from engine.schema import Feature, FeatureService, FutureTimes, JoinKey, Name, TableName, Tier, ViewSchema, check_table
from spark_export.yaml_document import Place, YamlDocument

NUMERIC_TYPES = ("int32", "int64", "float32", "float64")
DEFAULT_SHARDS = 8

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_SHOWN_CHARACTERS = 60


def _wrong(message: str, *at: str | int) -> PydanticCustomError:
    """An error about the value that `at` leads to, from the model that raises it."""
    return PydanticCustomError("definition", "{message}", {"message": message, "at": at})


def _duration(value: object) -> timedelta:
    return value if isinstance(value, timedelta) else parse_duration(str(value))


def _share(value: object) -> float | None:
    """A share as a number: of `20%`, or of a number from 0 to 1."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1):
        return value
    if isinstance(value, str) and (match := re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,9})?) ?%", value)):
        share = float(Decimal(match[1]) / 100)
        if share <= 1:
            return share
    raise ValueError(f"expected a share such as 20% or 0.2, from 0% to 100%, found {value!r:.{_SHOWN_CHARACTERS}}")


def _beside(path: str | None, info: ValidationInfo) -> str | None:
    """A path as it is meant in views.yaml: relative to that file."""
    if path is None or info.context is None or _URI.match(path):
        return path
    return os.path.normpath(os.path.join(info.context["directory"], path))


class Source(BaseModel):
    """Where a view's rows come from: files (`path`), a catalog's table (`table`) or a query (`sql`).

    A path has a format that Spark reads (parquet, orc, csv, json, delta, …), and options of that format's reader.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str | None = Field(default=None, min_length=1)
    format: str = Field(default="parquet", min_length=1)
    options: dict[str, bool | int | float | str] = {}
    table: str | None = Field(default=None, min_length=1)
    sql: str | None = Field(default=None, min_length=1)

    @field_validator("path")
    @classmethod
    def _relative_to_the_file(cls, path: str | None, info: ValidationInfo) -> str | None:
        return _beside(path, info)

    @model_validator(mode="after")
    def _is_one_thing(self) -> Self:
        given = [name for name in ("path", "table", "sql") if getattr(self, name) is not None]
        if len(given) != 1:
            raise _wrong(f"a source is one of path, table and sql, but {' and '.join(given) or 'none'} is given")
        for name in ("format", "options"):
            if name in self.model_fields_set and self.path is None:
                raise _wrong(f"{name!r} belongs to a path, not to {given[0]}; remove it", name)
        return self

    def __str__(self) -> str:
        if self.path is not None:
            return f"{self.format} {self.path}"
        return f"table {self.table}" if self.table is not None else f"sql {self.sql}"


_LISTED_FORMATS = ("csv", "json", "orc", "parquet", "text")
_KAFKA_TOPICS = ("assign", "subscribe", "subscribePattern")


class Stream(BaseModel):
    """Where a view's rows keep coming from: Kafka's topics, or files that are added to a directory.

    `columns` are those of the events, as Spark's DDL: of files, or of the JSON in the values of Kafka's records. `sql`
    is a query over the table `events`, which may aggregate; Spark then waits `watermark` for events that come late, by
    the column `event_time`. `output` says when a group is published: whenever it changes, or once it is complete.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: str = Field(min_length=1)
    path: str | None = Field(default=None, min_length=1)
    options: dict[str, bool | int | float | str] = {}
    columns: str | None = Field(default=None, min_length=1)
    event_time: str | None = Field(default=None, min_length=1)
    watermark: Annotated[timedelta, BeforeValidator(_duration)] | None = None
    sql: str | None = Field(default=None, min_length=1)
    output: Literal["update", "append"] = "update"

    @field_validator("path")
    @classmethod
    def _relative_to_the_file(cls, path: str | None, info: ValidationInfo) -> str | None:
        return _beside(path, info)

    @model_validator(mode="after")
    def _is_readable(self) -> Self:
        if self.format == "kafka":
            if self.path is not None:
                raise _wrong("a stream of Kafka has no path; its options name servers and topics", "path")
            if "kafka.bootstrap.servers" not in self.options or not self.options.keys() & set(_KAFKA_TOPICS):
                raise _wrong(
                    f"a stream of Kafka needs the options kafka.bootstrap.servers and one of {', '.join(_KAFKA_TOPICS)}"
                )
        elif self.format in _LISTED_FORMATS:
            for name in ("path", "columns"):
                if getattr(self, name) is None:
                    raise _wrong(f"a stream of {self.format} files needs {name!r}; add it")
        if (self.event_time is None) != (self.watermark is None):
            raise _wrong("event_time and watermark go together: the column, and how late an event may be; give both")
        return self

    def __str__(self) -> str:
        topics = next((str(self.options[name]) for name in _KAFKA_TOPICS if name in self.options), None)
        where = self.path or topics
        return f"stream of {self.format}{f' {where}' if where else ''}"


class FeatureDefinition(Feature):
    """A feature, and how far its value may stand from the one last shipped before its row counts as changed."""

    tolerance: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _is_no_message_of_feast(self) -> Self:
        if self.feast_member is not None:
            raise _wrong("unknown key 'feast_member'; remove it", "feast_member")
        return self

    @model_validator(mode="after")
    def _is_measurable(self) -> Self:
        if self.tolerance is not None and self.type not in NUMERIC_TYPES:
            raise _wrong(
                f"a tolerance needs one of the types {', '.join(NUMERIC_TYPES)}, not {self.type}; remove it",
                "tolerance",
            )
        return self


class ViewDefinition(BaseModel):
    """A feature view: its schema, and how its rows are read and published: from a `source` by exports, from a `stream`
    by what runs all the time, or from both.

    `timestamp_field` names the source's column of event times; without it a row's event time is the time of the run
    that ships it. `push_source` is the name under which Feast's clients push rows of it to a server. `shards` is the
    number of hash ranges, and so of files, in which an entry's rows are published. `tier` and `table` say where the
    rows are kept from which lookups are answered. `future` says whether event times may be more than a day ahead.
    `max_removed` is the share of its rows, and of each feature's values,
    that one export may remove; None for the default: `spark_export.guard`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Name
    join_keys: tuple[JoinKey, ...] = Field(min_length=1)
    features: tuple[FeatureDefinition, ...] = Field(min_length=1)
    timestamp_field: str | None = Field(default=None, min_length=1)
    ttl: Annotated[timedelta, BeforeValidator(_duration)] | None = None
    push_source: str | None = Field(default=None, min_length=1)
    source: Source | None = None
    stream: Stream | None = None
    shards: int = Field(default=DEFAULT_SHARDS, ge=1, le=4096)
    tier: Tier = "local"
    table: TableName | None = None
    future: FutureTimes = "refuse"
    max_removed: Annotated[float | None, BeforeValidator(_share)] = None

    @model_validator(mode="after")
    def _has_rows(self) -> Self:
        if self.source is None and self.stream is None:
            raise _wrong("a view needs a source, a stream, or both; add one")
        if self.stream is not None and self.timestamp_field is None:
            # What is read again after a crash has to be what was read before.
            raise _wrong("a view with a stream needs a timestamp_field: the column of event times", "stream")
        return self

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Self:
        # Letter case does not count, because Spark does not tell columns apart by it.
        seen: set[str] = set()
        for member in ("join_keys", "features"):
            for position, column in enumerate(getattr(self, member)):
                if column.name.lower() in seen:
                    raise _wrong(f"the view has two columns {column.name!r}; rename one", member, position, "name")
                seen.add(column.name.lower())
        return self

    @model_validator(mode="after")
    def _has_a_table_if_remote(self) -> Self:
        try:
            check_table(self.tier, self.table)
        except ValueError as error:
            raise _wrong(str(error), "table") from None
        return self

    @property
    def tolerant_features(self) -> tuple[FeatureDefinition, ...]:
        """The features that have a tolerance."""
        return tuple(feature for feature in self.features if feature.tolerance is not None)

    @property
    def schema(self) -> ViewSchema:  # type: ignore[override]  # hides a deprecated method of BaseModel
        """The view as it is published."""
        features = tuple(Feature(name=feature.name, type=feature.type) for feature in self.features)
        return ViewSchema(
            name=self.name,
            join_keys=self.join_keys,
            features=features,
            ttl=self.ttl,
            timestamp_field=self.timestamp_field,
            push_source=self.push_source,
            future=self.future,
            tier=self.tier,
            table=self.table,
        )


class ViewsFile(BaseModel):
    """All of a views.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    views: tuple[ViewDefinition, ...] = Field(min_length=1)
    services: tuple[FeatureService, ...] = ()

    @model_validator(mode="after")
    def _names_resolve(self) -> Self:
        for member in ("views", "services"):
            names: set[str] = set()
            for position, named in enumerate(getattr(self, member)):
                if named.name in names:
                    raise _wrong(f"{member[:-1]} {named.name!r} is defined twice; rename one", member, position, "name")
                names.add(named.name)
        known = {view.name: {"*"} | {feature.name for feature in view.features} for view in self.views}
        for position, service in enumerate(self.services):
            for number, reference in enumerate(service.features):
                view, _, feature = reference.partition(":")
                at = ("services", position, "features", number)
                if view not in known:
                    raise _wrong(f"{reference!r} names no view of this file; it has {', '.join(known)}", *at)
                if feature not in known[view]:
                    raise _wrong(
                        f"{reference!r} names no feature of view {view!r}{_closest(feature, known[view])}", *at
                    )
        return self


def load_views(path: str | os.PathLike[str]) -> ViewsFile:
    """Read a views.yaml; relative paths in it are relative to the file.

    Raises:
        DefinitionError: it cannot be read, or something in it is wrong; the message names the file and the line.
    """
    document = YamlDocument(Path(path))
    try:
        return ViewsFile.model_validate(document.data, context={"directory": document.path.absolute().parent})
    except ValidationError as error:
        found = [(_place(details), details) for details in error.errors()]
        # What is wrong inside a list makes the list itself wrong; only the first cause is worth telling.
        causes = [(document.line(place), details) for place, details in found if not _is_around(place, found)]
        line, first = min(causes, key=lambda cause: cause[0])
        others = f" (and {len(causes) - 1} more)" if len(causes) > 1 else ""
        raise DefinitionError(f"{document.path}:{line}: {_explain(first)}{others}") from None


def _place(details: ErrorDetails) -> Place:
    return (*details["loc"], *details.get("ctx", {}).get("at", ()))


def _is_around(place: Place, found: list[tuple[Place, ErrorDetails]]) -> bool:
    return any(len(other) > len(place) and other[: len(place)] == place for other, _ in found)


def _explain(details: ErrorDetails) -> str:
    """What is wrong, in the words of the file rather than of the library that found it."""
    name = next((step for step in reversed(details["loc"]) if isinstance(step, str)), "the file")
    match details["type"]:
        case "definition":
            return details["msg"]
        case "value_error":
            return f"{name}: {details['msg'].removeprefix('Value error, ')}"
        case "missing":
            return f"{name!r} is missing; add it"
        case "tuple_type":
            return f"{name}: expected a list, found {_shown(details)}"
        case "model_type" | "dict_type":
            return f"{name}: expected a mapping of names to values, found {_shown(details)}"
        case "too_short":
            return f"{name}: expected at least one entry, found none"
        case "extra_forbidden":
            return f"unknown key {name!r}{_closest(name, _known_keys())}"
        case "string_pattern_mismatch" if name == "table":
            return f"{_shown(details)} is no name of a table; use 3 to 255 letters, digits and any of _ . -"
        case "string_pattern_mismatch" if name == "name":
            return f"{_shown(details)} is no name; use a letter, then letters, digits and underscores (at most 128)"
        case "string_pattern_mismatch":
            return f"{_shown(details)} names no feature; write view:feature, or view:* for all of a view's features"
        case _:
            return f"{name}: {details['msg'][:1].lower()}{details['msg'][1:]}, but it is {_shown(details)}"


def _shown(details: ErrorDetails) -> str:
    text = repr(details["input"])
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def _known_keys() -> set[str]:
    models = (ViewsFile, ViewDefinition, JoinKey, FeatureDefinition, Source, Stream, FeatureService)
    return {key for model in models for key in model.model_fields}


def _closest(name: str, known: set[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else "; remove it"
