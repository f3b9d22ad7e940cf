"""Damage that the scrub finds is noted, no longer served, never copied, and repaired. After a restart, the scrub
continues where the previous one stopped."""

import gc
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from shoal import FeatureStore
from shoal.engine.base.errors import GenerationNotKept, StoreDamaged, StoreFull, ViewDamaged
from shoal.engine.format.catalog import SegmentRecord
from shoal.engine.format.paths import generation_path
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.status.scrubbed import read_scrubbed, scrubbed_path
from shoal.engine.status.store import describe_version
from shoal.loaders.apply import compaction
from shoal.loaders.apply.compaction import fold
from shoal.loaders.apply.entries import roll_back
from shoal.loaders.backup.verify import verify_store
from shoal.loaders.commit.store_writer import StoreWriter
from shoal.loaders.follow.load import catch_up
from shoal.loaders.follow.reload import ReloadOrder, reload_view
from shoal.loaders.push.push import push_rows
from shoal.loaders.scrub.scrub import Scrub, no_scrub
from tests import stores
from tests.engine.test_damage import no_more_descriptors

VIEW = stores.schema("doc", key="int64", a="int64", text="string")
OTHER = stores.schema("other", key="int64", a="int64")
DAY = 86_400.0
CHUNKS = 5
KEYS = {"doc_id": [0, 1, 20, 39], "other_id": 1}
WHOLE = [3, 3, 2, 2]


def rows(value: int, *keys: int) -> list[stores.Row]:
    return [{"doc_id": key, "a": value, "text": f"{value}/{key} " * 30} for key in keys]


@pytest.fixture
def root(tmp_path: Path) -> ExportRoot:
    root = ExportRoot(tmp_path / "root")
    stores.publish_snapshot(root, VIEW, rows(1, *range(40)))
    stores.publish_snapshot(root, OTHER, [{"other_id": 1, "a": 1}])
    return root


@pytest.fixture
def store(tmp_path: Path, root: ExportRoot) -> Iterator[Path]:
    """A store with two views: `doc` has a base, an overlay and a kept generation."""
    stores.load(tmp_path / "store", root)
    stores.publish_snapshot(root, VIEW, rows(2, *range(40)))
    stores.publish_delta(root, VIEW, rows(3, *range(20)), files=1)
    stores.load(tmp_path / "store", root)
    gc.collect()
    yield tmp_path / "store"
    gc.collect()


@pytest.fixture
def writer(store: Path) -> Iterator[StoreWriter]:
    with StoreWriter(store) as writer:
        yield writer


def segment_of(writer: StoreWriter, which: str) -> SegmentRecord:
    record = writer.record("doc")
    assert record is not None
    return {"base": (record.base,), "overlay": record.overlays, "kept": record.kept}[which][0]


def turn_bit(writer: StoreWriter, which: str) -> SegmentRecord:
    """Change a byte of a value, so that only a checksum can find it, and return the segment."""
    segment = segment_of(writer, which)
    value = {"base": b"2/39 2/39", "overlay": b"3/1 3/1", "kept": b"1/39 1/39"}[which]
    if which == "overlay":
        with writer.overlay_chunk(segment, 0) as found:
            assert found is not None
            path = found[0]
            content = bytes(found[1])
        at = path.read_bytes().index(content) + content.index(value)
    else:
        path = generation_path(writer.store, "doc", segment.id) / "data.mdb"
        at = path.read_bytes().index(value)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"7")
    return segment


def scrub(writer: StoreWriter) -> list[str]:
    """Verify the whole store, as after an unclean shutdown, and return the views found damaged."""
    scrubbed_path(writer.store).unlink(missing_ok=True)
    found: list[str] = []
    one = Scrub(writer, DAY, found.append)
    while one._scrubbed.suspect_chunks:
        one._step()
    return found


def seen(reader: FeatureStore, view: str = "doc") -> list[int]:
    values: list[int] = reader.lookup([f"{view}:a"], KEYS).to_pydict()[f"{view}:a"]
    return values


def check_whole(writer: StoreWriter) -> None:
    reader = FeatureStore.open(writer.store)
    assert seen(reader) == WHOLE
    assert reader.lookup(["doc:text"], KEYS).to_pydict()["doc:text"][3] == "2/39 " * 30
    version = reader.version()
    assert (dict(version.troubles), dict(version.damaged), dict(version.noted)) == ({}, {}, {})
    assert [checked for checked in verify_store(writer.store) if checked.problem] == []


