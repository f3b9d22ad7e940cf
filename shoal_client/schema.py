"""What a client of shards has to know of the store: the views' join keys and features, and the feature services."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal_client.errors import AnswerInvalid, RequestInvalid, UnknownFeature
from shoal_client.wire import Columns


@dataclass(frozen=True)
class View:
    """A view: its join keys and features with their types, in order, and what pushes may call the event time."""

    name: str
    join_keys: tuple[tuple[str, str], ...]
    features: Mapping[str, str]
    timestamp_field: str | None


@dataclass(frozen=True)
class Schema:
    """The views and feature services as a server told them at `learned`, by `time.monotonic`."""

    views: Mapping[str, View]
    services: Mapping[str, tuple[str, ...]]
    learned: float

    @classmethod
    def read(cls, document: Any, learned: float) -> "Schema":
        """The schema in the document of /v1/views; raises AnswerInvalid."""
        try:
            views = {
                view["name"]: View(
                    view["name"],
                    tuple((key["name"], key["type"]) for key in view["join_keys"]),
                    {feature["name"]: feature["type"] for feature in view["features"]},
                    view["timestamp_field"],
                )
                for view in document["views"]
            }
            services = {service["name"]: tuple(service["features"]) for service in document["services"]}
        except (LookupError, TypeError) as error:
            raise AnswerInvalid(f"what /v1/views said cannot be read: {error!r}") from None
        return cls(views, services, learned)

    def view(self, name: str) -> View:
        """One view; raises UnknownFeature."""
        try:
            return self.views[name]
        except KeyError:
            known = ", ".join(sorted(self.views)) or "none"
            raise _unknown(f"the shards have no view {name!r}; they have {known}") from None

    def references(self, features: str | Sequence[str]) -> list[str]:
        """The `view:feature` references that a request means; raises UnknownFeature."""
        if isinstance(features, str):
            if features not in self.services:
                known = ", ".join(sorted(self.services)) or "none"
                raise _unknown(f"the shards have no feature service {features!r}; they have {known}")
            features = self.services[features]
        references: list[str] = []
        for reference in features:
            view, _, feature = reference.partition(":")
            known_features = self.view(view).features
            if feature == "*":
                references += [f"{view}:{name}" for name in known_features]
            elif feature in known_features:
                references.append(reference)
            else:
                raise _unknown(f"view {view!r} has no feature {feature!r}; it has {', '.join(known_features)}")
        if not references:
            raise RequestInvalid("no features were asked for; name some as view:feature, or a feature service")
        return references

    def width(self, reference: str) -> int:
        """How many columns of a matrix a feature takes."""
        kind = self._type(reference)
        return int(kind[kind.index("[") + 1 : -1]) if kind.endswith("]") else 1

    def is_double(self, references: Sequence[str]) -> bool:
        """Whether a matrix of features is one of float64."""
        kinds = (self._type(reference) for reference in references)
        return not all(kind in ("float32", "bool") or kind.endswith("]") for kind in kinds)

    def _type(self, reference: str) -> str:
        view, _, feature = reference.partition(":")
        return self.view(view).features[feature]


def _unknown(message: str) -> UnknownFeature:
    return UnknownFeature(message, code="UnknownFeature", status=404)


def is_scalar(values: Any) -> bool:
    """Whether an entity is one value for all rows."""
    return isinstance(values, str | bytes) or not hasattr(values, "__len__")


def count_rows(entities: Columns) -> int:
    """How many rows a request has; raises RequestInvalid if columns are of different lengths."""
    lengths = {name: len(values) for name, values in entities.items() if not is_scalar(values)}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name!r} has {length} values" for name, length in lengths.items())
        raise RequestInvalid(f"{told}; lists must be of one length (a scalar is repeated)")
    return next(iter(lengths.values()), 1)


def as_list(values: Any) -> list[Any]:
    """A column's values as Python objects."""
    if isinstance(values, list):
        return values
    for method in ("to_pylist", "tolist"):
        if hasattr(values, method):
            return list(getattr(values, method)())
    return list(values)
