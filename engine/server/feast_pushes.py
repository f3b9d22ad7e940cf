"""Read the rows in Feast's POST /push and POST /write-to-online-store.

A body contains a data frame as columns. As with Feast's server, all features of the view must be present, and other
columns are ignored.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from shoal.engine.base.errors import PushInvalid, PushSourceUnknown, UnknownFeature
from shoal.engine.encoders import json_feast
from shoal.engine.push.pushed_rows import EVENT_TIME_COLUMN, check_range, from_base64, pushed_rows
from shoal.engine.server.feast import coerced, parse_feast_body
from shoal.engine.store.version import StoreVersion, ViewVersion

MEDIA_TYPE = json_feast.MEDIA_TYPE
_NOT_A_TIME = -(2**63)


class PushToSource(BaseModel):
    """The body of /push."""

    model_config = ConfigDict(frozen=True)
    push_source_name: str
    df: dict[str, list[Any]]
    to: str = "online"


class WriteToView(BaseModel):
    """The body of /write-to-online-store."""

    model_config = ConfigDict(frozen=True)
    feature_view_name: str
    df: dict[str, list[Any]]


def rows_for_source(version: StoreVersion, body: bytes, content_type: str) -> list[tuple[ViewVersion, pa.RecordBatch]]:
    """Return each view that has the push source, with the rows for this view. If no view has the push source, use the
    view of the same name.

    Raises:
        FeastBodyInvalid: the body does not have Feast's shape.
        PushSourceUnknown: no view has this push source or name.
        PushInvalid: the rows do not fit the view, or are for an offline store.
    """
    asked = parse_feast_body(body, content_type, PushToSource, nan=True)
    if asked.to != "online":
        raise PushInvalid(f"to is {asked.to!r}, but Shoal has no offline store; push to 'online'")
    name = asked.push_source_name
    views = [view for view in version.views.values() if view.record.view_schema.push_source == name]
    if not views and name in version.views:
        views = [version.views[name]]
    if not views:
        raise PushSourceUnknown(f"Unable to find push source {name!r}.")
    return [(view, _rows(view, asked.df)) for view in views]


def rows_for_view(version: StoreVersion, body: bytes, content_type: str) -> tuple[ViewVersion, pa.RecordBatch]:
    """Return the view named in a body, and its rows; raise the errors of `rows_for_source`, or UnknownFeature."""
    asked = parse_feast_body(body, content_type, WriteToView, nan=True)
    name = asked.feature_view_name
    if name not in version.views:
        raise UnknownFeature(f"Can't recognize feast object with a name {name}", "object", name)
    return version.views[name], _rows(version.views[name], asked.df)


def _rows(view: ViewVersion, frame: Mapping[str, list[Any]]) -> pa.RecordBatch:
    # Feast treats NaN as null.
    frame = {name: [None if value != value else value for value in values] for name, values in frame.items()}
    schema = view.record.view_schema
    names = [*(key.name for key in schema.join_keys), *(feature.name for feature in schema.features)]
    own = schema.timestamp_field
    time_name = own if own is not None and own in frame else EVENT_TIME_COLUMN
    missing = [name for name in (*names, time_name) if name not in frame]
    if missing:
        given = ", ".join(frame) or "none"
        raise PushInvalid(f"the rows lack column {missing[0]!r} of view {view.name!r}; they have {given}")
    keys = coerced(
        {key.name: frame[key.name] for key in schema.join_keys}, {key.name: key.type for key in schema.join_keys}
    )
    columns: dict[str, Any] = {EVENT_TIME_COLUMN: _times(time_name, frame[time_name], "ns"), **keys}
    for feature in schema.features:
        columns[feature.name] = _values(feature.name, feature.type, frame[feature.name])
    return pushed_rows(view, columns, now=datetime.now(UTC))


def _values(name: str, feature_type: str, values: Sequence[Any]) -> Any:
    if feature_type == "timestamp":
        return _times(name, values, "s")
    if feature_type == "bytes":
        return from_base64(name, values)
    return values


def _times(name: str, values: Sequence[Any], unit: str) -> Any:
    """Convert a column of whole numbers to timestamps, counted in `unit` since 1970; return other columns unchanged.

    The smallest int64 means null: Feast's remote store and pandas write it for a missing time.
    """
    if not values or not all(value is None or type(value) is int for value in values):
        return values
    numbers = [None if value == _NOT_A_TIME else value for value in values]
    try:
        times = pa.array(numbers, pa.timestamp(unit, tz="UTC"))
    except (pa.ArrowInvalid, OverflowError) as error:
        raise PushInvalid(f"column {name!r} must be timestamps: {error}") from None
    check_range(name, times)
    # The unsafe cast loses only fractions of a microsecond, because the new type can hold all times in the range.
    return times.cast(pa.timestamp("us", tz="UTC"), safe=False)
