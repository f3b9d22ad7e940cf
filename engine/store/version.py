"""One version of a store, as one read transaction shows it: every view's segments, ready for the kernels.

A view's version owns the transaction and the maps behind its addresses. Code that computes with these addresses must
hold a reference to the view's version meanwhile. The results are copies, so they do not need the version.
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

from shoal.engine.base.errors import ShoalError, StoreDamaged, UnknownFeature, ViewDamaged
from shoal.engine.base.shards import Shard
from shoal.engine.base.times import to_micros
from shoal.engine.format import catalog
from shoal.engine.format.layout import RowLayout, ValueStorage, storage_of
from shoal.engine.format.schema import Feature, FeatureService, ViewSchema
from shoal.engine.kernels import gathering, matrix
from shoal.engine.kernels.memory import address_of
from shoal.engine.store.environment import LiveEnvironment, ReadTransaction
from shoal.engine.store.segment import Segment, chunk_table, output_row

_REMEMBERED = 256

Key = TypeVar("Key")
Made = TypeVar("Made")


def remembered(memory: dict[Key, Made], key: Key, make: Callable[[], Made]) -> Made:
    """Return the cached value of a key, or make and cache it. If the cache is full, empty it first."""
    made = memory.get(key)
    if made is None:
        if len(memory) >= _REMEMBERED:
            memory.clear()
        made = memory[key] = make()
    return made


@dataclass(frozen=True)
class Program:
    """The program to gather a list of features from a view: see `shoal.engine.kernels.gathering`."""

    features: tuple[Feature, ...]
    types: tuple[str, ...]
    instructions: npt.NDArray[np.int64]
    presence: npt.NDArray[np.uint8]
    same_layout: npt.NDArray[np.bool_]
    outputs: npt.NDArray[np.int64]
    in_heap: tuple[int, ...]

    def arena_size(self, keys: int) -> int:
        """Return the size in bytes of the output columns for a number of keys."""
        alignment = gathering.COLUMN_ALIGNMENT
        return sum(features * (-(-width * keys // alignment) * alignment) for width, features in self._widths.items())

    @cached_property
    def _widths(self) -> Counter[int]:
        return Counter(self.outputs[:, gathering.WIDTH].tolist())


@dataclass(frozen=True)
class MatrixProgram:
    """The program to copy features of a view to a matrix: see `shoal.engine.kernels.matrix`. `columns` are the
    positions of the features' first columns."""

    features: tuple[Feature, ...]
    columns: tuple[int, ...]
    instructions: npt.NDArray[np.int64]
    spans: npt.NDArray[np.int64]
    presence: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class MatrixPlan:
    """The plan of a matrix request: the number of columns and the type of the matrix, each view's program, and the
    views' positions in their logs (see `StoreVersion.applied`). `column_names` lists the references that a feature
    service or `view:*` resolves to. The references are separated by commas, and an embedding is written as
    `view:feature[N]`. `column_names` is empty if the request itself names all columns."""

    columns: int
    dtype: np.dtype[np.floating]
    programs: Mapping[str, MatrixProgram]
    applied: str
    column_names: str


@dataclass(frozen=True)
class LookupPlan:
    """The plan of a lookup: the references in the order of the request, and the features of each view. `order` has, for
    each reference, the position of its view, and the position of its feature among the features of that view. In
    `values_per_key`, an embedding counts as its number of elements. `applied` are the views' positions in their logs
    (see `StoreVersion.applied`)."""

    references: tuple[str, ...]
    features: Mapping[str, tuple[str, ...]]
    order: tuple[tuple[int, int], ...]
    values_per_key: int
    applied: str


