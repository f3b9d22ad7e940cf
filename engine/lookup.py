"""Answer a lookup from one version of the store: resolve what was asked, hash the keys, find, judge, gather.

Nothing here is done per value, and nothing waits: the whole of it runs on one version, and what it returns owns its
memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from engine.column import ViewRows
from engine.errors import LookupInvalid, StaleFeatures, UnknownFeature
from engine.kernels import finding, gathering
from engine.kernels.hashing import key_hashes
from engine.kernels.memory import address_of
from engine.key_columns import Entities, KeyColumns
from engine.result import HeapValues, LookupResult, ViewColumns
from engine.version import LookupPlan, StoreVersion, ViewVersion, remembered

Stale = Literal["serve", "null", "fail"]
"""What becomes of rows older than the age asked for: served all the same, answered as null, or the lookup fails."""

_MAX_HEAP_COLUMN = 2**31 - 1


def resolve_features(version: StoreVersion, features: str | Sequence[str]) -> list[str]:
    """The `view:feature` references that a request means: a feature service's (given as a str), or a list in which
    `view:*` stands for all features of a view.

    Raises:
        UnknownFeature: there is no such feature service or view.
        LookupInvalid: the list is empty, or a reference is not of the form `view:feature`.
    """
    if isinstance(features, str):
        service = version.services.get(features)
        if service is None:
            known = ", ".join(sorted(version.services)) or "none"
            raise UnknownFeature(f"the store has no feature service {features!r}; it has {known}")
        features = service.features
    references: list[str] = []
    for reference in features:
        view, separator, name = reference.partition(":")
        if not separator or not view or not name:
            raise LookupInvalid(f"{reference!r} is no feature reference; write view:feature, or view:* for all")
        if name == "*":
            references += [f"{view}:{feature.name}" for feature in version.view(view).record.view_schema.features]
        else:
            references.append(reference)
    if not references:
        raise LookupInvalid("no features were asked for; name some as view:feature, or a feature service")
    return references


def lookup(
    version: StoreVersion,
    features: str | Sequence[str],
    entities: Entities,
    *,
    now: int,
    max_age: timedelta | None = None,
    stale: Stale = "null",
) -> LookupResult:
    """Look up features of many keys in one version of the store.

    Args:
        features: references, or a feature service's name (see `resolve_features`).
        entities: the join keys; lists are of one length, which is the number of rows of the answer.
        now: microseconds since 1970, from which ages are counted.
        max_age: the age that the caller accepts, instead of each view's TTL.
        stale: what becomes of rows that are older.

    Raises:
        LookupInvalid, UnknownFeature: the request does not fit the store.
        StaleFeatures: rows are older than accepted, and `stale` is "fail".
    """
    check_stale(stale)
    plan = _plan(version, features)
    keys = KeyColumns(entities)
    parts = []
    for view_name, names in plan.features.items():
        view = version.view(view_name)
        found = find_rows(view, keys)
        rows = judge_rows(view, found, oldest_accepted(view, now, max_age), stale)
        parts.append(gather_columns(view, names, found, rows))
    return LookupResult(version=version.id, keys=keys.count, parts=parts, plan=plan)


def check_stale(stale: Stale) -> None:
    """Raises LookupInvalid if `stale` is none of the things that can become of rows."""
    if stale not in get_args(Stale):
        raise LookupInvalid(f"stale is {stale!r}; it is one of {', '.join(get_args(Stale))}")


def oldest_accepted(view: ViewVersion, now: int, max_age: timedelta | None) -> int:
    """The least event time, in microseconds since 1970, that is not too old."""
    age = max_age if max_age is not None else view.record.view_schema.ttl
    if age is None:
        return gathering.NO_EVENT_TIME
    return max(gathering.NO_EVENT_TIME, now - age // timedelta(microseconds=1))


def _plan(version: StoreVersion, features: str | Sequence[str]) -> LookupPlan:
    """The plan of a request, made once per version for all requests that ask for the same."""
    asked = features if isinstance(features, str) else tuple(features)
    return remembered(version.plans, asked, lambda: _make_plan(resolve_features(version, features)))


def _make_plan(references: Sequence[str]) -> LookupPlan:
    names: dict[str, list[str]] = {}
    places = []
    for reference in references:
        view, _, name = reference.partition(":")
        of_view = names.setdefault(view, [])
        places.append((view, len(of_view)))
        of_view.append(name)
    part_of = {view: part for part, view in enumerate(names)}
    order = tuple((part_of[view], column) for view, column in places)
    return LookupPlan(tuple(references), {view: tuple(of_view) for view, of_view in names.items()}, order)


@dataclass(frozen=True)
class FoundRows:
    """Where the rows of all keys are: see `engine.kernels.finding.find`."""

    address: npt.NDArray[np.int64]
    chunk: npt.NDArray[np.int64]


def find_rows(view: ViewVersion, keys: KeyColumns) -> FoundRows:
    """Find the newest row of every key in a view."""
    columns = keys.of(view)
    first, second = key_hashes(columns)
    address, chunk = np.empty(first.size, np.int64), np.empty(first.size, np.int64)
    finding.find(first, second, view.chunks, view.segment_starts, address, chunk)
    if first.size != keys.count:
        return FoundRows(np.repeat(address, keys.count), np.repeat(chunk, keys.count))
    return FoundRows(address, chunk)


def judge_rows(view: ViewVersion, found: FoundRows, oldest: int, stale: Stale) -> ViewRows:
    """Tell apart what is there, missing and too old, and leave in `found` only rows whose values are to be served.

    Raises:
        StaleFeatures: rows are older than `oldest` (microseconds since 1970), and `stale` is "fail".
    """
    status, event_time = np.empty(found.address.size, np.uint8), np.empty(found.address.size, np.int64)
    zero_row = address_of(view.zero_row)
    too_old = gathering.resolve(found.address, zero_row, oldest, stale == "serve", status, event_time)
    name = view.record.view_schema.name
    if too_old and stale == "fail":
        raise StaleFeatures(
            f"{too_old} of {status.size} rows of view {name!r} are older than the age accepted; accept more with "
            f"max_age, or have them served or nulled with stale"
        )
    return ViewRows(name, status, event_time)


def gather_columns(view: ViewVersion, names: tuple[str, ...], found: FoundRows, rows: ViewRows) -> ViewColumns:
    """Gather features of found rows."""
    program = view.program(names)
    features, keys = len(program.features), found.address.size
    alignment = gathering.COLUMN_ALIGNMENT
    sizes = program.outputs[:, gathering.WIDTH] * keys
    arena = np.empty(int((-(-sizes // alignment)).sum()) * alignment, np.uint8)
    valid = np.empty((features, keys), np.uint8)
    nulls, starts = np.empty(features, np.int64), np.empty(features, np.int64)
    gathering.gather(
        found.address,
        found.chunk,
        view.chunks,
        program.instructions,
        program.outputs,
        address_of(arena),
        valid,
        nulls,
        starts,
    )
    heap = {index: _copy_from_heap(address_of(arena) + int(starts[index]), valid[index]) for index in program.in_heap}
    return ViewColumns(rows, program, arena, starts, starts + sizes, valid, nulls, heap)


def _copy_from_heap(references: int, valid: npt.NDArray[np.uint8]) -> HeapValues:
    """Copy the values that a gathered column, at address `references`, refers to."""
    offsets = np.empty(valid.size + 1, np.int64)
    size = gathering.heap_offsets(references, valid, offsets)
    if size > _MAX_HEAP_COLUMN:
        raise LookupInvalid(f"one feature's values take {size} bytes, an answer holds 2 GiB of each; ask in parts")
    data = np.empty(size, np.uint8)
    gathering.copy_heap(references, offsets, address_of(data))
    return HeapValues(data, offsets.astype(np.int32))
