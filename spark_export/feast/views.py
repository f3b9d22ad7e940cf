"""Convert the entities, feature views and feature services of a Feast repository to a views.yaml.

Every definition that views.yaml cannot express is reported by name, with the reason and the fix.
"""

import json
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from shoal.engine.base.errors import Unmappable
from shoal.engine.feast.repository import failing
from shoal.engine.format.schema import NAME_PATTERN
from shoal.spark_export.feast.sources import Columns, UnmappableSource, map_source
from shoal.spark_export.views.definition import load_views

_NAME = re.compile(NAME_PATTERN)
_TYPES = {
    "Bool": "bool",
    "Int32": "int32",
    "Int64": "int64",
    "Float32": "float32",
    "Float64": "float64",
    "String": "string",
    "Bytes": "bytes",
    "PdfBytes": "bytes",
    "ImageBytes": "bytes",
    "UnixTimestamp": "timestamp",
    "Array(Int64)": "list<int64>",
    "Array(Float32)": "list<float32>",
    "Array(String)": "list<string>",
    "Uuid": "string",
    "TimeUuid": "string",
    "Decimal": "string",
    "Json": "string",
}
_KEY_TYPES = {"Int32": "int64", "Int64": "int64", "String": "string"}
_MENDS = {
    "Array(Int32)": "declare it Array(Int64)",
    "Array(Float64)": "declare it Array(Float32) if that is precise enough",
}


@dataclass(frozen=True)
class Loss:
    """A definition of a Feast repository that views.yaml cannot express. `reason` includes the fix."""

    kind: str
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.reason}"


@dataclass
class FeastViews:
    """The result of converting a Feast repository: the text of a views.yaml, and the definitions that it lacks."""

    text: str
    losses: list[Loss] = field(default_factory=list)

    def check_complete(self, accepted: Collection[str]) -> None:
        """Raise Unmappable if a definition could not be converted and its name is not in `accepted`."""
        losses = [loss for loss in self.losses if loss.name not in accepted]
        if losses:
            raise Unmappable(
                f"{len(losses)} definitions of the Feast repository cannot be expressed in views.yaml; change them in "
                f"Feast, or leave out each with --skip NAME, or all with --skip-unmappable:\n"
                + "\n".join(f"  {loss}" for loss in losses)
            )


def feast_views(store: Any, origin: str, *, cast: bool = False) -> FeastViews:
    """Convert everything that is applied in a Feast repository to a views.yaml.

    Args:
        store: the repository, as a `feast.FeatureStore`.
        origin: the location of the repository, for the first lines of the file.
        cast: see `shoal.spark_export.feast.sources.map_source`.

    Raises:
        FeastFailed: the registry cannot be read.
        Unmappable: no view of the repository can be converted.
        DefinitionError: the result is not a valid views.yaml.
    """
    with failing("Feast's registry cannot be read"):
        mapping = _Mapping(store, cast=cast)
        mapping.map_views()
        mapping.map_services()
    made = FeastViews(_text(mapping, origin), mapping.losses)
    if not mapping.views:
        raise Unmappable(
            f"project {mapping.project!r} of {origin} has no feature view that views.yaml can express; run `feast "
            f"apply` if nothing was applied yet" + "".join(f"\n  {loss}" for loss in mapping.losses)
        )
    _check(made.text)
    return made