class ViewVersion:
    """One view's rows: its segments, newest first, and the tables with which the kernels read them.

    `ttl` is in microseconds, `low_watermark` in microseconds since 1970 (NO_EVENT_TIME if unknown). `zero_row` is the
    address of a row without values: every feature is null.

    Args:
        transaction: the transaction that reads the overlays. A base does not need a transaction: the base's file stays
            mapped as long as its segment exists.
        raw: the view's undecoded record in the catalog.
        shard: the store's shard; None if the store holds all rows.
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
        # The rows in a table may be behind the view's last applied entry.
        if record.low_watermark is not None and not self.is_remote:
            self.low_watermark = to_micros(record.low_watermark.at)
        self._programs: dict[tuple[str, ...], Program] = {}
        self._matrix_programs: dict[tuple[tuple[Feature, ...], tuple[int, ...], bool], MatrixProgram] = {}
        self._programs_over: dict[tuple[ViewSchema, ...], tuple[dict[Any, Program], dict[Any, MatrixProgram]]] = {}

    def __repr__(self) -> str:
        return f"<ViewVersion of {self.name}: seq {self.record.applied_seq}, {len(self.segments)} segments>"

    def over(self, segments: Sequence[Segment]) -> "ViewVersion":
        """Return this view with the rows of other segments. These segments own the memory of their chunks."""
        other = copy.copy(self)
        other.segments = tuple(segments)
        other.chunks, other.segment_starts = chunk_table(other.segments)
        schemas = tuple(segment.record.view_schema for segment in segments)
        longest = max(RowLayout(schema).stride for schema in schemas)
        if longest > self._zero_row.size:
            other._zero_row = np.zeros(longest, np.uint8)
            other.zero_row = address_of(other._zero_row)
        # Requests share programs if their segments have the same schemas.
        other._programs, other._matrix_programs = remembered(self._programs_over, schemas, lambda: ({}, {}))
        return other

    def carried_over(self, transaction: ReadTransaction) -> "ViewVersion":
        """Return this version with a later transaction of the same environment. The view's record must be unchanged.

        A chunk is never rewritten, and no other value is on its pages. So the chunks of an unchanged record keep their
        addresses.
        """
        later = copy.copy(self)
        later.transaction = transaction
        return later

    def feature(self, name: str) -> Feature:
        """Return a feature of this view; raise UnknownFeature if the view has no feature of this name."""
        schema = self.record.view_schema
        if name not in schema.feature_index:
            known = ", ".join(feature.name for feature in schema.features)
            raise UnknownFeature(f"view {schema.name!r} has no feature {name!r}; it has {known}", "feature", name)
        return schema.features[schema.feature_index[name]]

    def program(self, names: tuple[str, ...]) -> Program:
        """Return the program for features of this view. The program is made once per version.

        Raises:
            UnknownFeature: the view has no such feature.
        """
        return remembered(self._programs, names, lambda: self._make_program(names))

    def _make_program(self, names: tuple[str, ...]) -> Program:
        features = tuple(self.feature(name) for name in names)
        instructions = np.array([segment.instructions(features) for segment in self.segments], np.int64)
        outputs = np.array([output_row(feature) for feature in features], np.int64)
        in_heap = (number for number, feature in enumerate(features) if storage_of(feature.type) is ValueStorage.HEAP)
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
        """Return the program for numeric features of this view and their columns. The program is made once per
        version."""
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
    """Return one presence bitmap per segment, as uint8[segments, bytes]. `bits`, int64[segments, features], has the
    numbers of the bits that are set."""
    presence = np.zeros((bits.shape[0], int(bits.max(initial=0)) // 8 + 1), np.uint8)
    for number, of_segment in enumerate(bits.tolist()):
        for bit in of_segment:
            presence[number, bit // 8] |= 1 << bit % 8
    return presence


def _is_one_run(rows: npt.NDArray[np.int64]) -> bool:
    """Return whether all features are float32 and contiguous, both in a segment's rows and in the matrix."""
    floats = np.isin(rows[:, matrix.KIND], (matrix.Number.FLOAT32, matrix.Number.FLOATS))
    widths = rows[:-1, matrix.WIDTH]
    in_rows = np.diff(rows[:, matrix.OFFSET]) == 4 * widths
    in_matrix = np.diff(rows[:, matrix.COLUMN]) == widths
    return bool(floats.all() and in_rows.all() and in_matrix.all())