def test_nothing_is_found_where_nothing_is_wrong(writer: StoreWriter) -> None:
    before = writer.version().id
    assert scrub(writer) == []
    assert writer.version().id == before
    check_whole(writer)


@pytest.mark.parametrize("which", ["base", "overlay"])
def test_what_is_damaged_is_served_by_nobody_until_it_is_repaired(
    writer: StoreWriter, root: ExportRoot, which: str
) -> None:
    reader = FeatureStore.open(writer.store)
    assert seen(reader) == WHOLE
    segment = turn_bit(writer, which)
    assert scrub(writer) == ["doc"]
    for one in (reader, FeatureStore.open(writer.store)):
        with pytest.raises(ViewDamaged, match=r"view 'doc' cannot be served: .*has the checksum"):
            seen(one)
        assert seen(one, "other") == [1] * 4
    (described, _) = describe_version(reader.version())["views"]
    assert segment.id in described["damage"]
    assert described["trouble"]["code"] == "StoreDamaged"
    with pytest.raises(ViewDamaged):
        push_rows(writer, "doc", {"doc_id": [1], "a": [9], "text": ["x"]})
    # The damage is reported only once, however often it is found.
    before = writer.version().id
    assert scrub(writer) == []
    assert writer.version().id == before
    applied = catch_up(writer, root, "doc", stores.NullObserver())
    assert [(entry.kind, entry.seq) for entry in applied] == [("snapshot", 2) if which == "base" else ("delta", 3)]
    assert seen(reader) == WHOLE
    check_whole(writer)


def test_base_and_overlay_are_repaired_one_after_the_other(writer: StoreWriter, root: ExportRoot) -> None:
    turn_bit(writer, "base")
    turn_bit(writer, "overlay")
    assert scrub(writer) == ["doc", "doc"]
    for _ in range(2):
        with suppress(StoreDamaged):
            catch_up(writer, root, "doc", stores.NullObserver())
    check_whole(writer)


def test_who_has_an_older_version_without_what_is_damaged_serves_that(writer: StoreWriter, root: ExportRoot) -> None:
    reader = FeatureStore.open(writer.store)
    assert seen(reader) == WHOLE
    stores.publish_snapshot(root, VIEW, rows(2, *range(40)))
    catch_up(writer, root, "doc", stores.NullObserver())
    turn_bit(writer, "base")
    assert scrub(writer) == ["doc"]
    assert seen(reader) == WHOLE
    assert set(reader.version().damaged) == {"doc"}
    gc.collect()


def test_without_a_root_it_stays_named_until_it_is_whole_again(store: Path) -> None:
    with StoreWriter(store) as writer:
        segment = segment_of(writer, "base")
        path = generation_path(store, "doc", segment.id) / "data.mdb"
        content = path.read_bytes()
        turn_bit(writer, "base")
        assert scrub(writer) == ["doc"]
    gc.collect()
    with StoreWriter(store) as writer:
        assert writer.version().troubles["doc"].code == "StoreDamaged"
        assert scrub(writer) == []
        with pytest.raises(ViewDamaged):
            seen(FeatureStore.open(store))
        # The operator puts the file back.
        path.write_bytes(content)
        one = Scrub(writer, DAY, lambda view: None)
        one._step()
        check_whole(writer)


def test_a_kept_generation_that_is_damaged_is_named_and_never_gone_back_to(
    writer: StoreWriter, root: ExportRoot
) -> None:
    kept = turn_bit(writer, "kept")
    assert scrub(writer) == ["doc"]
    reader = FeatureStore.open(writer.store)
    catch_up(writer, root, "doc", stores.NullObserver())
    assert seen(reader) == WHOLE
    (described, _) = describe_version(reader.version())["views"]
    assert (described["damage"], described["trouble"]) == (None, None)
    assert [note["id"] for note in described["damaged_kept"]] == [kept.id]
    with pytest.raises(GenerationNotKept, match=f"generation '{kept.id}' is damaged; go back to another"):
        roll_back(writer, "doc", kept.id)
    # The next snapshot removes the damaged generation.
    stores.publish_snapshot(root, VIEW, rows(5, *range(40)))
    catch_up(writer, root, "doc", stores.NullObserver())
    assert describe_version(reader.version())["views"][0]["damaged_kept"] == []
    assert not generation_path(writer.store, "doc", kept.id).exists()
    gc.collect()