class _Mapping:
    """The converted views and services of a repository, in alphabetical order, and the losses."""

    def __init__(self, store: Any, *, cast: bool) -> None:
        self.project = str(store.project)
        self.views: dict[str, dict[str, Any]] = {}
        self.services: dict[str, list[str]] = {}
        self.notes: dict[str, list[str]] = {}
        self.losses: list[Loss] = []
        self._store = store
        self._repository = Path(store.config.repo_path) if store.config.repo_path else None
        self._cast = cast

    def map_views(self) -> None:
        store = self._store
        for view in _by_name([*store.list_feature_views(), *store.list_stream_feature_views()]):
            if not view.online or not getattr(view, "enabled", True):
                self._note(view.name, f"feature view {view.name} is not served online in Feast: left out")
                continue
            reason = _not_a_view(view)
            if reason is None:
                try:
                    self._map_view(view)
                except UnmappableSource as error:
                    reason = str(error)
            if reason is not None:
                self._lose("feature view", view.name, reason)
        for view in _by_name(store.list_on_demand_feature_views()):
            self._lose(
                "on-demand feature view",
                view.name,
                "Shoal does not compute features during a lookup; compute them in the source of a feature view, or in "
                "the client",
            )
        for view in _by_name(store.list_label_views() if hasattr(store, "list_label_views") else ()):
            self._lose("label view", view.name, "Shoal does not serve labels; serve them with Feast")

    def map_services(self) -> None:
        for service in _by_name(self._store.list_feature_services()):
            references = [*dict.fromkeys(self._references(service))]
            if not _NAME.fullmatch(service.name):
                self._lose(_SERVICE, service.name, _BAD_NAME)
            elif references:
                self.services[service.name] = references
            else:
                self._lose(_SERVICE, service.name, "none of its features can be converted; see the views it refers to")

    def _map_view(self, view: Any) -> None:
        keys = {}
        for column in view.entity_columns:
            declared = str(column.dtype)
            if declared not in _KEY_TYPES or not _NAME.fullmatch(column.name):
                raise UnmappableSource(
                    f"its join key {column.name!r} is of type {declared}; a join key must be String, Int64 or Int32, "
                    f"and its name a letter, then letters, digits and underscores"
                )
            keys[column.name] = _KEY_TYPES[declared]
        features: dict[str, str] = {}
        for column in view.features:
            reason = _not_a_feature(column, [*keys, *features])
            if reason is None:
                features[column.name] = _feature_type(column)
            else:
                self._lose("feature", f"{view.name}:{column.name}", reason)
        if not features:
            raise UnmappableSource("none of its features can be converted; see the reason for each feature")
        source = view.batch_source
        timestamp = view.batch_source.timestamp_field or None
        types = keys | features | ({timestamp: "timestamp"} if timestamp else {})
        mapped = map_source(source, Columns(types, tuple(keys), timestamp), self._repository, cast=self._cast)
        self.views[view.name] = {
            "join_keys": keys,
            "features": features,
            "timestamp_field": timestamp,
            "ttl": _duration(view.ttl),
            "push_source": None,
            "source": mapped,
        }
        stream = getattr(view, "stream_source", None)
        if stream is not None and type(stream).__name__ == "PushSource":
            self.views[view.name]["push_source"] = stream.name
        elif stream is not None:
            kind = type(stream).__name__
            self._note(view.name, f"its {kind} {stream.name} is not read, only its batch source")
        endpoint = getattr(source, "s3_endpoint_override", None)
        if endpoint:
            self._note(view.name, f"Feast reads it from {endpoint}: set Spark's spark.hadoop.fs.s3a.endpoint")

    def _references(self, service: Any) -> Iterator[str]:
        for projection in service.feature_view_projections:
            alias = projection.name_alias
            if (alias and alias != projection.name) or projection.join_key_map:
                self._lose(
                    _SERVICE,
                    service.name,
                    f"it uses view {projection.name} under another name or with other join keys, but Shoal does not "
                    f"support this; look the view up in a separate request, with the view's own join keys",
                )
                continue
            view = self.views.get(projection.name)
            for feature in projection.features:
                if view is not None and feature.name in view["features"]:
                    yield f"{projection.name}:{feature.name}"
                else:
                    reference = f"{projection.name}:{feature.name}"
                    self._lose(_SERVICE, service.name, f"its feature {reference} was not converted")

    def _lose(self, kind: str, name: str, reason: str) -> None:
        self.losses.append(Loss(kind, name, reason))

    def _note(self, view: str, text: str) -> None:
        self.notes.setdefault(view, []).append(text)


_SERVICE = "feature service"
_BAD_NAME = "a name must be a letter, then letters, digits and underscores, at most 128 characters; rename it"


def _by_name(objects: Iterable[Any]) -> list[Any]:
    return sorted(objects, key=lambda named: str(named.name))