@dataclass(frozen=True)
class Damage:
    """The reason why a view cannot be read. `record` is the view's record in the catalog; it is None if the record
    itself cannot be read."""

    kind: type[ShoalError]
    message: str
    record: catalog.ViewRecord | None


@dataclass(frozen=True, repr=False)
class StoreVersion:
    """All views of a store as of one committed transaction; `id` increases with every commit.

    If a view is in `damaged`, `views` either does not contain the view, or contains its last readable version.
    """

    id: int
    live: LiveEnvironment = field(repr=False)
    store: catalog.StoreRecord
    views: Mapping[str, ViewVersion]
    services: Mapping[str, FeatureService]
    troubles: Mapping[str, catalog.Trouble]
    damaged: Mapping[str, Damage] = field(default_factory=dict)
    noted: Mapping[str, tuple[catalog.DamagedSegment, ...]] = field(default_factory=dict)
    """The segments that the writer's scrub found damaged, by view."""
    plans: dict[str | tuple[str, ...], LookupPlan] = field(default_factory=dict, repr=False)
    matrix_plans: dict[str | tuple[str, ...], MatrixPlan] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        return f"<StoreVersion {self.id} of {', '.join(self.names) or 'no views'}>"

    @property
    def is_newest(self) -> bool:
        """Whether nothing was committed since this version. The check takes less than a microsecond."""
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
        """Return the positions of views in their logs, such as `docs=12@1b2c3d4e, users=7@90ab12cd`: for each view, the
        seq of its last applied entry, and the beginning of that entry's id. Pushes have no position in a log."""
        records = ((name, self.view(name).record) for name in views)
        return ", ".join(f"{name}={record.applied_seq}@{record.applied_entry[:8]}" for name, record in records)

    @cached_property
    def has_remote_views(self) -> bool:
        """Whether the rows of any view are in a table, not on this node."""
        return any(view.is_remote for view in self.views.values())

    @property
    def names(self) -> list[str]:
        """The names of all views that the store knows, including views that are not loaded yet or not readable."""
        return sorted({*self.views, *self.damaged, *self.troubles})

    def record(self, name: str) -> catalog.ViewRecord | None:
        """Return a view's record, even if the view's data is not readable; None if the view has no record."""
        found = self.views.get(name) or self.damaged.get(name)
        return found.record if found is not None else None

    def applied_seq(self, name: str) -> int:
        """Return the seq of a view's last applied entry; 0 if the view has no record."""
        record = self.record(name)
        return record.applied_seq if record is not None else 0

    def is_damaged(self, name: str) -> bool:
        """Return whether this process or the writer cannot read a view's data. This process may still have an older
        version of the view open."""
        trouble = self.troubles.get(name)
        return name in self.damaged or (trouble is not None and trouble.code == StoreDamaged.__name__)

    def note_of(self, segment: catalog.SegmentRecord) -> catalog.DamagedSegment | None:
        """Return the writer's note that a segment is damaged; None if the segment has no note."""
        return catalog.note_of(segment, self.noted.get(segment.view_schema.name, ()))

    def damaged_kept(self, name: str) -> list[catalog.DamagedSegment]:
        """Return the damage notes of a view's kept generations."""
        record = self.record(name)
        notes = (self.note_of(kept) for kept in (record.kept if record is not None else ()))
        return [note for note in notes if note is not None]

    def view(self, name: str) -> ViewVersion:
        """Return a view.

        Raises:
            UnknownFeature: the store has no view of this name.
            ViewDamaged: the view's data cannot be read.
        """
        try:
            return self.views[name]
        except KeyError:
            if name in self.damaged:
                raise ViewDamaged(f"view {name!r} cannot be served: {self.damaged[name].message}") from None
            known = ", ".join(sorted(self.views)) or "none"
            raise UnknownFeature(f"the store has no view {name!r}; it has {known}", "view", name) from None


def shard_of(record: catalog.StoreRecord) -> Shard | None:
    """Return the shard of a store; None if the store holds all rows."""
    return Shard.parse(record.shard) if record.shard is not None else None
