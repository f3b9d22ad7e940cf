"""Compare the answers of a Feast online store and of Shoal for the same keys and features.

Values are compared as far as both sides can represent them: Feast stores timestamps in whole seconds, has null for NaN,
and some of its stores do not distinguish an absent row from a row without values. Rows older than their TTL are
compared too, because Feast serves such rows; they are also counted. Equal values with different event times are counted
as well.
"""

import base64
import json
import math
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

import numpy as np

from shoal.engine.base.errors import (
    FeastFailed,
    LookupInvalid,
    RequestTooLarge,
    ServerFailed,
    UnknownFeature,
)
from shoal.engine.base.server_access import ServerAccess
from shoal.engine.feast.repository import failing
from shoal.engine.feature_store import FeatureStore
from shoal.engine.format.schema import FeatureService, ViewSchema, split_reference
from shoal.engine.kernels.gathering import Status
from shoal.engine.lookup.given_keys import join_key_types
from shoal.engine.status.store import describe_views

Keys = Mapping[str, list[Any]]
"""Join key → its values, as many as there are rows."""

_BATCH = 500
_TIMEOUT_SECONDS = 60
_SECOND = timedelta(seconds=1)


@dataclass(frozen=True)
class Value:
    """One value in the answer of one side."""

    value: Any
    status: str
    event_time: datetime | None


@dataclass(frozen=True)
class Difference:
    """One key and feature for which the sides do not agree."""

    key: Mapping[str, Any]
    feature: str
    feast: Value
    shoal: Value


@dataclass
class Summary:
    """The number of compared values, and the results. `missing_in_*` counts values that only the other side has. A
    value in `older_than_ttl` or `other_event_times` is counted in another member as well."""

    keys: int = 0
    compared: int = 0
    equal: int = 0
    different: int = 0
    missing_in_feast: int = 0
    missing_in_shoal: int = 0
    older_than_ttl: int = 0
    other_event_times: int = 0

    @property
    def agrees(self) -> bool:
        """Whether at least one value was compared, and all values are equal."""
        return self.compared > 0 and self.equal == self.compared


@dataclass(frozen=True)
class Description:
    """The views and feature services of a store."""

    views: Mapping[str, ViewSchema]
    services: Mapping[str, FeatureService] = field(default_factory=dict)

    def references(self, features: Sequence[str]) -> list[str]:
        """Return `view:feature` references without duplicates, with `view:*` expanded to all features of the view.

        Raises:
            LookupInvalid: a reference is malformed.
            UnknownFeature: the store does not have the view or feature.
        """
        found = []
        for reference in features:
            view, separator, name = reference.partition(":")
            if not separator:
                raise LookupInvalid(f"{reference!r} is not a feature reference; write view:feature, or view:* for all")
            if view not in self.views:
                known = ", ".join(self.views) or "none"
                raise UnknownFeature(f"Shoal has no view {view!r}; it has {known}", "view", view)
            features_of = self.views[view].feature_index
            if name != "*" and name not in features_of:
                listed = ", ".join(features_of)
                raise UnknownFeature(f"view {view!r} has no feature {name!r}; it has {listed}", "feature", name)
            found += [f"{view}:{each}" for each in features_of] if name == "*" else [reference]
        return [*dict.fromkeys(found)]

    def service(self, name: str) -> list[str]:
        """Return the references of a feature service; raise UnknownFeature if there is no such service."""
        if name not in self.services:
            known = ", ".join(self.services) or "none"
            raise UnknownFeature(f"Shoal has no feature service {name!r}; it has {known}", "service", name)
        return self.references(self.services[name].features)

    def feature_type(self, reference: str) -> str:
        """Return the type of a feature."""
        view, name = split_reference(reference)
        schema = self.views[view]
        return schema.features[schema.feature_index[name]].type

    def join_keys(self, references: Sequence[str]) -> dict[str, str]:
        """Return the join keys of the requested views, and their types; raise LookupInvalid if the types differ."""
        return join_key_types(
            self.views[view] for view in dict.fromkeys(split_reference(each)[0] for each in references)
        )


class Side(Protocol):
    """One of the two systems that are compared."""

    def answer(self, references: Sequence[str], keys: Keys) -> dict[str, list[Value]]:
        """Return one value per key for each feature."""
        ...


class StoreSide:
    """Shoal, read from a store on this machine."""

    def __init__(self, path: Path) -> None:
        """Open the store; raise StoreNotFound or StoreDamaged if it cannot be opened."""
        self.store = FeatureStore.open(path)
        self.description = _described(describe_views(self.store.version()))

    def answer(self, references: Sequence[str], keys: Keys) -> dict[str, list[Value]]:
        result = self.store.lookup(references, keys, stale="serve")
        answer = {}
        for column in result.columns:
            answers = zip(column.to_arrow().to_pylist(), column.status, column.rows.event_time.tolist(), strict=True)
            answer[column.reference] = [
                # An absent row has no event time.
                Value(value, Status(status).name, _instant(time) if status not in _WITHOUT_ROW else None)
                for value, status, time in answers
            ]
        return answer