def test_a_kept_generation_that_is_damaged_is_built_anew_where_the_log_leads_to_it(
    writer: StoreWriter, root: ExportRoot
) -> None:
    first = segment_of(writer, "kept").id
    newest = segment_of(writer, "base").id
    roll_back(writer, "doc", first)
    path = generation_path(writer.store, "doc", newest) / "data.mdb"
    with path.open("r+b") as file:
        file.seek(path.read_bytes().index(b"2/39 2/39"))
        file.write(b"7")
    assert scrub(writer) == ["doc"]
    reload_view(writer, root, "doc", ReloadOrder(view="doc"), stores.NullObserver())
    check_whole(writer)


def test_where_there_is_no_room_for_the_note_it_is_found_again(
    writer: StoreWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn_bit(writer, "base")
    one = Scrub(writer, DAY, lambda view: None)
    found = writer.note_damage

    def full(*_: object) -> bool:
        raise StoreFull("no room")

    monkeypatch.setattr(writer, "note_damage", full)
    for _ in range(5):
        assert one._step() in (0.0, 60.0)
    monkeypatch.setattr(writer, "note_damage", found)
    while one._scrubbed.suspect_chunks:
        one._step()
    assert set(writer.version().damaged) == {"doc"}


def test_that_the_system_does_not_let_it_read_is_no_damage(writer: StoreWriter) -> None:
    one = Scrub(writer, DAY, lambda view: None)
    with no_more_descriptors():
        assert one._step() == 60.0
    assert writer.version().damaged == {}
    check_whole(writer)


# --- while the store changes --------------------------------------------------------------------------------------


def test_a_segment_that_is_replaced_while_it_is_read_is_no_damage(writer: StoreWriter, root: ExportRoot) -> None:
    one = Scrub(writer, DAY, lambda view: None)
    before = [part for part in one._parts().values() if part.view == "doc"]
    reading = [(part, one._blocks(part, 0)) for part in before]
    assert len(reading) == 3
    for value in (4, 5, 6):
        stores.publish_snapshot(root, VIEW, rows(value, *range(40)))
        catch_up(writer, root, "doc", stores.NullObserver())
    for part in before:
        one._verify(part, 0, 1e9)
    assert (dict(writer.version().noted), writer.version().damaged) == ({}, {})


def test_nothing_is_found_while_snapshots_folds_and_merges_replace_everything(
    writer: StoreWriter, root: ExportRoot, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compaction, "FOLD_LEAST_ROWS", 0)
    found: list[str] = []
    one = Scrub(writer, 0.01, found.append)
    one.start()
    for value in range(10):
        stores.publish_delta(root, VIEW, rows(value, *range(value, value + 10)))
        push_rows(writer, "doc", {"doc_id": [1], "a": [value], "text": ["x"]})
        catch_up(writer, root, "doc", stores.NullObserver())
        if value % 3 == 0:
            fold(writer, "doc")
        if value % 4 == 0:
            stores.publish_snapshot(root, VIEW, rows(value, *range(40)))
            catch_up(writer, root, "doc", stores.NullObserver())
    one.stop()
    assert found == []
    assert all("all" in message and "verified" in message for message in caplog.messages), caplog.messages
    assert one._scrubbed.bytes_verified > 20_000


# --- wrong bytes are not copied -----------------------------------------------------------------------------------


def fold_it(writer: StoreWriter, root: ExportRoot) -> None:
    fold(writer, "doc")


def merge_it(writer: StoreWriter, root: ExportRoot) -> None:
    stores.publish_delta(root, VIEW, rows(4, *range(5, 15)))
    catch_up(writer, root, "doc", stores.NullObserver())


def push_it(writer: StoreWriter, root: ExportRoot) -> None:
    push_rows(writer, "doc", {"doc_id": list(range(15)), "a": [9] * 15, "text": ["x"] * 15})


@pytest.mark.parametrize(
    ("which", "copy"),
    [("base", fold_it), ("overlay", fold_it), ("overlay", merge_it), ("overlay", push_it)],
)
def test_what_is_damaged_is_not_copied_under_a_new_checksum(
    writer: StoreWriter, root: ExportRoot, which: str, copy: Callable[[StoreWriter, ExportRoot], None]
) -> None:
    segment = turn_bit(writer, which)
    with pytest.raises(StoreDamaged):
        copy(writer, root)
    record = writer.record("doc")
    assert record is not None
    assert segment in record.segments
    assert set(writer.version().damaged) == {"doc"}


def test_pushed_rows_that_are_damaged_do_not_outlive_a_snapshot(writer: StoreWriter, root: ExportRoot) -> None:
    push_rows(writer, "doc", {"doc_id": [1], "a": [3], "text": ["3/1 3/1 " * 30]})
    turn_bit(writer, "overlay")
    stores.publish_snapshot(root, VIEW, rows(2, *range(40)))
    for _ in range(3):
        with suppress(StoreDamaged):
            catch_up(writer, root, "doc", stores.NullObserver())
    texts = FeatureStore.open(writer.store).lookup(["doc:text"], KEYS).to_pydict()["doc:text"]
    assert not any("7" in text for text in texts)


# --- restarts of the writer ---------------------------------------------------------------------------------------


def times(store: Path) -> dict[str, tuple[float, ...]]:
    scrubbed = read_scrubbed(store)
    assert scrubbed is not None
    return dict(scrubbed.chunks)


def test_behind_an_orderly_stop_it_goes_on_where_it_was(writer: StoreWriter) -> None:
    first = Scrub(writer, DAY, lambda view: None)
    assert first._scrubbed.suspect_chunks == CHUNKS
    first.start()
    deadline = time.monotonic() + 30
    while first._scrubbed.suspect_chunks:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.stop()
    before = times(writer.store)
    second = Scrub(writer, DAY, lambda view: None)
    assert second._scrubbed.suspect_chunks == 0
    assert second._step() == 30.0, "there is nothing to do for hours"
    assert dict(second._scrubbed.chunks) == before
    assert second._scrubbed.bytes_verified == first._scrubbed.bytes_verified


def test_a_part_of_the_way_is_not_gone_again(writer: StoreWriter) -> None:
    first = Scrub(writer, DAY, lambda view: None)
    first._step()
    first.start()
    first.stop()
    second = Scrub(writer, DAY, lambda view: None)
    assert 0 < second._scrubbed.suspect_chunks < CHUNKS
    # All chunks are suspect again, and those not reached before come first.
    reached = {key for key, verified in times(writer.store).items() if max(verified) >= first._scrubbed.suspect_since}
    scrubbed_path(writer.store).write_bytes(scrubbed_path(writer.store).read_bytes().replace(b"true", b"false"))
    third = Scrub(writer, DAY, lambda view: None)
    assert third._scrubbed.suspect_chunks == CHUNKS
    third._step()
    (begun,) = (key for key, now in third._scrubbed.chunks.items() if max(now) >= third._scrubbed.suspect_since)
    assert begun not in reached


@pytest.mark.parametrize(
    "what", ["missing", "empty", "of another kind", "of a writer that died", "of a writer without"]
)
def test_whatever_does_not_say_that_the_stop_was_orderly_has_all_verified(writer: StoreWriter, what: str) -> None:
    first = Scrub(writer, DAY, lambda view: None)
    while first._scrubbed.suspect_chunks:
        first._step()
    first.start()
    if what != "of a writer that died":
        first.stop()
        assert Scrub(writer, DAY, lambda view: None)._scrubbed.suspect_chunks == 0
    path = scrubbed_path(writer.store)
    if what == "missing":
        path.unlink()
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "of another kind":
        path.write_bytes(b'{"clean": true, "format": 2}')
    elif what == "of a writer without":
        no_scrub(writer)
    assert Scrub(writer, DAY, lambda view: None)._scrubbed.suspect_chunks == CHUNKS
    first.stop()


def test_a_run_directory_that_is_gone_holds_nothing_up(writer: StoreWriter) -> None:
    one = Scrub(writer, DAY, lambda view: None)
    shutil.rmtree(scrubbed_path(writer.store).parent)
    one.start()
    one.stop()
    assert read_scrubbed(writer.store) is None
