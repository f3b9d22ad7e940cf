"""For any content of a document, Shoal reads what it says, or raises one error that names the document."""

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal import FeatureStore
from shoal.engine.base import errors
from shoal.engine.base.errors import (
    ManifestInvalid,
    SettingsInvalid,
    ShoalError,
    StoreDamaged,
    TokenInvalid,
)
from shoal.engine.format import catalog
from shoal.engine.process.control import WriterClient, error_in, listen_unix, writer_socket_path
from shoal.engine.process.run_directory import ServerRecord, run_path, started_at
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import FeatureServices, Manifest, seal, unseal
from shoal.engine.server.tokens import parse_tokens
from shoal.engine.status.processes import describe_server
from tests import stores
from tests.engine.test_control import answer_once
from tests.every_type import ITEMS, SERVICE, item_rows

EXAMPLES = int(os.environ.get("SHOAL_FUZZ_EXAMPLES", "100"))
fuzzed = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.sampled_from([None, True, 0, -1, 1, 2**31, 2**63, -(2**63), 2**64 - 1, 10**400, 1.5, 1e300])
    | st.sampled_from(["", "a", "..", "\0", "/", "1h", "P9999999999D", "0" * 16, "f" * 32, "é\u2028", [], {}])
    | st.sampled_from(["2026-01-01T00:00:00", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59.999999-14:00"])
    | st.sampled_from(["float32[99999]", "int64", "snapshot", "delta"])
    | st.text(max_size=5)
    | st.integers()
    | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@contextmanager
def may_be_refused(kind: type[ShoalError], name: str) -> Iterator[None]:
    """Assert that the block succeeds, or raises an error of a kind that names the document."""
    try:
        yield
    except kind as error:
        if name not in str(error):
            raise AssertionError(f"{name!r} is not named") from error


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """Return a document in which some members were changed, removed or added, at any depth."""
    content = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        place = content
        while True:
            steps: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not steps:
                break
            step = draw(st.sampled_from(steps))
            inner = place[step]
            if isinstance(inner, dict | list) and inner and draw(st.booleans()):
                place = inner
                continue
            what = draw(st.sampled_from(["change", "change", "change", "remove", "add"]))
            if what == "remove":
                del place[step]
            elif what == "add" and isinstance(place, dict):
                place[draw(st.text(max_size=4))] = draw(VALUES)
            else:
                place[step] = draw(VALUES)
            break
    return content


@st.composite
def bent(draw: st.DrawFn, data: bytes) -> bytes:
    """Return bytes in which some were replaced, removed or inserted."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        cut = draw(st.integers(0, 8))
        data = data[:at] + draw(st.binary(max_size=6)) + data[at + cut :]
    return data


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> ExportRoot:
    root = ExportRoot(tmp_path_factory.mktemp("documents") / "root")
    stores.publish_snapshot(root, ITEMS, item_rows(5))
    stores.publish_delta(root, ITEMS, item_rows(3), [{"items_id": "gone"}])
    return root


def sealed(content: Any) -> bytes:
    """Return a document with its correct checksum, or without one if the content cannot have one."""
    try:
        return stores.sealed(content)
    except (TypeError, AttributeError):
        return json.dumps(content).encode()


@fuzzed
@given(data=st.data(), seq=st.sampled_from([1, 2]))
def test_manifests_that_say_other_things(root: ExportRoot, data: st.DataObject, seq: int) -> None:
    content = data.draw(changed(root.entry("items", seq).model_dump(mode="json")))
    with may_be_refused(ManifestInvalid, "manifest.json"):
        manifest = unseal(sealed(content), Manifest, "manifest.json")
        seal(manifest)
        assert manifest.published_at.tzinfo is not None
        assert manifest.watermark is None or manifest.watermark.tzinfo is not None


@fuzzed
@given(data=st.data())
def test_manifests_of_other_bytes(root: ExportRoot, data: st.DataObject) -> None:
    valid = seal(root.entry("items", 1))
    content = data.draw(
        st.one_of(bent(valid), st.binary(max_size=60), VALUES.map(lambda value: json.dumps(value).encode()))
    )
    with may_be_refused(ManifestInvalid, "manifest.json"):
        # Whitespace between members has no meaning.
        assert unseal(content, Manifest, "manifest.json") == root.entry("items", 1)
    with pytest.raises(ManifestInvalid, match=r"services\.json"):
        unseal(content, FeatureServices, "services.json")


@pytest.mark.parametrize("nested", [b"[" * 300, b'{"a":' * 300, b"[" * 100_000])
def test_deep_documents(nested: bytes) -> None:
    closing = nested.replace(b"[", b"]").replace(b'{"a":', b"}")
    for content in (nested, b'{"view":' + nested + b"1" * nested.startswith(b"{") + closing + b"}"):
        with pytest.raises(ManifestInvalid, match=r"manifest\.json"):
            unseal(content, Manifest, "manifest.json")


@fuzzed
@given(data=st.data())
def test_services_that_say_other_things(data: st.DataObject) -> None:
    content = data.draw(changed(FeatureServices(services=(SERVICE,)).model_dump(mode="json")))
    with may_be_refused(ManifestInvalid, "services.json"):
        unseal(sealed(content), FeatureServices, "services.json")


@fuzzed
@given(names=st.lists(st.binary(min_size=1, max_size=12).filter(lambda name: not {0, 47} & {*name}), max_size=4))
def test_a_root_with_directories_of_any_names(tmp_path_factory: pytest.TempPathFactory, names: list[bytes]) -> None:
    root = ExportRoot(tmp_path_factory.mktemp("root"))
    for name in names:
        if name not in (b".", b".."):
            for part in (b"deltas", b"snapshots"):
                os.makedirs(os.path.join(os.fsencode(root.path), name, part, name), exist_ok=True)
    for view in root.views():
        view.encode()
        assert root.sequence_numbers(view) == []
        assert root.newest_snapshot(view) is None


@pytest.fixture(scope="module")
def record(root: ExportRoot, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    store = tmp_path_factory.mktemp("catalog") / "store"
    stores.load(store, root)
    return FeatureStore.open(store).version().view("items").record.model_dump(mode="json")


@fuzzed
@given(data=st.data())
def test_records_of_the_catalog(record: dict[str, Any], data: st.DataObject) -> None:
    encoded = orjson.dumps(record)
    content = data.draw(st.one_of(bent(encoded), changed(record).map(lambda value: json.dumps(value).encode())))
    with may_be_refused(StoreDamaged, "contains an invalid"):
        read = catalog.decode_view(content)
        assert abs(read.applied_at - read.published_at) >= timedelta(0)


@fuzzed
@given(data=st.data())
def test_records_of_a_server(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """The record is of a running server, which is this process."""
    store = tmp_path_factory.mktemp("record")
    run_path(store).mkdir()
    valid = ServerRecord(
        pid=os.getpid(), started_at=started_at(os.getpid()), address="http://x", workers=(1, 2), writer=3
    )
    text = valid.model_dump_json().encode()
    member = st.sampled_from(["pid", "started_at", "address", "workers", "writer"])
    numbers = st.sampled_from([-1, 0, 2**31, 2**63, 2**64, 1e300, None, "x", [-1], [2**70], [0]])
    others = st.tuples(member, numbers).map(lambda pair: json.dumps(json.loads(text) | {pair[0]: pair[1]}).encode())
    (run_path(store) / "server.json").write_bytes(data.draw(others | bent(text) | st.binary(max_size=20)))
    described = describe_server(store)
    assert described is None or isinstance(described["processes"], list)


ANSWERS: list[Any] = [
    {"views": [{"view": "x", "applied": []}]},
    {"error": {"code": "NotPublished", "message": "no"}},
    {"error": {"code": "UnknownFeature", "message": "no"}},
    {"error": {"code": "FeastBodyInvalid", "message": "no"}},
]


@settings(max_examples=min(EXAMPLES, 300), deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), status=st.sampled_from([200, 400, 500, 204, 302, 999]))
def test_answers_on_the_control_socket(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, status: int
) -> None:
    valid = data.draw(st.sampled_from(ANSWERS))
    body = data.draw(changed(valid).map(json.dumps) | st.just(json.dumps(valid)) | st.text(max_size=9))
    store = tmp_path_factory.mktemp("socket")
    with listen_unix(writer_socket_path(store)) as listener:
        listener.setblocking(True)
        answering = threading.Thread(target=answer_once, args=(listener, status, body))
        answering.start()
        try:
            answer = asyncio.run(WriterClient(store).reload("x"))
        except ShoalError:
            answer = {}
        answering.join()
    assert isinstance(answer, dict)


@fuzzed
@given(
    text=st.text(max_size=60)
    | st.lists(st.sampled_from(["read", "push,read", "sha256:", "a" * 16, "#", "\n", " ", "é", "0" * 64, ","])).map(
        "".join
    )
)
def test_tokens_of_any_text(text: str) -> None:
    with may_be_refused(SettingsInvalid, "the file"):
        tokens = parse_tokens(text, "the file")
        with pytest.raises(TokenInvalid):
            tokens.check("Bearer nobody", "read")


def test_every_error_that_a_writer_may_send_comes_back_as_itself() -> None:
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, ShoalError):
            met = error_in({"error": {"code": kind.__name__, "message": "why"}})
            assert (type(met), str(met)) == (kind, "why")