class ServerSide:
    """Shoal, asked over HTTP."""

    def __init__(self, url: str, access: ServerAccess) -> None:
        """Request the server's views; raise ServerFailed if the server does not answer."""
        if not url.startswith(("http://", "https://")):
            raise ServerFailed(f"{url} is not the address of a server; give an address such as http://127.0.0.1:8080")
        self._url = url.rstrip("/")
        self._most_keys = _BATCH
        self._access = access
        self.description = _described(self._ask("/v1/views"))

    def answer(self, references: Sequence[str], keys: Keys) -> dict[str, list[Value]]:
        """Look keys up in batches. If the server rejects a batch as too large, halve the size of further batches."""
        answer: dict[str, list[Value]] = {reference: [] for reference in references}
        rest = {name: [*values] for name, values in keys.items()}
        while rows := len(next(iter(rest.values()))):
            asked = min(rows, self._most_keys)
            try:
                part = self._look_up(references, {name: values[:asked] for name, values in rest.items()})
            except RequestTooLarge:
                if asked == 1:
                    raise
                self._most_keys = asked // 2
                continue
            for reference in references:
                answer[reference] += part[reference]
            rest = {name: values[asked:] for name, values in rest.items()}
        return answer

    def _look_up(self, references: Sequence[str], keys: Keys) -> dict[str, list[Value]]:
        body = {"features": list(references), "entities": keys, "stale": "serve"}
        document = self._ask("/v1/lookup", body)
        answer = {}
        for reference in references:
            view = split_reference(reference)[0]
            feature_type = self.description.feature_type(reference)
            answers = zip(
                document["features"][reference],
                document["status"][view],
                document["event_timestamps"][view],
                strict=True,
            )
            answer[reference] = [
                Value(
                    _from_json(value, feature_type),
                    "NULL_VALUE" if value is None and status == "PRESENT" else status,
                    datetime.fromisoformat(time) if time is not None else None,
                )
                for value, status, time in answers
            ]
        return answer

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        address = self._url + path
        content = json.dumps(body).encode() if body is not None else None
        try:
            request = urllib.request.Request(address, content, {"Accept": "application/json"})
            self._access.show(request)
            context = self._access.tls
            # The constructor has checked that the address is http or https.
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS, context=context) as response:  # nosec B310
                return json.load(response)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            if error.code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
                raise RequestTooLarge(f"{address} rejects even a request for one key: {text}") from None
            raise ServerFailed(f"{address} answers {error.code}: {text}") from None
        except (OSError, ValueError) as error:
            raise ServerFailed(f"{address} does not answer like a Shoal server: {error}") from None


