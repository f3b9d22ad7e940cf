"""Answer a lookup of numbers with one matrix, gathered row by row. `shoal.engine.lookup.columns` gathers column by
column."""

from collections.abc import Sequence
from datetime import timedelta

import numpy as np

from shoal.engine.base.errors import LookupInvalid
from shoal.engine.format.schema import Feature, embedding_size, split_reference
from shoal.engine.kernels import answering
from shoal.engine.kernels.gathering import STATUSES
from shoal.engine.lookup.allowance import Allowance
from shoal.engine.lookup.arguments import as_features
from shoal.engine.lookup.columns import (
    Stale,
    check_stale,
    check_values,
    oldest_accepted,
    refuse_stale,
    resolve_features,
)
from shoal.engine.lookup.key_columns import Entities, KeyColumns
from shoal.engine.lookup.remote_rows import (
    Fetched,
    Partial,
    check_partial,
    mark_unavailable,
    with_rows,
)
from shoal.engine.lookup.result import MatrixResult
from shoal.engine.lookup.result_column import ViewRows
from shoal.engine.store.segment import matrix_width
from shoal.engine.store.version import MatrixPlan, StoreVersion, remembered


def lookup_matrix(
    version: StoreVersion,
    features: str | Sequence[str],
    entities: Entities,
    *,
    now: int,
    max_age: timedelta | None = None,
    stale: Stale = "null",
    max_values: int | None = None,
    max_bytes: int | None = None,
    fetched: Fetched | None = None,
    partial: Partial = "serve",
) -> MatrixResult:
    """Look up numeric features of many keys as one matrix; arguments and errors are those of `lookup`.

    The matrix is float32 if all requested features are float32, float32[N] or bool, since float32 holds their values
    exactly. Otherwise it is float64. Only the types of the features decide, never their values. An int64 beyond 2^53 is
    rounded.

    Raises:
        LookupInvalid: also if a feature is a string, bytes or a variable list.
    """
    check_stale(stale)
    if partial != "serve":
        check_partial(partial)
    plan = _matrix_plan(version, features)
    keys = KeyColumns(entities)
    check_values(keys.count, plan.columns, max_values)
    Allowance(max_bytes).take(keys.count * plan.columns * plan.dtype.itemsize)
    result = np.empty((keys.count, plan.columns), plan.dtype)
    views = {}
    value_counts = {}
    for view_name, program in plan.programs.items():
        view = version.view(view_name)
        unavailable = None
        if view.is_remote:
            view, unavailable = with_rows(view, fetched, keys.count)
            program = view.matrix_program(program.features, program.columns, float32=plan.dtype == np.float32)
        hashes = keys.hashes(view)
        status = np.empty(keys.count, np.uint8)
        event_time = np.empty(keys.count, np.int64)
        counts = value_counts[view_name] = np.zeros(STATUSES, np.int64)
        too_old = answering.answer_matrix(
            hashes[0],
            hashes[1],
            view.chunks,
            view.segment_starts,
            view.zero_row,
            oldest_accepted(view, now, max_age),
            view.low_watermark,
            stale == "serve",
            status,
            event_time,
            program.instructions,
            program.spans,
            program.presence,
            result,
            counts,
        )
        if too_old and stale == "fail":
            raise refuse_stale(view, too_old, keys.count)
        if unavailable is not None:
            mark_unavailable(view, unavailable, status, counts, len(program.features), partial)
        views[view_name] = ViewRows(view_name, status, event_time)
    return MatrixResult(version.id, plan.applied, keys.count, result, views, value_counts, plan.column_names)


def _matrix_plan(version: StoreVersion, features: str | Sequence[str]) -> MatrixPlan:
    """Return the plan of a request. The plan is made once per version, for all requests with the same features."""
    asked = as_features(features)
    return remembered(
        version.matrix_plans, asked, lambda: _make_matrix_plan(version, asked, resolve_features(version, features))
    )


def _make_matrix_plan(version: StoreVersion, asked: str | tuple[str, ...], references: Sequence[str]) -> MatrixPlan:
    by_view: dict[str, tuple[list[Feature], list[int]]] = {}
    column = 0
    names = []
    for reference in references:
        view, name = split_reference(reference)
        feature = version.view(view).feature(name)
        width = matrix_width(feature)
        if not width:
            raise LookupInvalid(f"{reference} is {feature.type}, which has no place in a matrix; ask for Arrow or JSON")
        features, columns = by_view.setdefault(view, ([], []))
        features.append(feature)
        columns.append(column)
        column += width
        names.append(f"{reference}[{width}]" if embedding_size(feature.type) else reference)
    types = {feature.type for features, _ in by_view.values() for feature in features}
    float32 = all(name in ("float32", "bool") or embedding_size(name) for name in types)
    programs = {
        view: version.view(view).matrix_program(features, columns, float32=float32)
        for view, (features, columns) in by_view.items()
    }
    dtype: np.dtype[np.floating] = np.dtype(np.float32 if float32 else np.float64)
    column_names = "" if asked == tuple(references) else ",".join(names)
    return MatrixPlan(column, dtype, programs, version.applied(programs), column_names)
