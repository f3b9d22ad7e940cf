"""The schema of a feature view: its join keys, its features and their types, its time to live.

views.yaml, manifests and the store's catalog contain the same schema. The source of a view's rows and the detection of
changes belong to the exporter: see `shoal.spark_export.views.definition`.
"""

import re
from datetime import timedelta
from functools import cache, cached_property
from typing import Annotated, Any, Literal, Self

import pyarrow as pa
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from shoal.engine.base.errors import SchemaChangeRefused
from shoal.engine.format.feast_values import MEMBERS

NAME_PATTERN = "[A-Za-z][A-Za-z0-9_]{0,127}"
Name = Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]
"""The name of a view, feature, join key or feature service: a letter, then letters, digits and underscores."""


def split_reference(reference: str) -> tuple[str, str]:
    """Return the view and the feature that a reference such as `docs:ctr` names. The feature is empty if the reference
    has no colon."""
    view, _, feature = reference.partition(":")
    return view, feature


def is_name(text: str) -> bool:
    """Return whether a text is a valid name of a view, feature, join key or feature service."""
    return re.fullmatch(NAME_PATTERN, text) is not None


JoinKeyType = Literal["string", "int64"]

Tier = Literal["local", "dynamodb"]
"""Where a view's rows are: on each node, or in a table in DynamoDB or a DynamoDB-compatible server."""

FutureTimes = Literal["refuse", "allow"]
"""Whether published rows may have event times more than a day after their publication."""

TableName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{3,255}$")]
"""The name of a table, by DynamoDB's rules."""

SCALAR_TYPES: dict[str, pa.DataType] = {
    "bool": pa.bool_(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "string": pa.string(),
    "bytes": pa.binary(),
    "timestamp": pa.timestamp("us", tz="UTC"),
    "list<int64>": pa.list_(pa.int64()),
    "list<float32>": pa.list_(pa.float32()),
    "list<string>": pa.list_(pa.string()),
}
_EMBEDDING = re.compile(r"float32\[([1-9][0-9]{0,4})\]")
WIDENINGS = {("int32", "int64"), ("int32", "float64"), ("float32", "float64")}
"""Type changes without loss, as (old, new): every stored value stays exactly the same."""


@cache
def embedding_size(feature_type: str) -> int | None:
    """Return the length of a fixed-size list type such as `float32[64]`; None for every other type."""
    match = _EMBEDDING.fullmatch(feature_type)
    return int(match[1]) if match else None


def arrow_type(feature_type: str) -> pa.DataType:
    """Return the Arrow type of a feature type, for published files and for responses."""
    size = embedding_size(feature_type)
    return pa.list_(pa.float32(), size) if size else SCALAR_TYPES[feature_type]


def _known_type(value: str) -> str:
    if value not in SCALAR_TYPES and not embedding_size(value):
        raise ValueError(
            f"unknown type {value!r}; use one of {', '.join(SCALAR_TYPES)}, or float32[N] for an embedding"
        )
    return value


class JoinKey(BaseModel):
    """One column of a view's key."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Name
    type: JoinKeyType


class Feature(BaseModel):
    """One named value of a view's rows.

    `feast_member` is set only in views that Feast defines, and only for types that Shoal lacks. If it is set, the type
    is `bytes`, and each value is Feast's message `Value` with that member.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Name
    type: Annotated[str, AfterValidator(_known_type)]
    feast_member: str | None = None

    @model_validator(mode="after")
    def _is_bytes_if_a_message(self) -> Self:
        if self.feast_member is not None and (self.type != "bytes" or self.feast_member not in MEMBERS):
            raise ValueError(
                f"{self.name!r} has the feast_member {self.feast_member!r}; `feast_member` must be a known Feast "
                f"member, and the feature's type must be bytes"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_set(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Older versions of Shoal also read manifests and catalogs, and they do not know this member.
        content: dict[str, Any] = serialize(self)
        if content.get("feast_member") is None:
            content.pop("feast_member", None)
        return content


class ViewSchema(BaseModel):
    """A feature view as the store knows it.

    `timestamp_field` is another name for the event time in pushed rows. `push_source` is the name of the view's push
    source for Feast's clients. `tier` says where the view's rows are. `table` is the name of the table if the rows are
    in a table.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Name
    join_keys: tuple[JoinKey, ...] = Field(min_length=1)
    features: tuple[Feature, ...] = Field(min_length=1)
    ttl: timedelta | None = Field(default=None, gt=timedelta(0))
    timestamp_field: str | None = None
    push_source: str | None = None
    future: FutureTimes = "refuse"
    tier: Tier = "local"
    table: TableName | None = None

    @model_validator(mode="after")
    def _has_a_table_if_remote(self) -> Self:
        check_table(self.tier, self.table)
        return self

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Self:
        seen: set[str] = set()
        for name in [*(key.name for key in self.join_keys), *(feature.name for feature in self.features)]:
            if name in seen:
                raise ValueError(f"{name!r} is named twice in view {self.name!r}")
            seen.add(name)
        return self

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Hashing all features is slow, and schemas are keys of caches.
        return hash((self.name, self.join_keys, self.features))

    @property
    def is_remote(self) -> bool:
        """Whether the rows are in a table, not on each node."""
        return self.tier != "local"

    @property
    def table_name(self) -> str:
        """The name of the table with the rows of a remote view."""
        return self.table or f"shoal.{self.name}"

    @cached_property
    def feature_index(self) -> dict[str, int]:
        """Feature name → its position in `features`."""
        return {feature.name: position for position, feature in enumerate(self.features)}

    def check_succeeds(self, old: "ViewSchema") -> None:
        """Check that rows stored under `old` can be read under this schema.

        A feature may be added (null for old rows), removed, or widened (int32 to int64 or float64, float32 to
        float64).

        Raises:
            SchemaChangeRefused: any other change; the message names the change and the fix.
        """
        if self.join_keys != old.join_keys:
            raise SchemaChangeRefused(
                f"view {self.name!r}: the join keys changed from {_describe(old.join_keys)} to "
                f"{_describe(self.join_keys)}; publish the view under another name"
            )
        old_types = {feature.name: feature.type for feature in old.features}
        members = {feature.name: feature.feast_member for feature in old.features}
        for feature in self.features:
            member = members.get(feature.name)
            if member is not None and feature.feast_member != member:
                raise SchemaChangeRefused(
                    f"view {self.name!r}: feature {feature.name!r} changed from Feast's {member} to "
                    f"{feature.feast_member or feature.type}, but stored values are {member}; give the feature a "
                    f"new name"
                )
            before = old_types.get(feature.name, feature.type)
            if before != feature.type and (before, feature.type) not in WIDENINGS:
                raise SchemaChangeRefused(
                    f"view {self.name!r}: feature {feature.name!r} changed from {before} to {feature.type}, but stored "
                    f"rows cannot be converted; give the feature a new name, or widen it (int32 to int64 or "
                    f"float64, float32 to float64)"
                )


def check_table(tier: Tier, table: str | None) -> None:
    """Raise ValueError if a table is named for a view with the tier `local`."""
    if tier == "local" and table is not None:
        raise ValueError(f"'table' names {table!r}, but the view's tier is local; give tier: dynamodb, or no table")


class FeatureService(BaseModel):
    """A named list of features for a model, from any number of views."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Name
    features: tuple[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*:([A-Za-z][A-Za-z0-9_]*|\*)$")], ...] = Field(
        min_length=1
    )


def _describe(join_keys: tuple[JoinKey, ...]) -> str:
    return ", ".join(f"{key.name} {key.type}" for key in join_keys)
