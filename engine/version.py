"""One version of a store, as one read transaction shows it: every view's segments, ready for the kernels.

A view's version owns the transaction and the maps that its addresses point into; whoever computes on those addresses
holds it meanwhile. What leaves it is a copy.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from engine import catalog
from engine.environment import (
    LiveEnvironment,
    ReadTransaction,
)
from engine.errors import ShoalError, StoreDamaged, UnknownFeature, ViewDamaged
from engine.kernels import gathering, matrix
from engine.kernels.memory import address_of
from engine.layout import RowLayout, Storage, storage_of
from engine.schema import Feature, FeatureService, ViewSchema
from engine.segment import Segment, chunk_table, output_row
from engine.shards import Shard
from engine.times import to_micros

_REMEMBERED = 256

Key = TypeVar("Key")
Made = TypeVar("Made")


def remembered(memory: dict[Key, Made], key: Key, make: Callable[[], Made]) -> Made:
    """What was made for a key before, or is made now. A memory that is full of other keys starts over."""
    made = memory.get(key)
    if made is None:
        if len(memory) >= _REMEMBERED:
            memory.clear()
        made = memory[key] = make()
    return made


@dataclass(frozen=True)
class Program:
    """How a list of features is gathered from a view: see `engine.kernels.gathering`."""

    features: tuple[Feature, ...]
    types: tuple[str, ...]
    instructions: npt.NDArray[np.int64]
    presence: npt.NDArray[np.uint8]
    alike: npt.NDArray[np.bool_]
    outputs: npt.NDArray[np.int64]
    in_heap: tuple[int, ...]

    def arena_size(self, keys: int) -> int:
        """The bytes that the columns of some keys take."""
        alignment = gathering.COLUMN_ALIGNMENT
        return sum(features * (-(-width * keys // alignment) * alignment) for width, features in self._widths.items())

    @cached_property
    def _widths(self) -> Counter[int]:
        return Counter(self.outputs[:, gathering.WIDTH].tolist())


@dataclass(frozen=True)
class MatrixProgram:
    """How features of a view get into the columns of a matrix that they begin at: see `engine.kernels.matrix`."""

    features: tuple[Feature, ...]
    columns: tuple[int, ...]
    instructions: npt.NDArray[np.int64]
    spans: npt.NDArray[np.int64]
    presence: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class MatrixPlan:
    """The plan of a matrix request: the matrix's shape and type, each view's program, and the views' positions (see
    `StoreVersion.applied`). `column_names` lists the references that a feature service or `view:*` resolves to,
    separated by commas, an embedding as `view:feature[N]`. It is empty if the request itself names all columns."""

    columns: int
    dtype: np.dtype[np.floating]
    programs: Mapping[str, MatrixProgram]
    applied: str
    column_names: str


@dataclass(frozen=True)
class LookupPlan:
    """What a request wants: references in the order asked, features by view, and for each reference its view's position
    and its own position in that view. An embedding counts among `values_per_key` as its numbers. `applied` is where the
    views stand (see `StoreVersion.applied`)."""

    references: tuple[str, ...]
    features: Mapping[str, tuple[str, ...]]
    order: tuple[tuple[int, int], ...]
    values_per_key: int
    applied: str


class ViewVersion:
    """One view's rows: its segments, newest first, and the tables that the kernels read them by.

    `ttl` is in microseconds, `low_watermark` in microseconds since 1970 (NO_EVENT_TIME if not known); `zero_row` is
    the address of a row in which every feature is null.

    Args:
        transaction: what the overlays were read in. A base's file stays mapped while its segment is held.
        raw: the record as it stands in the catalog.
        shard: the shard that the store holds, if it does not hold all rows.
    """

    def __init__(
        self,
        record: catalog.ViewRecord,
        segments: Sequence[Segment],
        transaction: ReadTransaction,
        raw: bytes = b"",
        shard: Shard | None = None,
    ) -> None:
        self.record = record
        self.segments = tuple(segments)
        self.transaction = transaction
        self.raw = raw
        self.shard = shard
        self.chunks, self.segment_starts = chunk_table(self.segments)
        longest = max(RowLayout(segment.record.view_schema).stride for segment in self.segments)
        self._zero_row = np.zeros(longest, np.uint8)
        self.zero_row = address_of(self._zero_row)
        schema = record.view_schema
        self.name = schema.name
        self.join_keys = schema.join_keys
        self.join_key_names = frozenset(key.name for key in schema.join_keys)
        self.ttl = None if schema.ttl is None else schema.ttl // timedelta(microseconds=1)
        self.is_remote = schema.is_remote
        self.low_watermark = gathering.NO_EVENT_TIME
        # The rows of a table may be behind the entry that the view stands at.
        if record.low_watermark is not None and not self.is_remote:
            self.low_watermark = to_micros(record.low_watermark.at)
        self._programs: dict[tuple[str, ...], Program] = {}
        self._matrix_programs: dict[tuple[tuple[Feature, ...], tuple[int, ...], bool], MatrixProgram] = {}
        self._programs_over: dict[tuple[ViewSchema, ...], tuple[dict[Any, Program], dict[Any, MatrixProgram]]] = {}

    def __repr__(self) -> str:
        return f"<ViewVersion of {self.name}: seq {self.record.applied_seq}, {len(self.segments)} segments>"

    def over(self, segments: Sequence[Segment]) -> "ViewVersion":
        """The view with the rows of other segments, which hold what their chunks are made of."""
        other = copy.copy(self)
        other.segments = tuple(segments)
        other.chunks, other.segment_starts = chunk_table(other.segments)
        schemas = tuple(segment.record.view_schema for segment in segments)
        longest = max(RowLayout(schema).stride for schema in schemas)
        if longest > self._zero_row.size:
            other._zero_row = np.zeros(longest, np.uint8)
            other.zero_row = address_of(other._zero_row)
        # Programs are the same for all requests whose rows have the same schemas.
        other._programs, other._matrix_programs = remembered(self._programs_over, schemas, lambda: ({}, {}))
        return other

    def carried_over(self, transaction: ReadTransaction) -> "ViewVersion":
        """The same rows as a later transaction shows them, where the view's record is the same.

        Chunks are never rewritten and fill pages of their own, so those of equal records stay where they are.
        """
        later = copy.copy(self)
        later.transaction = transaction
        return later

    def feature(self, name: str) -> Feature:
        """One feature of this view; raises UnknownFeature if it has none of this name."""
        schema = self.record.view_schema
        if name not in schema.feature_index:
            known = ", ".join(feature.name for feature in schema.features)
            raise UnknownFeature(f"view {schema.name!r} has no feature {name!r}; it has {known}", "feature", name)
        return schema.features[schema.feature_index[name]]

    def program(self, names: tuple[str, ...]) -> Program:
        """The program for features of this view, made once per version.

        Raises:
            UnknownFeature: the view has no such feature.
        """
        return remembered(self._programs, names, lambda: self._make_program(names))

    def _make_program(self, names: tuple[str, ...]) -> Program:
        features = tuple(self.feature(name) for name in names)
        instructions = np.array([segment.instructions(features) for segment in self.segments], np.int64)
        outputs = np.array([output_row(feature) for feature in features], np.int64)
        in_heap = (number for number, feature in enumerate(features) if storage_of(feature.type) is Storage.HEAP)
        return Program(
            features,
            tuple(feature.type for feature in features),
            instructions,
            _presence(instructions[:, :, gathering.PRESENCE_BIT]),
            (instructions == instructions[0]).all(axis=(0, 2)),
            outputs,
            tuple(in_heap),
        )

    def matrix_program(self, features: Sequence[Feature], columns: Sequence[int], *, float32: bool) -> MatrixProgram:
        """The program for numeric features of this view and the columns where they go, made once per version."""
        key = (tuple(features), tuple(columns), float32)
        return remembered(self._matrix_programs, key, lambda: self._make_matrix_program(*key))

    def _make_matrix_program(
        self, features: tuple[Feature, ...], columns: tuple[int, ...], float32: bool
    ) -> MatrixProgram:
        instructions = np.array([segment.numbers(features, columns) for segment in self.segments], np.int64)
        spans = np.zeros((len(self.segments), matrix.SPAN_COLUMNS), np.int64)
        for number, rows in enumerate(instructions):
            if float32 and _is_one_run(rows):
                spans[number] = rows[0, matrix.OFFSET], rows[0, matrix.COLUMN], rows[:, matrix.WIDTH].sum()
        return MatrixProgram(features, columns, instructions, spans, _presence(instructions[:, :, matrix.PRESENCE_BIT]))


def _presence(bits: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Presence bitmaps, uint8[segments, bytes], with the bits [segments, features]."""
    presence = np.zeros((bits.shape[0], int(bits.max(initial=0)) // 8 + 1), np.uint8)
    for number, of_segment in enumerate(bits.tolist()):
        for bit in of_segment:
            presence[number, bit // 8] |= 1 << bit % 8
    return presence


def _is_one_run(rows: npt.NDArray[np.int64]) -> bool:
    """Whether features are float32 that stand side by side both in a segment's rows and in the matrix."""
    floats = np.isin(rows[:, matrix.KIND], (matrix.Number.FLOAT32, matrix.Number.FLOATS))
    widths = rows[:-1, matrix.WIDTH]
    in_rows = np.diff(rows[:, matrix.OFFSET]) == 4 * widths
    in_matrix = np.diff(rows[:, matrix.COLUMN]) == widths
    return bool(floats.all() and in_rows.all() and in_matrix.all())


@dataclass(frozen=True)
class Damage:
    """Why a view cannot be read as the catalog has it; and its record there, unless that is what cannot be read."""

    kind: type[ShoalError]
    message: str
    record: catalog.ViewRecord | None


@dataclass(frozen=True, repr=False)
class StoreVersion:
    """All views of a store as of one committed transaction; `id` rises with every commit.

    A view that is `damaged` is not among the `views`, or is there as it was when it could be read last.
    """

    id: int
    live: LiveEnvironment = field(repr=False)
    store: catalog.StoreRecord
    views: Mapping[str, ViewVersion]
    services: Mapping[str, FeatureService]
    troubles: Mapping[str, catalog.Trouble]
    damaged: Mapping[str, Damage] = field(default_factory=dict)
    noted: Mapping[str, tuple[catalog.DamagedSegment, ...]] = field(default_factory=dict)
    """Segments that the writer found damaged when it read them again, by view."""
    plans: dict[str | tuple[str, ...], LookupPlan] = field(default_factory=dict, repr=False)
    matrix_plans: dict[str | tuple[str, ...], MatrixPlan] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        return f"<StoreVersion {self.id} of {', '.join(self.names) or 'no views'}>"

    @property
    def is_newest(self) -> bool:
        """Whether nothing was committed since, which costs less than a microsecond to know."""
        return self.live.last_transaction() == self.id

    @cached_property
    def join_key_names(self) -> frozenset[str]:
        """The join keys of all views."""
        return frozenset().union(*(view.join_key_names for view in self.views.values()))

    @cached_property
    def shard(self) -> Shard | None:
        """The shard that the store holds; None if it holds all rows."""
        return shard_of(self.store)

    def applied(self, views: Iterable[str]) -> str:
        """Where views stand in their logs, as `docs=12@1b2c3d4e, users=7@90ab12cd`: of each the seq of the last entry
        that its rows hold, and the beginning of that entry's id. Pushes have no place in a log."""
        records = ((name, self.view(name).record) for name in views)
        return ", ".join(f"{name}={record.applied_seq}@{record.applied_entry[:8]}" for name, record in records)

    @cached_property
    def has_remote_views(self) -> bool:
        """Whether rows of some view are kept elsewhere than on this node."""
        return any(view.is_remote for view in self.views.values())

    @property
    def names(self) -> list[str]:
        """All views that the store knows of, though they may not be loaded yet, or not be readable."""
        return sorted({*self.views, *self.damaged, *self.troubles})

    def record(self, name: str) -> catalog.ViewRecord | None:
        """A view's record, though its data may not be readable; None of one of which nothing is loaded."""
        found = self.views.get(name) or self.damaged.get(name)
        return found.record if found is not None else None

    def applied_seq(self, name: str) -> int:
        """The last entry of a view's log that the store holds; 0 of one of which nothing is loaded."""
        record = self.record(name)
        return record.applied_seq if record is not None else 0

    def is_damaged(self, name: str) -> bool:
        """Whether a view's data cannot be read: by this process, which may have it open still, or by the writer."""
        trouble = self.troubles.get(name)
        return name in self.damaged or (trouble is not None and trouble.code == StoreDamaged.__name__)

    def note_of(self, segment: catalog.SegmentRecord) -> catalog.DamagedSegment | None:
        """The writer's note that a segment is damaged; None if there is none."""
        return catalog.note_of(segment, self.noted.get(segment.view_schema.name, ()))

    def damaged_kept(self, name: str) -> list[catalog.DamagedSegment]:
        """The notes of a view's kept generations that are damaged."""
        record = self.record(name)
        notes = (self.note_of(kept) for kept in (record.kept if record is not None else ()))
        return [note for note in notes if note is not None]

    def view(self, name: str) -> ViewVersion:
        """One view.

        Raises:
            UnknownFeature: the store has none of this name.
            ViewDamaged: it has, but its data cannot be read.
        """
        try:
            return self.views[name]
        except KeyError:
            if name in self.damaged:
                raise ViewDamaged(f"view {name!r} cannot be served: {self.damaged[name].message}") from None
            known = ", ".join(sorted(self.views)) or "none"
            raise UnknownFeature(f"the store has no view {name!r}; it has {known}", "view", name) from None


def shard_of(record: catalog.StoreRecord) -> Shard | None:
    """The shard that a store holds; None if it holds all rows."""
    return Shard.parse(record.shard) if record.shard is not None else None