class FeastSide:
    """A Feast online store, asked by Feast itself."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def service(self, name: str) -> list[str]:
        """Return the references of a feature service; raise FeastFailed if Feast cannot read the service."""
        with failing(f"Feast cannot read the feature service {name!r}"):
            projections = self._store.get_feature_service(name).feature_view_projections
            return [f"{view.name_to_use()}:{feature.name}" for view in projections for feature in view.features]

    def answer(self, references: Sequence[str], keys: Keys) -> dict[str, list[Value]]:
        with failing("Feast's online store does not answer"):
            response = self._store.get_online_features(
                features=list(references), entity_rows=dict(keys), full_feature_names=True
            )
            values = response.to_dict()
            proto = response.proto
            vectors = dict(zip(proto.metadata.feature_names.val, proto.results, strict=True))
            names = {reference: reference.replace(":", "__") for reference in references}
            if missing := sorted(names[reference] for reference in references if names[reference] not in vectors):
                raise FeastFailed(f"Feast's answer lacks the requested feature {missing[0]}")
            return {reference: [*_feast_values(values[name], vectors[name])] for reference, name in names.items()}


def compare(
    references: Sequence[str],
    keys: Keys,
    feast: Side,
    shoal: Side,
    description: Description,
    *,
    tolerance: float = 0.0,
    summary: Summary,
) -> Iterator[Difference]:
    """Look all keys up on both sides, batch by batch, and yield each difference.

    Args:
        references: the features, as `Description.references` returns them.
        tolerance: the largest difference at which two numbers count as equal.
        summary: the counts, updated during the comparison.

    Raises:
        FeastFailed, ServerFailed, LookupInvalid: a side does not answer.
    """
    types = {reference: description.feature_type(reference) for reference in references}
    join_keys = {reference: [*description.join_keys([reference])] for reference in references}
    for batch in _batches(keys):
        count = len(next(iter(batch.values())))
        answers = feast.answer(references, batch), shoal.answer(references, batch)
        summary.keys += count
        for row in range(count):
            for reference in references:
                theirs = answers[0][reference][row]
                ours = answers[1][reference][row]
                if not _judge(theirs, ours, types[reference], tolerance, summary):
                    key = {name: batch[name][row] for name in join_keys[reference]}
                    yield Difference(key, reference, theirs, ours)


def _judge(feast: Value, shoal: Value, feature_type: str, tolerance: float, summary: Summary) -> bool:
    """Count one pair of values; return whether the values are equal."""
    summary.compared += 1
    theirs = _comparable(feast.value)
    ours = _comparable(shoal.value)
    if shoal.status == "OUTSIDE_MAX_AGE":
        summary.older_than_ttl += 1
    both = theirs is not None and ours is not None
    if (theirs is None and ours is None) or (both and _same(theirs, ours, feature_type, tolerance)):
        summary.equal += 1
        if feast.event_time and shoal.event_time and not _same_time(feast.event_time, shoal.event_time):
            summary.other_event_times += 1
        return True
    if theirs is None:
        summary.missing_in_feast += 1
    elif ours is None:
        summary.missing_in_shoal += 1
    else:
        summary.different += 1
    return False


def _comparable(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _same(feast: Any, shoal: Any, feature_type: str, tolerance: float) -> bool:
    if isinstance(shoal, list):
        if not isinstance(feast, list) or len(feast) != len(shoal):
            return False
        items = "float32" if "float32" in feature_type else feature_type
        return all(_same(theirs, ours, items, tolerance) for theirs, ours in zip(feast, shoal, strict=True))
    if isinstance(shoal, str) and isinstance(feast, dict):
        # Feast parses the value of a Json feature. For Shoal the value is text.
        return bool(_json(shoal) == feast)
    if isinstance(shoal, datetime):
        return isinstance(feast, datetime) and _same_time(feast, shoal)
    if isinstance(shoal, float) and isinstance(feast, int | float):
        if feature_type == "float32":
            feast = float(np.float32(feast))
            shoal = float(np.float32(shoal))
        return feast == shoal or abs(feast - shoal) <= tolerance or (math.isnan(feast) and math.isnan(shoal))
    if tolerance and isinstance(shoal, int) and isinstance(feast, int):
        return abs(feast - shoal) <= tolerance
    return bool(feast == shoal)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _same_time(feast: datetime, shoal: datetime) -> bool:
    """Return whether two times are equal. If Feast's time is in whole seconds, Feast may have cut off the fraction of a
    second, so a difference of less than a second counts as equal."""
    return feast == shoal or (feast.microsecond == 0 and abs(feast - shoal) < _SECOND)


def _batches(keys: Keys) -> Iterator[dict[str, list[Any]]]:
    rows = zip(*keys.values(), strict=True)
    while batch := [*islice(rows, _BATCH)]:
        yield dict(zip(keys, map(list, zip(*batch, strict=True)), strict=True))


def _described(document: Mapping[str, Any]) -> Description:
    """Return the views and services in a document of `shoal.engine.status.store.describe_views`. Leave out the TTLs,
    because the comparison does not need them."""
    views = [
        ViewSchema.model_validate({member: view[member] for member in ("name", "join_keys", "features")})
        for view in document["views"]
    ]
    services = [FeatureService.model_validate(service) for service in document["services"]]
    return Description({view.name: view for view in views}, {service.name: service for service in services})


def _instant(microseconds: int) -> datetime:
    return datetime.fromtimestamp(0, UTC) + timedelta(microseconds=microseconds)


def _from_json(value: Any, feature_type: str) -> Any:
    if value is None:
        return None
    match feature_type:
        case "bytes":
            return base64.b64decode(value)
        case "timestamp":
            return datetime.fromisoformat(value)
        case "float32" | "float64":
            return float(value)
        case _:
            return value


def _feast_values(values: Sequence[Any], vector: Any) -> Iterator[Value]:
    for row, (value, status) in enumerate(zip(values, vector.statuses, strict=True)):
        # Feast's remote store sends no event times. For an absent row, all stores send the epoch.
        seen = vector.event_timestamps[row].ToMicroseconds() if row < len(vector.event_timestamps) else 0
        yield Value(_native(value), _FEAST_STATUSES.get(status, str(status)), _instant(seen) if seen else None)


_WITHOUT_ROW = (Status.NOT_FOUND, Status.UNAVAILABLE)
_FEAST_STATUSES = {status.value: status.name for status in Status} | {0: "INVALID"}


def _native(value: Any) -> Any:
    """Convert a value of Feast's SDK to the type that Shoal uses for such values."""
    if isinstance(value, UUID | Decimal):
        return str(value)
    if isinstance(value, datetime):
        return value if value.tzinfo else value.replace(tzinfo=UTC)
    return value
