"""What a feature view looks like: its join keys, its features and their types, its time to live.

The same description travels in views.yaml, in manifests and in the store's catalog. Where rows come from and how
changes are found is the exporter's business and stands in `spark_export.views`.
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

from engine.errors import SchemaChangeRefused
from engine.feast_values import MEMBERS

NAME_PATTERN = "[A-Za-z][A-Za-z0-9_]{0,127}"
Name = Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]
"""A view's, feature's, join key's or feature service's name: a letter, then letters, digits and underscores."""


def is_name(text: str) -> bool:
    """Whether a text is such a name."""
    return re.fullmatch(NAME_PATTERN, text) is not None


JoinKeyType = Literal["string", "int64"]

Tier = Literal["local", "dynamodb"]
"""Where a view's rows are kept: on each node, or in a table of DynamoDB, or of what speaks its interface."""

FutureTimes = Literal["refuse", "allow"]
"""Whether published rows may have event times more than a day after their publication."""

TableName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{3,255}$")]
"""The name of a table, as DynamoDB takes it."""

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
"""Type changes that keep every stored value exactly: (old, new)."""


@cache
def embedding_size(feature_type: str) -> int | None:
    """The length of a fixed-size list type such as `float32[64]`; None for every other type."""
    match = _EMBEDDING.fullmatch(feature_type)
    return int(match[1]) if match else None


def arrow_type(feature_type: str) -> pa.DataType:
    """The Arrow type in which a feature of this type is published and answered."""
    size = embedding_size(feature_type)
    return pa.list_(pa.float32(), size) if size else SCALAR_TYPES[feature_type]


def _known_type(value: str) -> str:
    if value not in SCALAR_TYPES and not embedding_size(value):
        raise ValueError(
            f"unknown type {value!r}; use one of {', '.join(SCALAR_TYPES)}, or float32[N] for an embedding"
        )
    return value


class JoinKey(BaseModel):
    """One column of the key by which a view's rows are found."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Name
    type: JoinKeyType


class Feature(BaseModel):
    """One named value of a view's rows.

    `feast_member` is set only in views that Feast defines, and only for types that Shoal lacks: the type is then
    `bytes`, and values are Feast's message `Value` with that member.
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
        # Manifests and catalogs are read by versions of Shoal that do not know the member.
        content: dict[str, Any] = serialize(self)
        if content.get("feast_member") is None:
            content.pop("feast_member", None)
        return content


class ViewSchema(BaseModel):
    """A feature view as the store knows it.

    `timestamp_field` is what clients that push rows may call their event time, `push_source` the name under which
    Feast's clients push to it. `tier` says where its rows are kept, `table` in which table if not on each node.
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
        # Of all features it takes a while, and schemas are keys of what is remembered.
        return hash((self.name, self.join_keys, self.features))

    @property
    def is_remote(self) -> bool:
        """Whether the rows are kept elsewhere than on each node."""
        return self.tier != "local"

    @property
    def table_name(self) -> str:
        """The table that holds the rows of a view that is kept in one."""
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
            SchemaChangeRefused: any other change; the message names it and the mend.
        """
        if self.join_keys != old.join_keys:
            raise SchemaChangeRefused(
                f"view {self.name!r}: the join keys changed from {_describe(old.join_keys)} to "
                f"{_describe(self.join_keys)}; publish it as a view of another name"
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
                    f"view {self.name!r}: feature {feature.name!r} changed from {before} to {feature.type}, which "
                    f"stored rows cannot follow; give the feature a new name, or widen it (int32 to int64 or "
                    f"float64, float32 to float64)"
                )


def check_table(tier: Tier, table: str | None) -> None:
    """Raises ValueError if a table is named for a view that is kept in none."""
    if tier == "local" and table is not None:
        raise ValueError(f"'table' names {table!r}, but the view's tier is local; give tier: dynamodb, or no table")


class FeatureService(BaseModel):
    """A named list of features, across views, that a model asks for."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Name
    features: tuple[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*:([A-Za-z][A-Za-z0-9_]*|\*)$")], ...] = Field(
        min_length=1
    )


def _describe(join_keys: tuple[JoinKey, ...]) -> str:
    return ", ".join(f"{key.name} {key.type}" for key in join_keys)
