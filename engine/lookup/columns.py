"""Answer a lookup from one version of the store: resolve the features, hash the keys, find the rows, check the ages of
the rows, and gather their values.

This module does no Python work per value and never waits. A lookup reads one version only, and its result owns its
memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from shoal.engine.base.errors import (
    LOAD_AGAIN,
    LookupInvalid,
    RequestTooLarge,
    StaleFeatures,
    UnknownFeature,
    ViewDamaged,
)
from shoal.engine.base.times import time_before
from shoal.engine.format.layout import item_width
from shoal.engine.format.schema import Feature, embedding_size, split_reference
from shoal.engine.kernels import answering, finding, gathering
from shoal.engine.kernels.memory import address_of
from shoal.engine.lookup.allowance import UNLIMITED, Allowance
from shoal.engine.lookup.arguments import as_features, not_features
from shoal.engine.lookup.key_columns import Entities, Hashes, Incomplete, KeyColumns
from shoal.engine.lookup.remote_rows import (
    Fetched,
    Partial,
    check_partial,
    mark_unavailable,
    with_rows,
)
from shoal.engine.lookup.result import HeapValues, LookupResult, ViewColumns
from shoal.engine.lookup.result_column import ViewRows
from shoal.engine.store.version import LookupPlan, StoreVersion, ViewVersion, remembered

Stale = Literal["serve", "null", "fail"]
"""The treatment of rows that are older than the accepted age: serve them, return null, or fail the lookup."""

_STALE = get_args(Stale)
_MAX_HEAP_BYTES = 2**31 - 1

MAX_FEATURES = 10_000
"""The maximum number of features in a request. The limit bounds memory: the plan of a request has data for each
feature, and is kept for later requests for the same features."""


@dataclass(frozen=True)
class FoundRows:
    """The addresses of the rows of all keys: see `shoal.engine.kernels.finding.find`."""

    address: npt.NDArray[np.int64]
    chunk: npt.NDArray[np.int64]


def resolve_features(version: StoreVersion, features: str | Sequence[str]) -> list[str]:
    """Return the `view:feature` references of a request, from the name of a feature service (a str), or from a list of
    references. In a list, `view:*` means all features of a view.

    Raises:
        UnknownFeature: the store has no such feature service or view.
        LookupInvalid: the list is empty, or a reference is not of the form `view:feature`.
        RequestTooLarge: there are more references than MAX_FEATURES.
    """
    if isinstance(features, str):
        service = version.services.get(features)
        if service is None:
            known = ", ".join(sorted(version.services)) or "none"
            message = f"the store has no feature service {features!r}; it has {known}"
            raise UnknownFeature(message, "service", features)
        features = service.features
    references: list[str] = []
    if len(features) > MAX_FEATURES:
        raise _too_many_features(len(features))
    for reference in features:
        if not isinstance(reference, str):
            raise not_features(features)
        view, name = split_reference(reference)
        if not view or not name:
            raise LookupInvalid(f"{reference!r} is not a feature reference; write view:feature, or view:* for all")
        if name == "*":
            references += [f"{view}:{feature.name}" for feature in version.view(view).record.view_schema.features]
        else:
            references.append(reference)
        if len(references) > MAX_FEATURES:
            raise _too_many_features(len(references))
    if not references:
        raise LookupInvalid("the request names no features; name some as view:feature, or a feature service")
    return references


def _too_many_features(count: int) -> RequestTooLarge:
    return RequestTooLarge(
        f"the request names at least {count} features, but a request may name at most {MAX_FEATURES}; split the request"
    )


def check_values(keys: int, values_per_key: int, max_values: int | None) -> None:
    """Raise RequestTooLarge if an answer would hold more values than `max_values`."""
    if max_values is not None and keys * values_per_key > max_values:
        raise RequestTooLarge(
            f"{keys} keys with {values_per_key} values each are {keys * values_per_key} values, but an answer may hold "
            f"at most {max_values}; split the request, or raise the server's max_values"
        )


def lookup(
    version: StoreVersion,
    features: str | Sequence[str],
    entities: Entities,
    *,
    now: int,
    max_age: timedelta | None = None,
    stale: Stale = "null",
    incomplete: Incomplete = "fail",
    max_values: int | None = None,
    max_bytes: int | None = None,
    fetched: Fetched | None = None,
    partial: Partial = "serve",
) -> LookupResult:
    """Look up features of many keys in one version of the store.

    Args:
        features: references, or a feature service's name (see `resolve_features`).
        entities: the join keys. All lists have the same length, which is the number of rows of the answer.
        now: the current time in microseconds since 1970, from which ages are computed.
        max_age: the age that the caller accepts, instead of each view's TTL.
        stale: how to treat rows that are older than the accepted age.
        incomplete: how to treat keys with a part that is null or missing.
        max_values: the maximum number of values in the answer; no limit if None.
        max_bytes: the maximum size of the gathered answer in bytes; no limit if None.
        fetched: the fetched rows of remote views (see `remote_views`).
        partial: what to do if rows of remote views did not arrive in time.

    Raises:
        LookupInvalid, UnknownFeature: the request does not fit the store.
        KeyOutsideShard: the store is a shard, and some keys belong to another shard.
        RequestTooLarge: the request exceeds the limit on values, bytes or features.
        StaleFeatures: rows are older than accepted, and `stale` is "fail".
        RowsUnavailable: rows did not arrive in time, and `partial` is "fail".
    """
    check_stale(stale)
    if partial != "serve":
        check_partial(partial)
    plan = _plan(version, features)
    keys = KeyColumns(entities, incomplete)
    check_values(keys.count, plan.values_per_key, max_values)
    parts = []
    allowance = Allowance(max_bytes)
    for view_name, names in plan.features.items():
        view = version.view(view_name)
        oldest = oldest_accepted(view, now, max_age)
        unavailable = None
        if view.is_remote:
            view, unavailable = with_rows(view, fetched, keys.count)
        part = read_columns(view, names, keys.hashes(view), oldest=oldest, stale=stale, allowance=allowance)
        if unavailable is not None:
            mark_unavailable(view, unavailable, part.rows.status, part.value_counts, len(names), partial)
        parts.append(part)
    return LookupResult(version=version.id, keys=keys.count, parts=parts, plan=plan)


def check_stale(stale: Stale) -> None:
    """Raise LookupInvalid if `stale` is not one of: serve, null, fail."""
    if stale not in _STALE:
        raise LookupInvalid(f"stale is {stale!r}; it must be one of {', '.join(_STALE)}")


def oldest_accepted(view: ViewVersion, now: int, max_age: timedelta | None) -> int:
    """Return the earliest accepted event time, in microseconds since 1970."""
    age = view.ttl if max_age is None else max_age // timedelta(microseconds=1)
    return gathering.NO_EVENT_TIME if age is None else time_before(now, age)


def refuse_stale(view: ViewVersion, too_old: int, keys: int) -> StaleFeatures:
    """Return the error of a lookup that fails because `too_old` of its rows are too old."""
    return StaleFeatures(
        f"{too_old} of {keys} rows of view {view.name!r} are older than the accepted age; raise max_age, or set "
        f"stale to serve or null"
    )


def remote_views(version: StoreVersion, features: str | Sequence[str]) -> list[ViewVersion]:
    """Return the remote views of a request. The rows of these views must be fetched before the lookup. Raise as
    `lookup` does."""
    if not version.has_remote_views:
        return []
    views = (version.view(name) for name in _plan(version, features).features)
    return [view for view in views if view.is_remote]


def _plan(version: StoreVersion, features: str | Sequence[str]) -> LookupPlan:
    """Return the plan of a request. The plan is made once per version, for all requests with the same features."""
    asked = as_features(features)
    return remembered(version.plans, asked, lambda: _make_plan(version, resolve_features(version, features)))


def _make_plan(version: StoreVersion, references: Sequence[str]) -> LookupPlan:
    names: dict[str, list[str]] = {}
    places = []
    for reference in references:
        view, name = split_reference(reference)
        of_view = names.setdefault(view, [])
        places.append((view, len(of_view)))
        of_view.append(name)
    part_of = {view: part for part, view in enumerate(names)}
    order = tuple((part_of[view], column) for view, column in places)
    features = (version.view(view).feature(name) for view, of_view in names.items() for name in of_view)
    widths = (embedding_size(feature.type) or 1 for feature in features)
    return LookupPlan(
        tuple(references),
        {view: tuple(of_view) for view, of_view in names.items()},
        order,
        values_per_key=sum(widths),
        applied=version.applied(names),
    )


def find_rows(view: ViewVersion, hashes: Hashes) -> FoundRows:
    """Find the newest row of every key in a view."""
    address, chunk = np.empty_like(hashes)
    finding.find(hashes[0], hashes[1], view.chunks, view.segment_starts, address, chunk)
    return FoundRows(address, chunk)


def read_columns(
    view: ViewVersion,
    names: tuple[str, ...],
    hashes: Hashes,
    *,
    oldest: int,
    stale: Stale,
    allowance: Allowance = UNLIMITED,
) -> ViewColumns:
    """Read features of the keys with the given hashes.

    Raises:
        UnknownFeature: the view has no such feature.
        RequestTooLarge: the values exceed the `allowance`, or the texts, bytes and lists exceed 2 GiB.
        StaleFeatures: rows are older than `oldest` (microseconds since 1970), and `stale` is "fail".
    """
    program = view.program(names)
    features = len(program.features)
    keys = hashes.shape[1]
    allowance.take(size := program.arena_size(keys))
    arena = np.empty(size, np.uint8)
    status = np.empty(keys, np.uint8)
    event_time = np.empty(keys, np.int64)
    valid = np.empty((features, keys), np.uint8)
    nulls, starts = np.empty((2, features), np.int64)
    counts = np.empty(gathering.STATUSES, np.int64)
    too_old = answering.answer_columns(
        hashes[0],
        hashes[1],
        view.chunks,
        view.segment_starts,
        view.zero_row,
        oldest,
        view.low_watermark,
        stale == "serve",
        status,
        event_time,
        program.instructions,
        program.presence,
        program.same_layout,
        program.outputs,
        arena,
        starts,
        valid,
        nulls,
        counts,
    )
    if too_old and stale == "fail":
        raise refuse_stale(view, too_old, keys)
    heap: dict[int, HeapValues] = {}
    room = _MAX_HEAP_BYTES
    for index in program.in_heap:
        references = address_of(arena) + int(starts[index])
        heap[index] = _copy_from_heap(view, program.features[index], references, valid[index], room, allowance)
        room -= heap[index].data.size
    rows = ViewRows(view.name, status, event_time)
    return ViewColumns(rows, program, arena, starts, valid, nulls, counts, heap)


def _copy_from_heap(
    view: ViewVersion,
    feature: Feature,
    references: int,
    valid: npt.NDArray[np.uint8],
    room: int,
    allowance: Allowance,
) -> HeapValues:
    """Copy the values of a feature out of the heap. `references` is the address of the feature's gathered column. The
    values must fit into `room` bytes and into the allowance."""
    offsets = np.empty(valid.size + 1, np.int64)
    size = gathering.heap_offsets(references, valid, offsets, item_width(feature.type))
    if size == gathering.MISFIT:
        raise _misfit(view, feature)
    if size > room:
        raise RequestTooLarge(
            f"the values of feature {feature.name!r} need {size} more bytes, but an answer may hold at most 2 GiB of "
            f"texts, bytes and lists of a view; split the request"
        )
    allowance.take(size)
    data = np.empty(size, np.uint8)
    gathering.copy_heap(references, offsets, address_of(data))
    if feature.type == "list<string>" and not gathering.string_lists_fit(address_of(data), offsets):
        raise _misfit(view, feature)
    return HeapValues(data, offsets.astype(np.int32))


def _misfit(view: ViewVersion, feature: Feature) -> ViewDamaged:
    return ViewDamaged(
        f"view {view.name!r}: a stored value of feature {feature.name!r} is invalid: it leads out of its chunk, or "
        f"its lengths do not add up; `shoal verify` finds all damage, and {LOAD_AGAIN}"
    )
