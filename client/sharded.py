"""A lookup over shards: divide a request into parts, check that all shards agree, and join the answers.

Views with different join keys divide a request's rows differently. So each combination of shard and join keys is a
separate request, for the rows of that shard. All requests are sent at once.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shoal.client.answers import Answer, JsonAnswer, MatrixAnswer, Position
from shoal.client.columns import as_list, count_rows, is_scalar
from shoal.client.errors import RequestInvalid, ShardsDisagree
from shoal.client.hashing import first_hashes, shards_of
from shoal.client.schema import Schema
from shoal.client.wire import Columns, split_reference

if TYPE_CHECKING:
    import pyarrow as pa

Indices = npt.NDArray[np.int64]


@dataclass(eq=False)
class Part:
    """The part of a request that goes to one shard. `rows` are the positions of its rows in the request; None if all
    join keys are scalars, because then one key is looked up for all rows. `places` are the positions of its features in
    the request."""

    shard: int
    rows: Indices | None
    places: Sequence[int]
    references: Sequence[str]
    entities: Mapping[str, list[Any]]
    answer: Answer | None = field(default=None)

    @property
    def keys(self) -> int:
        """The number of keys."""
        return 1 if self.rows is None else len(self.rows)

    @property
    def answered(self) -> Answer:
        """The part's answer, after it has arrived."""
        assert self.answer is not None
        return self.answer


def divide(
    schema: Schema, references: Sequence[str], entities: Columns, starts: npt.NDArray[np.int64]
) -> tuple[int, list[Part]]:
    """Return the number of rows in a request, and the request's parts.

    Raises:
        RequestInvalid: a join key is missing or has a wrong type, or columns have different lengths.
        UnknownFeature: there is no such view or feature.
    """
    count = count_rows(entities)
    by_keys: defaultdict[tuple[tuple[str, str], ...], list[int]] = defaultdict(list)
    for place, reference in enumerate(references):
        by_keys[schema.view(split_reference(reference)[0]).join_keys].append(place)
    parts = []
    for join_keys, places in by_keys.items():
        of_keys = [references[place] for place in places]
        missing = [name for name, _ in join_keys if name not in entities]
        if missing:
            given = ", ".join(entities) or "none"
            raise RequestInvalid(
                f"{of_keys[0]} is looked up by {missing[0]!r}, which is not among the entities ({given})"
            )
        is_one = all(is_scalar(entities[name]) for name, _ in join_keys)
        columns = {name: _column(entities[name], 1 if is_one else count) for name, _ in join_keys}
        hashes = first_hashes([(name, kind, columns[name]) for name, kind in join_keys])
        of_row = shards_of(hashes, starts)
        # If there are no rows, shard 0 still gets a request, because its answer has the types of the empty columns.
        for shard in np.unique(of_row).tolist() or [0]:
            rows = np.flatnonzero(of_row == shard)
            taken = {name: _take(values, rows) for name, values in columns.items()}
            parts.append(Part(shard, None if is_one else rows, places, of_keys, taken))
    return count, parts


def _column(values: Any, count: int) -> list[Any]:
    if is_scalar(values):
        return [values.item() if isinstance(values, np.generic) else values] * count
    return as_list(values)


def _take(values: list[Any], rows: Indices) -> list[Any]:
    """Return the values at the positions `rows`, in that order."""
    if len(rows) == len(values):
        return values
    if len(rows) < 2:
        return [values[row] for row in rows.tolist()]
    return list(itemgetter(*rows.tolist())(values))


def behind(parts: Sequence[Part], max_skew: int) -> list[Part]:
    """Return the parts whose shards are behind in some view's log; an empty list if all shards agree.

    Args:
        max_skew: the number of log entries by which shards may differ.

    Raises:
        ShardsDisagree: shards hold different entries at the same seq. Waiting does not help in this case.
    """
    late: list[Part] = []
    for view, positions in places_of(parts).items():
        newest = max(position.seq for position in positions.values())
        entries = {position.entry for position in positions.values() if position.seq == newest}
        if len(entries) > 1:
            raise disagreement(parts, f"view {view!r} has different entries at seq {newest}: the roots are different")
        late += [
            part
            for part in parts
            if view in part.answered.applied
            and part.answered.applied[view].seq < newest - max_skew
            and part not in late
        ]
    return late


def places_of(parts: Sequence[Part]) -> dict[str, dict[int, Position]]:
    """Return view → shard, counted from 1 → the shard's position in the view's log."""
    places: defaultdict[str, dict[int, Position]] = defaultdict(dict)
    for part in parts:
        for view, position in part.answered.applied.items():
            places[view][part.shard + 1] = position
    return dict(places)


