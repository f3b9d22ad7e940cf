"""Answer a lookup from one version of the store: resolve what was asked, hash the keys, find, judge, gather.

Nothing here is done per value, and nothing waits: the whole of it runs on one version, and what it returns owns its
memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.column import ViewRows
from engine.errors import LookupInvalid, StaleFeatures, UnknownFeature
from engine.kernels import finding, gathering
from engine.kernels.hashing import key_hashes
from engine.kernels.memory import address_of
from engine.result import HeapValues, LookupResult, ViewColumns
from engine.schema import JoinKey, arrow_type
from engine.version import LookupPlan, StoreVersion, ViewVersion

Stale = Literal["serve", "null", "fail"]
"""What becomes of rows older than the age asked for: served all the same, answered as null, or the lookup fails."""

Entities = Mapping[str, Any]
"""Join key → a scalar, repeated for every row, or a list, NumPy array or Arrow array of values."""

_MAX_HEAP_COLUMN = 2**31 - 1
_KEPT_PLANS = 256


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
    if stale not in get_args(Stale):
        raise LookupInvalid(f"stale is {stale!r}; it is one of {', '.join(get_args(Stale))}")
    plan = _plan(version, features)
    keys = KeyColumns(entities)
    parts = []
    for view_name, names in plan.features.items():
        view = version.view(view_name)
        found = find_rows(view, keys)
        age = max_age if max_age is not None else view.record.view_schema.ttl
        oldest = gathering.NO_EVENT_TIME
        if age is not None:
            oldest = max(oldest, now - age // timedelta(microseconds=1))
        rows = judge_rows(view, found, oldest, stale)
        parts.append(gather_columns(view, names, found, rows))
    return LookupResult(version=version.id, keys=keys.count, parts=parts, order=plan.order)


def _plan(version: StoreVersion, features: str | Sequence[str]) -> LookupPlan:
    """The plan of a request, made once per version for all requests that ask for the same."""
    asked = features if isinstance(features, str) else tuple(features)
    plan = version.plans.get(asked)
    if plan is None:
        if len(version.plans) >= _KEPT_PLANS:
            version.plans.clear()
        plan = version.plans[asked] = _make_plan(resolve_features(version, features))
    return plan


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
    return LookupPlan({view: tuple(of_view) for view, of_view in names.items()}, order)


class KeyColumns:
    """The entities of a request, each made an Arrow array of the type that a view wants when it wants it."""

    def __init__(self, entities: Entities) -> None:
        self._entities = entities
        self.count = 1
        first_list = None
        for name, values in entities.items():
            if _is_scalar(values):
                continue
            length = _length(name, values)
            if first_list is not None and length != self.count:
                raise LookupInvalid(
                    f"entity {name!r} has {length} values, but {first_list!r} has {self.count}; lists must be of one "
                    f"length (a scalar is repeated)"
                )
            first_list, self.count = name, length
        self._made: dict[JoinKey, pa.Array] = {}

    def of(self, view: ViewVersion) -> list[pa.Array]:
        """A view's join keys in order; of one row if all are scalars, else of `count` rows."""
        join_keys = view.record.view_schema.join_keys
        scalar = all(_is_scalar(self._entities.get(key.name)) for key in join_keys)
        columns = [self._column(key, view.record.view_schema.name) for key in join_keys]
        if scalar or all(len(column) == self.count for column in columns):
            return columns
        return [column if len(column) == self.count else pa.repeat(column[0], self.count) for column in columns]

    def _column(self, key: JoinKey, view: str) -> pa.Array:
        if key not in self._made:
            if key.name not in self._entities:
                given = ", ".join(self._entities) or "none"
                raise LookupInvalid(
                    f"view {view!r} is looked up by {key.name!r}, which is not among the entities ({given})"
                )
            values = self._entities[key.name]
            self._made[key] = _key_array(key, [values] if _is_scalar(values) else values)
        return self._made[key]


def _is_scalar(values: Any) -> bool:
    return values is None or isinstance(values, str | int | float | bytes | np.generic)


def _length(name: str, values: Any) -> int:
    try:
        return len(values)
    except TypeError:
        raise LookupInvalid(
            f"entity {name!r} is of type {type(values).__name__}; give a scalar, a list, or a NumPy or Arrow array"
        ) from None


def _key_array(key: JoinKey, values: Any) -> pa.Array:
    """The values of a join key as one contiguous Arrow array without nulls."""
    wanted = arrow_type(key.type)
    try:
        if isinstance(values, pa.ChunkedArray):
            values = values.combine_chunks()
        # The type is found first, since a conversion would take the float 1.5 for the key 1.
        column = values if isinstance(values, pa.Array) else pa.array(values)
        if column.type != wanted:
            if len(column) and not _fits(column.type, wanted):
                raise LookupInvalid(
                    f"entity {key.name!r} must be {key.type}, but holds {column.type}, such as {column[0].as_py()!r}"
                )
            column = column.cast(wanted)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError, UnicodeError) as error:
        raise LookupInvalid(f"entity {key.name!r} must be {key.type}: {error}") from None
    if column.null_count:
        position = column.is_null().to_pylist().index(True)
        raise LookupInvalid(f"entity {key.name!r} is null in row {position}; leave such rows out of the request")
    return column


def _fits(given: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether values of a type can be keys of another; nulls can, and are refused by themselves."""
    if pa.types.is_dictionary(given):
        given = given.value_type
    if pa.types.is_null(given):
        return True
    if pa.types.is_int64(wanted):
        return bool(pa.types.is_integer(given))
    return bool(pa.types.is_string(given) or pa.types.is_large_string(given) or pa.types.is_string_view(given))


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
    return ViewColumns(rows, program.features, arena, starts, starts + sizes, valid, nulls, heap)


def _copy_from_heap(references: int, valid: npt.NDArray[np.uint8]) -> HeapValues:
    """Copy the values that a gathered column, at address `references`, refers to."""
    offsets = np.empty(valid.size + 1, np.int64)
    size = gathering.heap_offsets(references, valid, offsets)
    if size > _MAX_HEAP_COLUMN:
        raise LookupInvalid(f"one feature's values take {size} bytes, an answer holds 2 GiB of each; ask in parts")
    data = np.empty(size, np.uint8)
    gathering.copy_heap(references, offsets, address_of(data))
    return HeapValues(data, offsets.astype(np.int32))
