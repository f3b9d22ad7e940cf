"""The two places of an export root do the same, and S3's does it once, whatever becomes of requests and answers."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine.errors import FileDamaged, NotPublished, PublicationLost, RootNotWritable, RootUnreadable, SettingsInvalid
from engine.export_root import ExportRoot
from engine.schema import FeatureService
from engine.storage import storage_at
from tests import stores
from tests.faulty_network import FaultyNetwork
from tests.s3.mirroring import bring, mirror, upload_files

VIEW = stores.schema("doc", a="int32")
ROWS: list[stores.Row] = [{"doc_id": str(number), "a": number} for number in range(30)]


@pytest.fixture
def local(tmp_path: Path) -> ExportRoot:
    return ExportRoot(tmp_path / "root")


@pytest.mark.parametrize("place", ["directory", "s3"])
def test_a_storage_does_what_an_export_root_asks_of_it(place: str, address: str, tmp_path: Path) -> None:
    storage = storage_at(address if place == "s3" else tmp_path / "root")
    with pytest.raises(NotPublished):
        storage.check_exists()
    assert (storage.directories(), list(storage.files("doc"))) == ([], [])
    for number in (2, 10, 1):
        storage.create(f"doc/deltas/{number:03d}/m", b"%d" % number)
    storage.check_exists()
    storage.replace("doc/deltas/005/other", b"x" * 100_000)
    storage.replace("other/deltas/001/m", b"")
    assert sorted(name for name in storage.directories() if not name.startswith(".")) == ["doc", "other"]
    assert storage.published("doc/deltas", "m") == ["001", "002", "010"]
    assert storage.published("doc/deltas", "m", since="002") == ["002", "010"]
    assert storage.published("doc/snapshots", "m") == []
    assert (storage.has_directory("doc/deltas"), storage.has_directory("doc/delta")) == (True, False)
    assert (storage.holds("doc/deltas/001/m"), storage.holds("doc/deltas/001/n")) == (True, False)
    with pytest.raises(FileExistsError):
        storage.create("doc/deltas/001/m", b"again")
    assert storage.read("doc/deltas/001/m") == storage.read("doc/deltas/001/m") == b"1"
    storage.replace("doc/deltas/001/m", b"one")
    assert storage.read("doc/deltas/001/m") == b"one"
    with storage.open("doc/deltas/005/other") as stream:
        assert (stream.seek(-3, os.SEEK_END), stream.read()) == (99_997, b"xxx")
    with storage.fetch("doc/deltas/005/other", 100_000) as stream:
        assert (stream.read(), os.fstat(stream.fileno()).st_size) == (b"x" * 100_000, 100_000)
    found = {file.name: file.size for file in storage.files("doc/deltas")}
    assert found["doc/deltas/005/other"] == storage.size("doc/deltas/005/other") == 100_000
    storage.remove(["doc/deltas/005/other", "doc/deltas/001/m", "doc/deltas/001/m"])
    for absent in (storage.read, storage.size, storage.open):
        with pytest.raises(FileNotFoundError):
            absent("doc/deltas/001/m")
    assert {file.name for file in storage.files("doc/deltas")} == {"doc/deltas/002/m", "doc/deltas/010/m"}


def test_an_entry_is_read_as_it_was_published(local: ExportRoot, remote: ExportRoot) -> None:
    snapshot = stores.publish_snapshot(local, VIEW, ROWS)
    stores.publish_delta(local, VIEW, ROWS[:3], ROWS[5:6])
    local.publish_services((FeatureService(name="all", features=("doc:*",)),))
    mirror(local, remote)
    assert (remote.views(), remote.sequence_numbers("doc")) == (["doc"], [1, 2])
    assert [remote.entry("doc", seq) for seq in (1, 2)] == [local.entry("doc", seq) for seq in (1, 2)]
    assert remote.newest_snapshot("doc") == snapshot
    assert remote.services() == local.services()
    assert not ExportRoot(f"{remote}0").views(), "what begins with the same letters is another root"
    file = snapshot.files[0]
    for content, damage in ((b"short", "has 5 bytes"), (b"x" * file.bytes, "has the checksum")):
        remote.storage.replace(f"doc/snapshots/{snapshot.snapshot_id}/{file.path}", content)
        with pytest.raises(FileDamaged, match=damage):
            remote.checked_file(snapshot, file)
    remote.storage.remove([f"doc/snapshots/{snapshot.snapshot_id}/{file.path}"])
    with pytest.raises(FileDamaged, match="is missing"):
        remote.checked_file(snapshot, file)


def test_of_many_exporters_of_one_seq_one_wins(local: ExportRoot, address: str) -> None:
    entry = stores.publish_snapshot(local, VIEW, ROWS)
    entries = [entry.model_copy(update={"id": f"{number:032x}", "job": f"job {number}"}) for number in range(8)]
    won, lost = list[str](), list[str]()
    start = threading.Barrier(len(entries))

    def publish(number: int) -> None:
        root = ExportRoot(address)
        upload_files_of(root, number)
        start.wait()
        try:
            root.publish(entries[number])
            won.append(entries[number].id)
        except PublicationLost as error:
            lost.append(str(error))

    def upload_files_of(root: ExportRoot, number: int) -> None:
        for file in entry.files:
            content = (local.directory(entry) / file.path).read_bytes()
            root.storage.replace(f"doc/snapshots/{entries[number].snapshot_id}/{file.path}", content)

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(len(entries))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    root = ExportRoot(address)
    assert won == [root.entry("doc", 1).id]
    assert len(lost) == 7
    assert all("published meanwhile by job" in loss for loss in lost)
    assert [root.snapshot("doc", name).id for name in root.snapshot_ids("doc")] == won


def test_a_manifest_whose_answer_was_lost_is_published_once(
    local: ExportRoot, address: str, network: FaultyNetwork
) -> None:
    entry = stores.publish_snapshot(local, VIEW, ROWS)
    fault = network.fail(method="PUT", text="deltas/000000000001/manifest.json", lost=True)
    remote = ExportRoot(address)
    bring(local, remote, entry)
    assert (fault.met, remote.entry("doc", 1)) == (1, entry)
    other = entry.model_copy(update={"id": "0" * 32})
    upload_files(local, remote, entry)
    with pytest.raises(PublicationLost):
        remote.publish(other)


def test_a_server_that_ignores_the_condition_is_found_out(
    local: ExportRoot, address: str, network: FaultyNetwork
) -> None:
    entry = stores.publish_snapshot(local, VIEW, ROWS)
    network.fail(method="PUT", status=200, times=float("inf"))
    with pytest.raises(RootNotWritable, match="If-None-Match"):
        ExportRoot(address).publish(entry)
    assert ExportRoot(address).sequence_numbers("doc") == []


@pytest.mark.parametrize("status", [500, 503])
def test_a_busy_server_is_asked_again(local: ExportRoot, address: str, network: FaultyNetwork, status: int) -> None:
    entry = stores.publish_snapshot(local, VIEW, ROWS, files=1)
    faults = [network.fail(method=method, times=2, status=status) for method in ("GET", "PUT", "HEAD")]
    remote = ExportRoot(address)
    bring(local, remote, entry)
    assert remote.entry("doc", 1) == entry
    remote.checked_file(entry, entry.files[0]).close()
    assert [fault.met for fault in faults] == [2, 2, 2]


def test_a_view_is_dropped_as_from_a_directory(local: ExportRoot, remote: ExportRoot) -> None:
    stores.publish_snapshot(local, VIEW, ROWS)
    stores.publish_delta(local, VIEW, ROWS[:3])
    mirror(local, remote)
    for root in (local, remote):
        assert root.drop_view("doc") == 2
        assert (root.views(), root.dropped(), root.first_seq("doc")) == ([], {"doc": 2}, 3)
        assert list(root.storage.files("doc")) == []
    assert stores.publish_snapshot(local, VIEW, ROWS).seq == 3
    mirror(local, remote)
    assert (remote.views(), remote.sequence_numbers("doc")) == (["doc"], [3])


def test_bodies_that_are_cut_or_slow_are_read_on(address: str, network: FaultyNetwork) -> None:
    storage = storage_at(address)
    content = os.urandom(1 << 20) * 20
    storage.replace("doc/deltas/001/part", content)
    storage.replace("doc/deltas/001/manifest", content[:200_000])
    cuts = [network.fail(text="part", cut=1 << 20, times=2), network.fail(text="manifest", cut=100_000)]
    slow = network.fail(text="part", slow=0.01)
    before = len(network.requests)
    with storage.fetch("doc/deltas/001/part", len(content)) as stream:
        assert stream.read() == content
    # Three ranges of 8 MiB, two of which go on where they were cut.
    assert len(network.requests) - before == 5
    assert storage.read("doc/deltas/001/manifest") == content[:200_000]
    assert [fault.met for fault in (*cuts, slow)] == [2, 1, 1]


def test_a_server_that_only_fails_is_named(local: ExportRoot, address: str, network: FaultyNetwork) -> None:
    entry = stores.publish_snapshot(local, VIEW, ROWS, files=1)
    remote = ExportRoot(address)
    bring(local, remote, entry)
    cut = network.fail(cut=0, times=float("inf"), text="part-")
    with pytest.raises(RootUnreadable, match=r"s3://features/roots/.*/part-00000.parquet: S3 cannot be asked"):
        remote.checked_file(entry, entry.files[0])
    assert cut.met == 5
    network.fail(status=503, times=float("inf"))
    with pytest.raises(RootUnreadable, match="S3 answers 503 SlowDown: by the tests"):
        remote.entry("doc", 1)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://", "names no bucket"),
        ("s3://UPPER/x", "names no bucket"),
        ("s3://missing-bucket/x", "NoSuchBucket"),
    ],
)
def test_an_address_that_leads_nowhere(endpoint: str, address: str, message: str) -> None:
    with pytest.raises((SettingsInvalid, RootUnreadable), match=message):
        ExportRoot(address).check_exists()


def test_credentials_that_are_wrong_or_missing(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(RootUnreadable, match="see to the credentials"):
        ExportRoot(address).check_exists()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(RootUnreadable, match="credentials"):
        ExportRoot(address).check_exists()


def test_without_boto3_an_address_in_s3_says_what_to_install() -> None:
    code = "import sys; sys.modules['boto3'] = None; import cli; cli.main()"
    command = [sys.executable, "-c", code, "verify", "s3://bucket/prefix"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "pip install 'shoal[s3]'" in done.stderr) == (2, True), done.stderr
