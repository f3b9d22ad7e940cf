"""The schema that a client of shards needs: the views' join keys and features, and the feature services."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.client.errors import AnswerInvalid, RequestInvalid, UnknownFeature
from shoal.client.wire import split_reference

_KEY_TYPES = {"string", "int64"}
_EMBEDDING = re.compile(r"float32\[([0-9]{1,9})\]")


@dataclass(frozen=True)
class View:
    """A view: its join keys and features with their types, in order, and the view's own name for the event time column
    in pushes."""

    name: str
    join_keys: tuple[tuple[str, str], ...]
    features: Mapping[str, str]
    timestamp_field: str | None


@dataclass(frozen=True)
class Schema:
    """The views and feature services that a server returned at the time `learned` of `time.monotonic`."""

    views: Mapping[str, View]
    services: Mapping[str, tuple[str, ...]]
    learned: float

    @classmethod
    def read(cls, document: Any, learned: float) -> "Schema":
        """Parse the document of /v1/views; raise AnswerInvalid if the document is invalid."""
        try:
            views = {view.name: view for view in map(_view, _list(document["views"]))}
            services = {
                _text(service["name"]): tuple(map(_text, _list(service["features"])))
                for service in _list(document["services"])
            }
        except (LookupError, TypeError, ValueError) as error:
            raise AnswerInvalid(f"the schema of /v1/views cannot be read: {type(error).__name__}: {error}") from None
        return cls(views, services, learned)

    def view(self, name: str) -> View:
        """Return one view; raise UnknownFeature if there is no such view."""
        try:
            return self.views[name]
        except KeyError:
            known = ", ".join(sorted(self.views)) or "none"
            raise _unknown(f"the shards have no view {name!r}; they have {known}") from None

    def references(self, features: str | Sequence[str]) -> list[str]:
        """Return the `view:feature` references of a request; raise UnknownFeature if one of them does not exist."""
        if isinstance(features, str):
            if features not in self.services:
                known = ", ".join(sorted(self.services)) or "none"
                raise _unknown(f"the shards have no feature service {features!r}; they have {known}")
            features = self.services[features]
        references: list[str] = []
        for reference in features:
            view, feature = split_reference(reference)
            known_features = self.view(view).features
            if feature == "*":
                references += [f"{view}:{name}" for name in known_features]
            elif feature in known_features:
                references.append(reference)
            else:
                raise _unknown(f"view {view!r} has no feature {feature!r}; it has {', '.join(known_features)}")
        if not references:
            raise RequestInvalid("no features were requested; name some as view:feature, or a feature service")
        return references

    def width(self, reference: str) -> int:
        """Return the number of columns that a feature has in a matrix."""
        embedding = _EMBEDDING.fullmatch(self._type(reference))
        return int(embedding[1]) if embedding else 1

    def is_double(self, references: Sequence[str]) -> bool:
        """Return whether a matrix of these features has the type float64."""
        kinds = (self._type(reference) for reference in references)
        return not all(kind in ("float32", "bool") or _EMBEDDING.fullmatch(kind) for kind in kinds)

    def _type(self, reference: str) -> str:
        view, feature = split_reference(reference)
        return self.view(view).features[feature]


def _unknown(message: str) -> UnknownFeature:
    return UnknownFeature(message, code="UnknownFeature", status=404)


def _view(document: Any) -> View:
    join_keys = tuple((_text(key["name"]), _text(key["type"])) for key in _list(document["join_keys"]))
    if not join_keys or not {kind for _, kind in join_keys} <= _KEY_TYPES:
        raise ValueError(f"the join keys are {document['join_keys']!r}")
    own = document["timestamp_field"]
    return View(
        _text(document["name"]),
        join_keys,
        {_text(feature["name"]): _text(feature["type"]) for feature in _list(document["features"])},
        None if own is None else _text(own),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is not a list")
    return value
