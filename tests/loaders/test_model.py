"""Whatever happens to a log and its nodes, each node serves what a plain model predicts for its seq."""

import shutil
import tempfile
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal import FeatureStore
from shoal.engine.format.catalog import ViewRecord
from shoal.engine.format.schema import Feature, ViewSchema
from shoal.engine.kernels.gathering import Status
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.store.version import StoreVersion
from shoal.loaders.apply.compaction import MAX_OVERLAYS, fold, merge_overlays
from shoal.loaders.apply.entries import follow_again, roll_back
from shoal.loaders.backup.verify import verify_store
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.load import catch_up
from tests import stores
from tests.engine.values import VALUES, comparable, plain
from tests.stores import NOW, TIMESTAMP, Row

KEYS = [f"key {number}" for number in range(12)]
TYPES = ["int32", "float32", "string", "list<string>", "bool", "float32[3]"]
WIDER = {"int32": ["int64", "float64"], "float32": ["float64"]}
MINUTES = st.integers(-20, 20)


@dataclass(frozen=True)
class State:
    """The content of a view at one entry: the schema, and the event time and values of each live key."""

    view: ViewSchema
    rows: dict[str, tuple[datetime, Row]]


class Node:
    """A store with its writer, and a reader that stays open."""

    def __init__(self, path: Path, root: ExportRoot) -> None:
        self.path = path
        self._root = root
        self.writer = StoreWriter(path)
        self.catch_up()
        self.reader = FeatureStore.open(path)
        self._held: list[tuple[StoreVersion, list[Any]]] = []

    def catch_up(self) -> None:
        catch_up(self.writer, self._root, "doc", stores.NullObserver())

    def restart(self) -> None:
        self.writer.close()
        self.writer = StoreWriter(self.path)

    @property
    def record(self) -> ViewRecord:
        record = self.writer.record("doc")
        assert record is not None
        return record

    def check(self, state: State) -> None:
        """Assert that the node serves exactly this state."""
        assert self.record.view_schema == state.view
        result = self.reader.lookup(["doc:*"], {"doc_id": [*KEYS, "no such key"]})
        assert result.version == self.writer.version().id
        found = [state.rows.get(key) for key in [*KEYS, "no such key"]]
        assert result.views["doc"].status.tolist() == [Status.PRESENT if row else Status.NOT_FOUND for row in found]
        times = [row[0].replace(tzinfo=None) if row else None for row in found]
        assert result.views["doc"].event_timestamps.tolist() == times
        for column, feature in zip(result.columns, state.view.features, strict=True):
            array = column.to_arrow()
            array.validate(full=True)
            values = [row[1].get(feature.name) if row else None for row in found]
            assert [plain(value) for value in array.to_pylist()] == comparable(values, feature.type)
        assert len(self.record.overlays) <= MAX_OVERLAYS + 1

    def verify(self) -> None:
        assert [checked for checked in verify_store(self.path) if checked.problem] == []


