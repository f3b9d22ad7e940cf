"""views.yaml from a Feast repository: entities, feature views and feature services, as far as they have a counterpart.

What has none is told by name, with what to do about it; nothing is left out in silence.
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

from engine.errors import Unmappable
from engine.feast_repository import failing
from engine.schema import NAME_PATTERN
from spark_export.feast_sources import Columns, UnmappableSource, map_source
from spark_export.views import load_views

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
    """Something of a Feast repository, of some kind and name, that views.yaml cannot say; and why, with the mend."""

    kind: str
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.reason}"


@dataclass
class FeastViews:
    """What was made of a Feast repository: the text of a views.yaml, and what it could not take over."""

    text: str
    losses: list[Loss] = field(default_factory=list)

    def check_complete(self, accepted: Collection[str]) -> None:
        """Raises Unmappable if anything could not be taken over but what has one of the names that are accepted."""
        losses = [loss for loss in self.losses if loss.name not in accepted]
        if losses:
            raise Unmappable(
                f"{len(losses)} things of the Feast repository cannot be said in views.yaml; mend them there, or leave "
                f"each out with --skip NAME, or all with --skip-unmappable:\n"
                + "\n".join(f"  {loss}" for loss in losses)
            )


def feast_views(store: Any, origin: str, *, cast: bool = False) -> FeastViews:
    """Make a views.yaml of all that is applied in a Feast repository.

    Args:
        store: the repository, as a `feast.FeatureStore`.
        origin: where it is, for the file's first lines.
        cast: see `spark_export.feast_sources.map_source`.

    Raises:
        FeastFailed: the registry cannot be read.
        Unmappable: it has no view at all that can be taken over.
        DefinitionError: the result is no valid views.yaml after all.
    """
    with failing("Feast's registry cannot be read"):
        mapping = _Mapping(store, cast=cast)
        mapping.map_views()
        mapping.map_services()
    made = FeastViews(_text(mapping, origin), mapping.losses)
    if not mapping.views:
        raise Unmappable(
            f"project {mapping.project!r} of {origin} has no feature view that views.yaml can say; run `feast apply` "
            f"if nothing was applied yet" + "".join(f"\n  {loss}" for loss in mapping.losses)
        )
    _check(made.text)
    return made


class _Mapping:
    """What is made of a repository, name by name in alphabetical order."""

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
                "Shoal computes nothing when it answers; compute its features in the source of a feature view, or in "
                "the client",
            )
        for view in _by_name(store.list_label_views() if hasattr(store, "list_label_views") else ()):
            self._lose("label view", view.name, "labels are not served; leave it to Feast")

    def map_services(self) -> None:
        for service in _by_name(self._store.list_feature_services()):
            references = [*dict.fromkeys(self._references(service))]
            if not _NAME.fullmatch(service.name):
                self._lose(_SERVICE, service.name, _BAD_NAME)
            elif references:
                self.services[service.name] = references
            else:
                self._lose(_SERVICE, service.name, "none of its features can be taken over; see there")

    def _map_view(self, view: Any) -> None:
        keys = {}
        for column in view.entity_columns:
            declared = str(column.dtype)
            if declared not in _KEY_TYPES or not _NAME.fullmatch(column.name):
                raise UnmappableSource(
                    f"its join key {column.name!r} is of type {declared}; join keys are String, Int64 or Int32, under "
                    f"a name of letters, digits and underscores"
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
            raise UnmappableSource("none of its features can be taken over; see there")
        source, timestamp = view.batch_source, view.batch_source.timestamp_field or None
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
            self._note(view.name, f"what arrives by its {kind} {stream.name} is not followed, only its batch source is")
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
                    f"it names view {projection.name} under another name or other join keys, which Shoal cannot; ask "
                    f"for it in a lookup of its own, with the keys under the view's own names",
                )
                continue
            view = self.views.get(projection.name)
            for feature in projection.features:
                if view is not None and feature.name in view["features"]:
                    yield f"{projection.name}:{feature.name}"
                else:
                    reference = f"{projection.name}:{feature.name}"
                    self._lose(_SERVICE, service.name, f"{reference} is not among what is taken over")

    def _lose(self, kind: str, name: str, reason: str) -> None:
        self.losses.append(Loss(kind, name, reason))

    def _note(self, view: str, text: str) -> None:
        self.notes.setdefault(view, []).append(text)


_SERVICE = "feature service"
_BAD_NAME = "names are a letter, then letters, digits and underscores, at most 128; rename it"


def _by_name(objects: Iterable[Any]) -> list[Any]:
    return sorted(objects, key=lambda named: str(named.name))


def _not_a_view(view: Any) -> str | None:
    """Why a feature view has no counterpart, whatever its columns and its source are."""
    if not _NAME.fullmatch(view.name):
        return _BAD_NAME
    if not view.entity_columns:
        return "it has no entity, and Shoal finds rows by a key; give it a key that is the same in every row"
    if view.batch_source is None:
        return "it has no batch source, from which an export could read it; give it one"
    computed = ("udf", "aggregations", "feature_transformation", "source_views")
    if any(getattr(view, member, None) for member in computed):
        return "Feast computes its features from its source; write them to a table, and make a view of that"
    return None


def _not_a_feature(column: Any, others: list[str]) -> str | None:
    """Why a feature has no counterpart."""
    declared = str(column.dtype)
    if not _NAME.fullmatch(column.name):
        return _BAD_NAME
    if column.name.lower() in (other.lower() for other in others):
        return "another column has this name but for letter case, by which Spark does not tell columns apart; rename it"
    if declared not in _TYPES:
        mend = _MENDS.get(declared, "flatten it into features, or keep it as a String")
        return f"there is no type for {declared}; {mend}"
    return None


def _feature_type(column: Any) -> str:
    length = getattr(column, "vector_length", 0)
    if str(column.dtype) == "Array(Float32)" and getattr(column, "vector_index", False) and length:
        return f"float32[{length}]"
    return _TYPES[str(column.dtype)]


def _duration(ttl: timedelta | None) -> str | None:
    """A time to live as views.yaml says it. Feast has none and zero for "any age"; fractions of a second round up."""
    seconds = ttl // timedelta(seconds=1) + (ttl % timedelta(seconds=1) > timedelta(0)) if ttl else 0
    if seconds <= 0:
        return None
    units = (("w", 604800), ("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
    exact = next((seconds // length, unit) for unit, length in units if seconds % length == 0)
    # A number in views.yaml has at most seven digits; a longer time to live is rounded up to a unit in which it has.
    rounded = ((-(-seconds // length), unit) for unit, length in reversed(units))
    count, unit = next(((count, unit) for count, unit in (exact, *rounded) if count < 10**7), (10**7 - 1, "w"))
    return f"{count}{unit}"


def _text(mapping: _Mapping, origin: str) -> str:
    lines = [
        f"# Made by `shoal feast-views` of project {mapping.project} of the Feast repository {origin}.",
        "# Made again, it is the same as long as nothing is applied there that changes it.",
    ]
    if mapping.losses:
        lines += ["#", "# Left out, because it has no counterpart:", *(f"#   {loss}" for loss in mapping.losses)]
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
        yield from (f"      - {{name: {_scalar(column)}, type: {_scalar(of)}}}" for column, of in view[member].items())
    for member in ("timestamp_field", "ttl", "push_source"):
        if view[member] is not None:
            yield f"    {member}: {_scalar(view[member])}"
    yield "    source:"
    for member, value in view["source"].items():
        yield f"      {member}: {json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else _scalar(value)}"


_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[1-9][0-9]*[smhdw]")
_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def _scalar(text: str) -> str:
    """A string in YAML, quoted unless it is a word that can mean nothing else. JSON's quoting is YAML's too."""
    plain = _PLAIN.fullmatch(text) and text.lower() not in _WORDS
    return text if plain else json.dumps(text, ensure_ascii=False)


def _check(text: str) -> None:
    """Read it as the exporter will."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "views.yaml"
        path.write_text(text)
        load_views(path)


def write_views(made: FeastViews, path: Path) -> None:
    """Write it to a file, whole or not at all; raises OSError."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(made.text)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