def disagreement(parts: Sequence[Part], why: str) -> ShardsDisagree:
    """Return a ShardsDisagree error that names the views, shards and positions that differ."""
    places = places_of(parts)
    details = "; ".join(
        f"{view}: " + ", ".join(f"shard {shard} at {position}" for shard, position in sorted(of_view.items()))
        for view, of_view in places.items()
        if len(set(of_view.values())) > 1
    )
    return ShardsDisagree(f"{why}. {details}", places)


def join(schema: Schema, references: Sequence[str], count: int, parts: Sequence[Part], form: str) -> Answer:
    """Join the answers of all parts into one answer, with rows and features in the order of the request.

    Raises:
        ShardsDisagree: shards answer with columns of different types.
    """
    versions = {part.answered.version for part in parts if len(parts) == 1}
    version = versions.pop() if versions else None
    applied = {view: max(of_view.values()) for view, of_view in places_of(parts).items()}
    partial = tuple(sorted({view for part in parts for view in part.answered.partial}))
    if len(parts) == 1 and parts[0].rows is not None:
        return parts[0].answered
    match form:
        case "arrow":
            from shoal.client.arrow import ArrowAnswer

            return ArrowAnswer(version, applied, partial, _join_arrow(references, count, parts))
        case "npy":
            return MatrixAnswer(version, applied, partial, _join_matrices(schema, references, count, parts))
        case _:
            return JsonAnswer(version, applied, partial, _join_documents(references, count, parts))


def _groups(parts: Sequence[Part]) -> list[list[Part]]:
    """Return the parts grouped by their features."""
    by_places: defaultdict[int, list[Part]] = defaultdict(list)
    for part in parts:
        by_places[part.places[0]].append(part)
    return list(by_places.values())


def _order(parts: Sequence[Part], count: int) -> Indices:
    """Return int64[count]: for each row of the request, its position in the concatenated rows of the parts."""
    if parts[0].rows is None:
        return np.zeros(count, np.int64)
    rows = np.concatenate([part.rows for part in parts if part.rows is not None])
    order = np.empty(count, np.int64)
    order[rows] = np.arange(count)
    return order


def _join_arrow(references: Sequence[str], count: int, parts: Sequence[Part]) -> "pa.RecordBatch":
    import pyarrow as pa

    from shoal.client.arrow import one_batch, take_rows

    columns: dict[int, pa.Array] = {}
    for group in _groups(parts):
        try:
            together = pa.Table.from_batches([part.answered.to_arrow() for part in group])
        except pa.ArrowInvalid as error:
            raise disagreement(parts, f"shards answer with different columns ({error})") from None
        batch = one_batch(take_rows(together, _order(group, count)))
        columns |= zip(group[0].places, batch.columns, strict=True)
    return pa.RecordBatch.from_arrays([columns[place] for place in range(len(references))], names=list(references))


def _join_matrices(
    schema: Schema, references: Sequence[str], count: int, parts: Sequence[Part]
) -> npt.NDArray[np.floating]:
    widths = [schema.width(reference) for reference in references]
    starts = np.cumsum([0, *widths])
    dtype = np.float64 if schema.is_double(references) else np.float32
    matrix = np.empty((count, int(starts[-1])), dtype)
    for group in _groups(parts):
        wanted = np.concatenate([np.arange(starts[place], starts[place + 1]) for place in group[0].places])
        # Writing to a slice of columns is several times as fast as writing to columns given by an index array.
        is_run = bool((np.diff(wanted) == 1).all())
        target = matrix[:, wanted[0] : wanted[-1] + 1] if is_run else matrix
        for part in group:
            values = part.answered.to_numpy()
            if values.shape[1] != wanted.size:
                raise disagreement(parts, f"shard {part.shard + 1} answers with {values.shape[1]} columns")
            rows = slice(None) if part.rows is None else part.rows
            if is_run:
                target[rows] = values
            elif part.rows is None:
                target[:, wanted] = values
            else:
                target[np.ix_(part.rows, wanted)] = values
    return matrix


def _join_documents(references: Sequence[str], count: int, parts: Sequence[Part]) -> dict[str, Any]:
    features: dict[str, list[Any]] = {}
    joined: dict[str, dict[str, list[Any]]] = {"status": {}, "event_timestamps": {}}
    for group in _groups(parts):
        order = _order(group, count)
        documents = [answer.document for answer in (part.answer for part in group) if isinstance(answer, JsonAnswer)]
        for reference in group[0].references:
            together = [value for document in documents for value in document["features"][reference]]
            features[reference] = _take_all(together, order)
        views = dict.fromkeys(split_reference(reference)[0] for reference in group[0].references)
        for member, values in joined.items():
            for view in views:
                values[view] = _take_all([value for document in documents for value in document[member][view]], order)
    return {"version": None, "keys": count, "features": {name: features[name] for name in references}, **joined}


def _take_all(values: list[Any], order: Indices) -> list[Any]:
    if order.size < 2:
        return [values[place] for place in order.tolist()]
    return list(itemgetter(*order.tolist())(values))
