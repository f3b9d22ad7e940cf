"""Both storages of an export root behave the same, and S3 applies each change once, whatever happens to requests and
answers."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from shoal.engine.base.errors import (
    FileDamaged,
    ManifestInvalid,
    NotPublished,
    PublicationLost,
    RootNotWritable,
    RootUnreadable,
    SettingsInvalid,
)
from shoal.engine.format.schema import FeatureService
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.open_storage import storage_at
from tests import stores
from tests.faulty_network import FaultyNetwork
from tests.s3 import server
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
    won = list[str]()
    lost = list[str]()
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
    # Three ranges of 8 MiB. Two of them are resumed where they were cut.
    assert len(network.requests) - before == 5
    assert storage.read("doc/deltas/001/manifest") == content[:200_000]
    assert [fault.met for fault in (*cuts, slow)] == [2, 1, 1]


def test_a_server_that_only_fails_is_named(local: ExportRoot, address: str, network: FaultyNetwork) -> None:
    entry = stores.publish_snapshot(local, VIEW, ROWS, files=1)
    remote = ExportRoot(address)
    bring(local, remote, entry)
    cut = network.fail(cut=0, times=float("inf"), text="part-")
    with pytest.raises(RootUnreadable, match=r"s3://features/roots/.*/part-00000.parquet: the request to S3 failed"):
        remote.checked_file(entry, entry.files[0])
    assert cut.met == 5
    network.fail(status=503, times=float("inf"))
    with pytest.raises(RootUnreadable, match="S3 answers 503 SlowDown: by the tests"):
        remote.entry("doc", 1)


def test_an_object_that_is_damaged_on_the_server_is_the_fault_of_its_entry(
    local: ExportRoot, remote: ExportRoot, disk: Path
) -> None:
    entry = stores.publish_snapshot(local, VIEW, ROWS, files=1)
    mirror(local, remote)
    server.turn_a_byte(disk, remote.where(entry, entry.files[0]))
    server.turn_a_byte(disk, remote.storage.where("doc/deltas/000000000001/manifest.json"))
    with pytest.raises(FileDamaged, match=r"part-00000.parquet (has the checksum|cannot be read: its bytes changed)"):
        remote.checked_file(entry, entry.files[0])
    with pytest.raises(ManifestInvalid, match="cannot be read: its bytes changed after they were written"):
        remote.entry("doc", 1)


@pytest.mark.parametrize(
    ("status", "code"), [(403, "AccessDenied"), (403, "InvalidObjectState"), (400, "KMS.DisabledException")]
)
def test_an_object_that_s3_does_not_give_is_the_fault_of_its_entry(
    local: ExportRoot, address: str, network: FaultyNetwork, status: int, code: str
) -> None:
    entry = stores.publish_snapshot(local, VIEW, ROWS, files=1)
    remote = ExportRoot(address)
    mirror(local, remote)
    assert remote.entry("doc", 1) == entry
    parts = [network.fail(method=method, text="part-", status=status, code=code, times=9) for method in ("GET", "HEAD")]
    for read in (remote.checked_file, remote.open_file):
        with pytest.raises(FileDamaged, match=f"{status}"):
            read(entry, entry.files[0])
    parts[1].times = 0
    with pytest.raises(FileDamaged, match=code):
        remote.checked_file(entry, entry.files[0])
    with pytest.raises(FileDamaged, match=code):
        remote.open_file(entry, entry.files[0]).read()
    network.fail(text="snapshots/", status=status, code=code, times=9)
    with pytest.raises(ManifestInvalid, match=code):
        remote.newest_snapshot("doc")
    # If S3 returns no other object either, the credentials are at fault.
    for method in ("GET", "HEAD"):
        network.fail(method=method, status=403, code="AccessDenied", times=9)
    with pytest.raises(RootUnreadable, match="check the credentials"):
        remote.entry("doc", 1)


class _Page(BaseHTTPRequestHandler):
    """A web server that has a page for every path."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html><br>welcome")


@contextmanager
def web_server(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("handler", [SimpleHTTPRequestHandler, _Page])
def test_a_server_that_is_no_s3_is_told(
    address: str, monkeypatch: pytest.MonkeyPatch, handler: type[BaseHTTPRequestHandler]
) -> None:
    with web_server(handler) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        root = ExportRoot(address)
        asked: list[Callable[[], object]] = [root.check_exists, root.views, lambda: root.sequence_numbers("doc")]
        for ask in asked:
            with pytest.raises(RootUnreadable, match="if the server is not S3, correct AWS_ENDPOINT_URL"):
                ask()
        with pytest.raises(RootNotWritable, match="if the server is not S3, correct AWS_ENDPOINT_URL"):
            root.storage.replace("services.json", b"")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("AWS_ENDPOINT_URL", "localhost:9000", "Invalid endpoint: localhost:9000; set AWS_ENDPOINT_URL"),
        ("AWS_ENDPOINT_URL_S3", "http://", "Invalid endpoint: http://; set AWS_ENDPOINT_URL"),
        ("AWS_PROFILE", "nobody", r"The config profile \(nobody\) could not be found; check the AWS_ variables"),
    ],
)
def test_settings_that_let_no_client_be_made_are_told_at_once(
    address: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsInvalid, match=message):
        ExportRoot(address)


@pytest.mark.parametrize("address", ["s3:/b/p", "S3://b/p", "s3a://b/p", "gs://b/p", "file:///b/p", "https://b/p"])
def test_an_address_that_is_no_root_is_not_taken_for_a_directory(address: str) -> None:
    with pytest.raises(SettingsInvalid, match=r"give a directory, or s3://BUCKET/PREFIX"):
        ExportRoot(address)
    assert ExportRoot(f"./{address}").path == Path(address).absolute()


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
    with pytest.raises(RootUnreadable, match="check the credentials"):
        ExportRoot(address).check_exists()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(RootUnreadable, match="credentials"):
        ExportRoot(address).check_exists()


def test_without_boto3_an_address_in_s3_says_what_to_install() -> None:
    code = "import sys; sys.modules['boto3'] = None; from shoal import cli; cli.main()"
    command = [sys.executable, "-c", code, "verify", "s3://bucket/prefix"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "pip install 'shoal[s3]'" in done.stderr) == (2, True), done.stderr