class Loading(RuleBasedStateMachine):
    """One log, one node that runs through every possible event, and nodes that start late."""

    def __init__(self) -> None:
        super().__init__()
        self._directory = Path(tempfile.mkdtemp(prefix="model-"))
        self._root = ExportRoot(self._directory / "root")
        self._states: dict[int, State] = {}
        self._features = 0

    def teardown(self) -> None:
        if self._states:
            self._node.verify()
            self._node.writer.close()
        shutil.rmtree(self._directory)

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        features = tuple(self._new_feature(data) for _ in range(3))
        view = stores.schema("doc", a="bool").model_copy(update={"features": features})
        self._publish_snapshot(data, State(view, {}))
        self._node = Node(self._directory / "node", self._root)

    # --- the log ----------------------------------------------------------------------------------------------

    @rule(data=st.data(), changes=st.booleans())
    def publish_snapshot(self, data: st.DataObject, changes: bool) -> None:
        before = self._newest
        self._publish_snapshot(data, State(self._successor(data, before.view) if changes else before.view, before.rows))

    @rule(data=st.data(), changes=st.sampled_from([False, False, True]))
    def publish_delta(self, data: st.DataObject, changes: bool) -> None:
        before = self._newest
        view = self._successor(data, before.view) if changes else before.view
        rows = dict(before.rows)
        changed = data.draw(st.dictionaries(st.sampled_from(KEYS), st.tuples(MINUTES, self._values(view)), max_size=6))
        dead = data.draw(
            st.dictionaries(st.sampled_from(KEYS).filter(lambda key: key not in changed), MINUTES, max_size=3)
        )
        for key, (minutes, values) in changed.items():
            if key not in rows or rows[key][0] <= _at(minutes):
                rows[key] = _at(minutes), values
        for key, minutes in dead.items():
            if key in rows and rows[key][0] <= _at(minutes):
                del rows[key]
        living = [{"doc_id": key, TIMESTAMP: _at(minutes), **values} for key, (minutes, values) in changed.items()]
        tombstones = [{"doc_id": key, TIMESTAMP: _at(minutes)} for key, minutes in dead.items()]
        manifest = stores.publish_delta(self._root, view, living, tombstones)
        self._states[manifest.seq] = State(view, rows)

    @rule()
    def prune_log(self) -> None:
        newest = self._root.newest_snapshot("doc")
        assert newest is not None
        for seq in self._root.sequence_numbers("doc"):
            if seq < newest.seq:
                manifest = self._root.entry("doc", seq)
                shutil.rmtree(self._root.path / "doc" / "deltas" / f"{seq:012d}")
                if manifest.kind == "snapshot":
                    shutil.rmtree(self._root.directory(manifest))

    # --- the node ---------------------------------------------------------------------------------------------

    @rule()
    def catch_up(self) -> None:
        self._node.catch_up()
        if not self._node.record.pinned:
            assert self._node.record.applied_seq == max(self._states)

    @rule()
    def merge(self) -> None:
        before = len(self._node.record.overlays)
        merged = merge_overlays(self._node.writer, "doc")
        assert (len(self._node.record.overlays) < before) == merged

    @rule()
    def fold(self) -> None:
        assert fold(self._node.writer, "doc")
        assert self._node.record.overlays == ()

    @precondition(lambda self: not self._node.record.pinned)
    @rule(data=st.data())
    def fold_while_following(self, data: st.DataObject) -> None:
        def meanwhile(_: int) -> None:
            if not followed:
                followed.append(True)
                self.publish_delta(data, False)
                self._node.catch_up()

        self._node.catch_up()
        followed: list[bool] = []
        fold(self._node.writer, "doc", meanwhile)

    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        known = [self._node.record.base, *self._node.record.kept]
        base = data.draw(st.sampled_from(known).map(lambda base: base))
        roll_back(self._node.writer, "doc", base.id)
        assert (self._node.record.pinned, self._node.record.applied_seq) == (True, base.last_seq)

    @rule()
    def follow_again(self) -> None:
        follow_again(self._node.writer, "doc")
        assert not self._node.record.pinned

    @rule()
    def restart(self) -> None:
        self._node.restart()

    @rule()
    def start_another_node(self) -> None:
        path = self._directory / "another"
        node = Node(path, self._root)
        assert node.record.applied_seq == max(self._states)
        node.check(self._newest)
        node.writer.close()
        del node
        shutil.rmtree(path)

    @invariant()
    def the_node_serves_its_seq(self) -> None:
        if self._states:
            self._node.check(self._states[self._node.record.applied_seq])

    # --- the model --------------------------------------------------------------------------------------------

    @property
    def _newest(self) -> State:
        return self._states[max(self._states)]

    def _publish_snapshot(self, data: st.DataObject, state: State) -> None:
        rows = dict(state.rows)
        for key in data.draw(st.sets(st.sampled_from(KEYS), max_size=3)):
            rows.pop(key, None)
        changed = data.draw(
            st.dictionaries(st.sampled_from(KEYS), st.tuples(MINUTES, self._values(state.view)), max_size=8)
        )
        rows |= {key: (_at(minutes), values) for key, (minutes, values) in changed.items()}
        living = [{"doc_id": key, TIMESTAMP: at, **values} for key, (at, values) in rows.items()]
        manifest = stores.publish_snapshot(self._root, state.view, living)
        self._states[manifest.seq] = State(state.view, rows)

    def _new_feature(self, data: st.DataObject) -> Feature:
        # Feature names are never reused: a node may keep or drop the values of a removed feature.
        self._features += 1
        return Feature(name=f"f{self._features}", type=data.draw(st.sampled_from(TYPES)))

    def _successor(self, data: st.DataObject, view: ViewSchema) -> ViewSchema:
        features = list(view.features)
        wider = [number for number, feature in enumerate(features) if feature.type in WIDER]
        change = data.draw(st.sampled_from(["add", "remove", "widen", "shuffle"]))
        if change == "widen" and wider:
            number = data.draw(st.sampled_from(wider))
            of = data.draw(st.sampled_from(WIDER[features[number].type]))
            features[number] = Feature(name=features[number].name, type=of)
        elif change == "remove" and len(features) > 1:
            features.pop(data.draw(st.integers(0, len(features) - 1)))
        elif change == "shuffle":
            features = data.draw(st.permutations(features))
        else:
            features.insert(data.draw(st.integers(0, len(features))), self._new_feature(data))
        return view.model_copy(update={"features": tuple(features)})

    def _values(self, view: ViewSchema) -> st.SearchStrategy[Row]:
        return st.fixed_dictionaries({feature.name: st.none() | VALUES[feature.type] for feature in view.features})


def _at(minutes: int) -> datetime:
    return NOW + timedelta(minutes=minutes)


TestLoading = Loading.TestCase
TestLoading.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
