"""The contents of views.yaml: the feature views, the sources of their rows, and the feature services.

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

The store knows a view without its source, as a `shoal.engine.format.schema.ViewSchema`.
"""

import os
import re
from collections.abc import Iterator, Mapping
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator

from shoal.engine.base.durations import parse_duration
from shoal.engine.format.schema import (
    Feature,
    FeatureService,
    FutureTimes,
    JoinKey,
    Name,
    TableName,
    Tier,
    ViewSchema,
    check_table,
)
from shoal.spark_export.views.definition_errors import (
    Definition,
    Finding,
    closest,
    definition_error,
    listed,
    member,
    wrong,
)
from shoal.spark_export.views.yaml_document import YamlDocument

NUMERIC_TYPES = ("int32", "int64", "float32", "float64")
DEFAULT_SHARDS = 8

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_SHOWN_CHARACTERS = 60


def _duration(value: object) -> timedelta:
    return value if isinstance(value, timedelta) else parse_duration(str(value))


def _share(value: object) -> float | None:
    """Parse a share, such as `20%` or a number from 0 to 1, as a number from 0 to 1."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1):
        return value
    if isinstance(value, str) and (match := re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,9})?) ?%", value)):
        share = float(Decimal(match[1]) / 100)
        if share <= 1:
            return share
    raise ValueError(f"expected a share such as 20% or 0.2, from 0% to 100%, found {value!r:.{_SHOWN_CHARACTERS}}")


def _beside(path: str | None, info: ValidationInfo) -> str | None:
    """Resolve a path of views.yaml relative to the directory of that file. Leave URIs unchanged."""
    if path is None or info.context is None or _URI.match(path):
        return path
    return os.path.normpath(os.path.join(info.context["directory"], path))


class Source(Definition):
    """The source of a view's rows: files (`path`), a table of Spark's catalog (`table`) or a query (`sql`).

    A path has a format that Spark reads (parquet, orc, csv, json, delta, …) and options for that format's reader.
    """

    path: str | None = Field(default=None, min_length=1)
    format: str = Field(default="parquet", min_length=1)
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    table: str | None = Field(default=None, min_length=1)
    sql: str | None = Field(default=None, min_length=1)

    @field_validator("path")
    @classmethod
    def _relative_to_the_file(cls, path: str | None, info: ValidationInfo) -> str | None:
        return _beside(path, info)

    @classmethod
    def findings(cls, data: dict[str, Any]) -> Iterator[Finding]:
        given = [name for name in ("path", "table", "sql") if data.get(name) is not None]
        if len(given) != 1:
            yield Finding(f"a source is one of path, table and sql, but {' and '.join(given) or 'none'} is given")
            return
        for name in ("format", "options"):
            if name in data and given[0] != "path":
                yield Finding(f"{name!r} belongs to a path, not to {given[0]}; remove it", (name,))

    def __str__(self) -> str:
        if self.path is not None:
            return f"{self.format} {self.path}"
        return f"table {self.table}" if self.table is not None else f"sql {self.sql}"


_LISTED_FORMATS = ("csv", "json", "orc", "parquet", "text")
_KAFKA_TOPICS = ("assign", "subscribe", "subscribePattern")


class Stream(Definition):
    """The stream of a view's rows: Kafka topics, or files that are added to a directory.

    `columns` declares the columns of the events as Spark DDL. The events are the rows of the files, or the JSON values
    of the Kafka records. `sql` is a query over the table `events`. If the query aggregates, Spark waits for late events
    for the time `watermark`, measured by the column `event_time`. `output` says when a group is published: `update` on
    every change, `append` once the group is complete.
    """

    format: str = Field(min_length=1)
    path: str | None = Field(default=None, min_length=1)
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    columns: str | None = Field(default=None, min_length=1)
    event_time: str | None = Field(default=None, min_length=1)
    watermark: Annotated[timedelta, BeforeValidator(_duration)] | None = None
    sql: str | None = Field(default=None, min_length=1)
    output: Literal["update", "append"] = "update"

    @field_validator("path")
    @classmethod
    def _relative_to_the_file(cls, path: str | None, info: ValidationInfo) -> str | None:
        return _beside(path, info)

    @classmethod
    def findings(cls, data: dict[str, Any]) -> Iterator[Finding]:
        if data.get("format") == "kafka":
            if data.get("path") is not None:
                yield Finding("a stream of Kafka has no path; its options name servers and topics", ("path",))
            options = data.get("options")
            names = options.keys() if isinstance(options, dict) else set()
            if "kafka.bootstrap.servers" not in names or not names & set(_KAFKA_TOPICS):
                yield Finding(
                    f"a stream of Kafka needs the options kafka.bootstrap.servers and one of {', '.join(_KAFKA_TOPICS)}"
                )
        elif data.get("format") in _LISTED_FORMATS:
            for name in ("path", "columns"):
                if data.get(name) is None:
                    yield Finding(f"a stream of {data['format']} files needs {name!r}; add it")
        if (data.get("event_time") is None) != (data.get("watermark") is None):
            yield Finding("event_time and watermark go together: the column, and how late an event may be; give both")

    def __str__(self) -> str:
        topics = next((str(self.options[name]) for name in _KAFKA_TOPICS if name in self.options), None)
        where = self.path or topics
        return f"stream of {self.format}{f' {where}' if where else ''}"


class FeatureDefinition(Feature):
    """A feature with an optional tolerance: the greatest difference from the shipped value that counts as unchanged."""

    tolerance: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _is_no_message_of_feast(self) -> Self:
        if self.feast_member is not None:
            raise wrong("unknown key 'feast_member'; remove it", "feast_member")
        return self

    @model_validator(mode="after")
    def _is_measurable(self) -> Self:
        if self.tolerance is not None and self.type not in NUMERIC_TYPES:
            raise wrong(
                f"a tolerance needs one of the types {', '.join(NUMERIC_TYPES)}, not {self.type}; remove it",
                "tolerance",
            )
        return self


class ViewDefinition(Definition):
    """A feature view: its schema, and how its rows are read and published. Exports read a `source`. A streaming query
    that runs all the time reads a `stream`. A view has one of the two, or both.

    `timestamp_field` names the source's column of event times. Without it, the event time of a row is the time of the
    run that ships the row. `push_source` is the name under which Feast clients push rows to a server. `shards` is the
    number of hash ranges of an entry; the rows of each range are published in a file of their own. `tier` and `table`
    say where rows are stored for lookups. `future` says whether event times may be more than a day ahead of the run.
    `max_removed` is the share of the view's rows, and of each feature's values, that one export may remove. If it is
    None, the default of `shoal.spark_export.changes.guard` applies.
    """

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

    @classmethod
    def findings(cls, data: dict[str, Any]) -> Iterator[Finding]:
        source = data.get("source")
        stream = data.get("stream")
        if source is None and stream is None and "batch_source" not in data:
            yield Finding("a view needs a source, a stream, or both; add one")
        if stream is not None and data.get("timestamp_field") is None:
            # After a crash, events are read again and must get the same event times as before.
            yield Finding("a view with a stream needs a timestamp_field: the column of event times", ("stream",))
        yield from _doubled_columns(data)
        try:
            check_table(data.get("tier", "local"), data.get("table"))
        except ValueError as error:
            yield Finding(str(error), ("table",))

    @property
    def tolerant_features(self) -> tuple[FeatureDefinition, ...]:
        """The features that have a tolerance."""
        return tuple(feature for feature in self.features if feature.tolerance is not None)

    @property
    def schema(self) -> ViewSchema:  # type: ignore[override]  # hides a deprecated method of BaseModel
        """The schema of the view, as it is published."""
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


class ViewsFile(Definition):
    """The contents of a views.yaml file."""

    views: tuple[ViewDefinition, ...] = Field(min_length=1)
    services: tuple[FeatureService, ...] = ()

    @classmethod
    def findings(cls, data: dict[str, Any]) -> Iterator[Finding]:
        views = listed(data.get("views"))
        services = listed(data.get("services"))
        for kind, named in (("view", views), ("service", services)):
            names: set[str] = set()
            for position, one in enumerate(named):
                if isinstance(name := member(one, "name"), str):
                    if name in names:
                        yield Finding(f"{kind} {name!r} is defined twice; rename one", (f"{kind}s", position, "name"))
                    names.add(name)
        known: dict[str, set[str]] = {}
        for view in views:
            if isinstance(name := member(view, "name"), str):
                features = (str(member(feature, "name")) for feature in listed(member(view, "features")))
                known.setdefault(name, {"*"}).update(features)
        for position, service in enumerate(services):
            for number, reference in enumerate(listed(member(service, "features"))):
                if isinstance(reference, str) and (message := _unresolved(reference, known)) is not None:
                    yield Finding(message, ("services", position, "features", number))


def _doubled_columns(view: dict[str, Any]) -> Iterator[Finding]:
    """Yield a finding for each repeated column name. Letter case is ignored, because Spark ignores it too."""
    seen: set[str] = set()
    for kind in ("join_keys", "features"):
        for position, column in enumerate(listed(view.get(kind))):
            if isinstance(name := member(column, "name"), str):
                if name.lower() in seen:
                    yield Finding(f"the view has two columns {name!r}; rename one", (kind, position, "name"))
                seen.add(name.lower())


def _unresolved(reference: str, known: Mapping[str, set[str]]) -> str | None:
    """Return the error message for a reference of a feature service, or None if the reference names a feature."""
    view, colon, feature = reference.partition(":")
    if not colon:
        return None  # The pattern check of references reports a missing colon.
    if view not in known:
        return f"{reference!r} names no view of this file; it has {', '.join(known) or 'none'}"
    if feature not in known[view]:
        return f"{reference!r} names no feature of view {view!r}{closest(feature, known[view])}"
    return None


def load_views(path: str | os.PathLike[str]) -> ViewsFile:
    """Read a views.yaml; relative paths in it are relative to the file.

    Raises:
        DefinitionError: the file cannot be read, or has errors. The message has one line for each error, with the file
            and line. For invalid YAML it has only the first error.
    """
    document = YamlDocument(Path(path))
    try:
        return ViewsFile.model_validate(document.data, context={"directory": document.path.absolute().parent})
    except ValidationError as error:
        raise definition_error(document, error, _known_keys()) from None


def _known_keys() -> set[str]:
    models = (ViewsFile, ViewDefinition, JoinKey, FeatureDefinition, Source, Stream, FeatureService)
    return {key for model in models for key in model.model_fields}