def _not_a_view(view: Any) -> str | None:
    """Return the reason why a feature view cannot be converted. Do not check its columns and its source."""
    if not _NAME.fullmatch(view.name):
        return _BAD_NAME
    if not view.entity_columns:
        return "it has no entity, but Shoal finds rows by a key; give it a key that is the same in every row"
    if view.batch_source is None:
        return "it has no batch source for an export to read; give it one"
    computed = ("udf", "aggregations", "feature_transformation", "source_views")
    if any(getattr(view, member, None) for member in computed):
        return "Feast computes its features from its source; write the features to a table, and make it a view's source"
    return None


def _not_a_feature(column: Any, others: list[str]) -> str | None:
    """Return the reason why a feature cannot be converted."""
    declared = str(column.dtype)
    if not _NAME.fullmatch(column.name):
        return _BAD_NAME
    if column.name.lower() in (other.lower() for other in others):
        return "another column has the same name except for letter case, and Spark ignores letter case; rename it"
    if declared not in _TYPES:
        mend = _MENDS.get(declared, "flatten it into features, or keep it as a String")
        return f"Shoal has no type for {declared}; {mend}"
    return None


def _feature_type(column: Any) -> str:
    length = getattr(column, "vector_length", 0)
    if str(column.dtype) == "Array(Float32)" and getattr(column, "vector_index", False) and length:
        return f"float32[{length}]"
    return _TYPES[str(column.dtype)]


def _duration(ttl: timedelta | None) -> str | None:
    """Return a time to live in the notation of views.yaml, with fractions of a second rounded up. Return None if rows
    have no time to live; Feast writes this as None or zero."""
    seconds = ttl // timedelta(seconds=1) + (ttl % timedelta(seconds=1) > timedelta(0)) if ttl else 0
    if seconds <= 0:
        return None
    units = (("w", 604800), ("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
    exact = next((seconds // length, unit) for unit, length in units if seconds % length == 0)
    # A number in views.yaml has at most seven digits. A longer time to live is rounded up to a larger unit.
    rounded = ((-(-seconds // length), unit) for unit, length in reversed(units))
    count, unit = next(((count, unit) for count, unit in (exact, *rounded) if count < 10**7), (10**7 - 1, "w"))
    return f"{count}{unit}"


def _text(mapping: _Mapping, origin: str) -> str:
    lines = [
        f"# Made by `shoal feast-views` of project {mapping.project} of the Feast repository {origin}.",
        "# Until a `feast apply` changes the repository, the command makes the same file again.",
    ]
    if mapping.losses:
        lines += ["#", "# Left out, because views.yaml cannot express it:", *(f"#   {loss}" for loss in mapping.losses)]
    lines.append("views:")
    for name in sorted({*mapping.views, *mapping.notes}):
        lines += [f"  # {note}" for note in mapping.notes.get(name, ())]
        if name in mapping.views:
            lines += _view_lines(name, mapping.views[name])
    if mapping.services:
        lines.append("services:")
    for name, references in mapping.services.items():
        lines += [f"  - name: {_scalar(name)}", "    features:", *(f"      - {_scalar(part)}" for part in references)]
    return "\n".join(lines) + "\n"


def _view_lines(name: str, view: Mapping[str, Any]) -> Iterator[str]:
    yield f"  - name: {_scalar(name)}"
    for member in ("join_keys", "features"):
        yield f"    {member}:"
        yield from (
            f"      - {{name: {_scalar(column)}, type: {_scalar(type_name)}}}"
            for column, type_name in view[member].items()
        )
    for member in ("timestamp_field", "ttl", "push_source"):
        if view[member] is not None:
            yield f"    {member}: {_scalar(view[member])}"
    yield "    source:"
    for member, value in view["source"].items():
        yield f"      {member}: {json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else _scalar(value)}"


_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[1-9][0-9]*[smhdw]")
_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def _scalar(text: str) -> str:
    """Return a string in YAML. It is quoted, as in JSON, unless it is a word that YAML always reads as a string."""
    plain = _PLAIN.fullmatch(text) and text.lower() not in _WORDS
    return text if plain else json.dumps(text, ensure_ascii=False)


def _check(text: str) -> None:
    """Check the text of a views.yaml by loading it as the exporter does; raise DefinitionError if it is invalid."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "views.yaml"
        path.write_text(text)
        load_views(path)


def write_views(made: FeastViews, path: Path) -> None:
    """Write a views.yaml to a file atomically. Raise OSError if that fails."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(made.text)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
