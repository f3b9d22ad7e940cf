"""The client against a real server: answer formats, pushes, errors, deadlines, tokens, TLS, forks and threads."""

import asyncio
import gc
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pandas
import psutil
import pyarrow as pa
import pytest

from shoal.client import Client, DeadlineExceeded, ServerError
from shoal.client import errors as client_errors
from shoal.client.aio import AsyncClient
from shoal.client.arrow import ArrowAnswer
from shoal.client.errors import (
    ClientClosed,
    ClientElsewhere,
    ClientForked,
    FormMissing,
    RequestInvalid,
)
from shoal.client.sessions import MOST_CONNECTIONS
from shoal.engine.base import errors as engine_errors
from tests.client.conftest import PATIENT, Published
from tests.every_type import FEATURES
from tests.server.certificates import Authority
from tests.server.serving import Server


@pytest.fixture(scope="module")
def client(whole: Server) -> Iterator[Client]:
    with Client(whole.record.address, **PATIENT) as client:
        yield client


def test_an_answer_has_the_forms_that_its_format_can_have(client: Client) -> None:
    features = ["items:single", "items:flag", "users:score"]
    entities = {"items_id": ["item-3", "-"], "users_id": 3}
    answer = client.lookup(features, entities)
    assert answer.to_pydict() == {"items:single": [77.0, None], "items:flag": [None, None], "users:score": [0.75, 0.75]}
    assert answer.to_arrow().schema.names == features
    assert answer.to_pandas()["users:score"].tolist() == [0.75, 0.75]
    expected = np.array([[77.0, np.nan, 0.75], [np.nan, np.nan, 0.75]], np.float32)
    matrix = client.lookup(features, entities, format="npy")
    for numbers in (answer.to_numpy(), matrix.to_numpy()):
        assert numbers.dtype == np.float32
        assert np.array_equal(numbers, expected, equal_nan=True)
    by_text = client.lookup(features, entities, format="json")
    assert by_text.statuses == {"items": ["PRESENT", "NOT_FOUND"], "users": ["PRESENT", "PRESENT"]}
    assert by_text.event_timestamps["items"][1] is None
    assert by_text.applied == answer.applied == matrix.applied
    assert {view: position.seq for view, position in answer.applied.items()} == {"items": 2, "users": 1}
    assert answer.version == matrix.version == by_text.version is not None
    for lacking in (lambda: matrix.to_arrow(), lambda: matrix.statuses, lambda: by_text.to_numpy()):
        with pytest.raises(FormMissing, match="look up with format="):
            lacking()
    with pytest.raises(FormMissing, match=r"items:text is string, which has no place in a matrix"):
        client.lookup(["items:text"], entities).to_numpy()


def test_a_matrix_of_arrow_is_that_of_the_server(client: Client) -> None:
    keys = {"items_id": [f"item-{number}" for number in range(310)] + ["nulls", "extremes", "empties"]}
    # The server rounds the feature `large`; another test covers that.
    numeric = [
        name
        for name, kind in FEATURES.items()
        if kind not in ("string", "bytes") and "list" not in kind and name != "large"
    ]
    for names in (numeric, ["single"], ["vector"], ["at", "flag"], ["small"], ["vector", "single"]):
        features = [f"items:{name}" for name in names]
        of_arrow, of_server = (client.lookup(features, keys, format=form).to_numpy() for form in ("arrow", "npy"))
        assert of_arrow.dtype == of_server.dtype
        assert np.array_equal(of_arrow, of_server, equal_nan=True)


def test_integers_stay_exact_or_are_refused(client: Client) -> None:
    features = ["items:large", "items:small", "items:flag"]
    exact = [2**53, -(2**53), None]
    rows = {"items_id": ["most", "least", "none"], "large": exact, "small": [2**31 - 1, -(2**31), None]}
    client.push("items", rows | {"flag": [True, False, None]})
    fitting = client.lookup(features, {"items_id": ["most", "least", "none", "-"]})
    matrix = np.array([[2.0**53, 2.0**31 - 1, 1], [-(2.0**53), -(2.0**31), 0], [np.nan] * 3, [np.nan] * 3])
    assert np.array_equal(fitting.to_numpy(), matrix, equal_nan=True)
    assert [str(kind) for kind in fitting.to_pandas().dtypes] == ["Int64", "Int32", "boolean"]
    # A frame has the same types for all values, and contains every value unchanged.
    for keys in (["extremes", "-"], ["empties", "nulls"], ["extremes", "empties"], []):
        answer = client.lookup(features, {"items_id": keys})
        frame = answer.to_pandas()
        assert [str(kind) for kind in frame.dtypes] == ["Int64", "Int32", "boolean"]
        values = {name: [None if value is pandas.NA else value for value in frame[name]] for name in features}
        assert values == answer.to_pydict()
        if keys:
            with pytest.raises(FormMissing, match=r"items:large has an integer beyond ±2\^53"):
                answer.to_numpy()


def test_numbers_stay_in_the_memory_that_they_came_in(client: Client) -> None:
    users = {"users_id": np.arange(200)}
    answer = client.lookup(["users:score"], users)
    assert isinstance(answer, ArrowAnswer)
    place = np.frombuffer(answer.body, np.uint8).__array_interface__["data"][0]
    matrix = client.lookup(["users:score"], users, format="npy").to_numpy()
    assert not matrix.flags.owndata
    batch = answer.to_arrow()
    assert 0 <= batch.column(0).buffers()[1].address - place < len(answer.body)
    assert answer.to_numpy().__array_interface__["data"][0] == batch.column(0).buffers()[1].address
    # Adjacent columns of the body are also a matrix without a copy, and the matrix keeps the body alive.
    twice = client.lookup(["users:score", "users:score"], users)
    assert isinstance(twice, ArrowAnswer)
    as_matrix = twice.to_numpy()
    assert np.shares_memory(as_matrix, np.frombuffer(twice.body, np.uint8))
    del twice
    assert np.array_equal(as_matrix, np.column_stack([matrix[:, 0], matrix[:, 0]]))


def test_entities_may_be_lists_arrays_and_scalars(client: Client) -> None:
    expected = client.lookup(["users:score"], {"users_id": [1, 2, 3]}).to_pydict()
    for users in (
        np.array([1, 2, 3]),
        np.array([1, 2, 3], np.int32),
        pa.array([1, 2, 3]),
        pa.chunked_array([[1], [2, 3]]),
    ):
        assert client.lookup(["users:score"], {"users_id": users}).to_pydict() == expected
    by_text = client.lookup(["items:single"], {"items_id": np.array(["item-3", "item-3"], object)}).to_pydict()
    assert by_text == {"items:single": [77.0, 77.0]}
    assert client.lookup(["users:score"], {"users_id": np.int64(3)}).to_pydict() == {"users:score": [0.75]}
    with pytest.raises(RequestInvalid, match="cannot be written as JSON"):
        client.lookup(["users:score"], {"users_id": [object()]})


def test_pushes_of_columns_and_of_arrow(client: Client) -> None:
    at = datetime(2026, 2, 1, tzinfo=UTC)
    rows: dict[str, Any] = {"items_id": ["pushed", "other"], "blob": [b"\0\xff", None], "at": [at, None]}
    pushed = client.push("items", rows, deletes={"items_id": ["item-9"]})
    assert (pushed.rows, pushed.superseded) == (3, 0)
    keys = {"items_id": ["pushed", "other", "item-9"]}
    found = client.lookup(["items:blob", "items:at"], keys)
    assert found.to_pydict() == {"items:blob": [b"\0\xff", None, None], "items:at": [at, None, None]}
    assert found.version is not None
    assert found.version >= max(pushed.versions.values())
    table = pa.table({"items_id": ["pushed"], "single": pa.array([1.5], pa.float32())})
    assert client.push("items", table).rows == 1
    assert client.lookup(["items:single", "items:blob"], {"items_id": ["pushed"]}).to_pydict() == {
        "items:single": [1.5],
        "items:blob": [b"\0\xff"],
    }
    old = {"items_id": ["pushed"], "single": [9.0], "event_timestamp": ["2020-01-01T00:00:00Z"]}
    assert client.push("items", old).superseded == 1
    with pytest.raises(RequestInvalid, match="a push of Arrow rows cannot have deletes"):
        client.push("items", table, deletes={"items_id": ["x"]})
    with pytest.raises(client_errors.PushInvalid, match="no column 'nope'") as refused:
        client.push("items", {"items_id": ["x"], "nope": [1]})
    assert refused.value.idempotency_key


def test_errors_are_those_of_the_server(client: Client) -> None:
    cases = [
        (client_errors.UnknownFeature, 404, ["nope:x"], {"users_id": [1]}, {}),
        (client_errors.LookupInvalid, 400, ["users:score"], {"users_id": ["x"]}, {}),
        (client_errors.StaleFeatures, 409, ["users:score"], {"users_id": [1]}, {"max_age": "1s", "stale": "fail"}),
        (client_errors.RequestTooLarge, 413, ["users:score"], {"users_id": [1] * 100_001}, {}),
    ]
    for kind, status, features, entities, how in cases:
        with pytest.raises(kind) as raised:
            client.lookup(features, entities, **how)  # type: ignore[arg-type]
        assert type(raised.value) is kind
        assert (raised.value.status, raised.value.code) == (status, kind.__name__)
        assert pickle.loads(pickle.dumps(raised.value)).code == raised.value.code
    for age in (timedelta(days=36500), timedelta(days=36500, seconds=1), timedelta(days=10**8), timedelta.max):
        assert client.lookup(["users:score"], {"users_id": [3]}, max_age=age, stale="fail").version


def test_every_error_that_requests_can_meet_has_its_class() -> None:
    elsewhere = {
        *("DefinitionError", "NotPublished", "LineageError", "DeltaGap", "ForeignDelta", "SchemaChangeRefused"),
        *("GenerationNotKept", "Unmappable", "PushSourceUnknown", "FeastBodyInvalid", "MaterializeElsewhere"),
        *("AmbiguousFeature", "NotCaughtUp", "FeastVersionInactive", "ProcessIdTaken"),
    }
    answered = {
        name: kind
        for name, kind in vars(engine_errors).items()
        if isinstance(kind, type) and issubclass(kind, engine_errors.ShoalError) and kind.http_status != 500
    }
    assert set(client_errors.BY_CODE) == set(answered) - elsewhere
    for name, kind in client_errors.BY_CODE.items():
        parents = {parent.__name__ for parent in answered[name].__mro__} & set(client_errors.BY_CODE)
        assert {parent.__name__ for parent in kind.__mro__} & set(client_errors.BY_CODE) == parents


def test_the_client_imports_nothing_of_the_engine() -> None:
    program = "import sys; import shoal.client, shoal.client.aio; print([*sys.modules])"
    imported = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    heavy = ("'numba", "'lmdb", "'pydantic", "'shoal.engine", "'shoal.loaders", "'shoal.spark_export")
    assert not [name for name in heavy if name in imported]
    assert "'shoal.client.core'" in imported


def test_a_deadline_is_kept_and_told(whole: Server) -> None:
    worker = whole.record.workers[0]
    with Client(whole.record.address, timeout=0.3) as client:
        os.kill(worker, 19)
        try:
            for how in ({}, {"timeout": 0.1}):
                started = time.monotonic()
                with pytest.raises(DeadlineExceeded, match="no answer in time"):
                    client.lookup(["users:score"], {"users_id": [1]}, **how)  # type: ignore[arg-type]
                assert how.get("timeout", 0.3) <= time.monotonic() - started < 2.0
        finally:
            os.kill(worker, 18)
        assert client.lookup(["users:score"], {"users_id": [1]}, timeout=20).version
    with Client(whole.record.address, token="of no use here", **PATIENT) as client:
        assert client.ready()


def test_threads_share_a_client_and_a_fork_has_connections_of_its_own(client: Client) -> None:
    failures: list[BaseException] = []

    def ask(number: int) -> None:
        try:
            for _ in range(20):
                assert client.lookup(["users:score"], {"users_id": [number]}).to_numpy()[0, 0] == number / 4
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    pid = os.fork()
    if pid == 0:
        right = client.lookup(["users:score"], {"users_id": [8]}).to_numpy()[0, 0] == 2.0
        os._exit(0 if right else 1)
    for thread in threads:
        thread.join()
    assert failures == []
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert client.lookup(["users:score"], {"users_id": [8]}).to_numpy()[0, 0] == 2.0


def test_an_asynchronous_client_answers_many_at_once_and_only_where_it_was_made(whole: Server) -> None:
    async def ask() -> None:
        async with AsyncClient(whole.record.address, **PATIENT) as client:
            answers = await asyncio.gather(
                *(client.lookup(["users:score"], {"users_id": [number]}, format="npy") for number in range(50))
            )
            assert [answer.to_numpy()[0, 0] for answer in answers] == [number / 4 for number in range(50)]
            assert (await client.push("users", {"users_id": [900], "score": [1.0]})).rows == 1
            assert {view["name"] for view in (await client.views())["views"]} >= {"items", "users"}
            with pytest.raises(ServerError, match="no view 'nope'"):
                await client.lookup(["nope:x"], {"users_id": [1]})
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.lookup(["users:score"], {"users_id": list(range(50_000))}), 1e-4)
            assert [replica.in_flight for replica in client._core.replicas] == [0]
            client._process -= 1  # As in a child of this process.
            with pytest.raises(ClientForked, match="make a new client here"):
                await client.ready()
            client._process += 1

    asyncio.run(ask())


def test_a_busy_event_loop_costs_no_lookup(whole: Server) -> None:
    port = int(whole.record.address.rpartition(":")[2])

    def connections() -> int:
        return sum(bool(end.raddr) and end.raddr.port == port for end in psutil.Process().net_connections("tcp"))

    async def ask() -> None:
        is_over = False
        others = connections()
        most = 0

        async def keep_busy() -> None:
            nonlocal most
            while not is_over:
                time.sleep(0.08)  # Like a request handler that computes.
                most = max(most, connections() - others)
                await asyncio.sleep(0)

        async with AsyncClient(whole.record.address, timeout=90.0, connect_timeout=0.05) as client:
            busy = asyncio.create_task(keep_busy())
            lookups = (client.lookup(["users:score"], {"users_id": [number]}) for number in range(150))
            answers = await asyncio.gather(*lookups)
            is_over = True
            await busy
            assert [answer.to_numpy()[0, 0] for answer in answers] == [number / 4 for number in range(150)]
            assert 1 < most <= MOST_CONNECTIONS

    asyncio.run(ask())


def test_an_asynchronous_client_belongs_to_one_event_loop(whole: Server) -> None:
    client = AsyncClient(whole.record.address, **PATIENT)
    operations: list[Callable[[], Coroutine[Any, Any, Any]]] = [
        lambda: client.lookup(["users:score"], {"users_id": [1]}),
        client.views,
        client.status,
        client.ready,
        client.close,
    ]
    with asyncio.Runner() as home:
        assert home.run(client.ready())
        for operation in operations:
            with pytest.raises(ClientElsewhere, match="make one for each event loop"):
                asyncio.run(operation())
        assert home.run(client.ready())
        home.run(client.close())


def test_a_closed_client_is_closed(whole: Server) -> None:
    client = Client(whole.record.address, **PATIENT)
    client.views()
    client.close()
    client.close()
    for operation in (client.views, client.status, client.ready, client.__enter__):
        with pytest.raises(ClientClosed, match="make a new one"):
            operation()
    with pytest.raises(ClientClosed):
        client.push("users", {"users_id": [1], "score": [1.0]})
    assert not any(pool._idle for pool in client._pools.values())

    async def ask() -> None:
        client = AsyncClient(whole.record.address, **PATIENT)
        await client.views()
        await client.close()
        await client.close()
        for operation in (client.views, client.status, client.ready, client.__aenter__):
            with pytest.raises(ClientClosed, match="make a new one"):
                await operation()
        unused = AsyncClient(whole.record.address)
        await unused.close()
        with pytest.raises(ClientClosed):
            await unused.lookup(["users:score"], {"users_id": [1]})

    asyncio.run(ask())
    gc.collect()
    assert [found for found in gc.get_objects() if isinstance(found, aiohttp.ClientSession) and not found.closed] == []


def test_tokens_tls_and_unix_sockets(published: Published, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    pair = authority.sign("server")
    trusting = authority.client()
    tokens = tmp_path / "tokens"
    tokens.write_text("read aaaaaaaaaaaaaaaaaaaa ranker\n")
    tokens.chmod(0o600)
    protected = published.server(
        "protected", tls=trusting, tls_certificate=str(pair.certificate), tls_key=str(pair.key), tokens=str(tokens)
    )
    local = published.server("local", unix_socket=str(tmp_path / "shoal.sock"))

    async def ask(address: str, **settings: Any) -> None:
        async with AsyncClient(address, **PATIENT, **settings) as client:
            assert (await client.lookup(["users:score"], {"users_id": [4]})).to_pydict() == {"users:score": [1.0]}

    with protected as by_tls, local as by_socket:
        settings: dict[str, Any] = {"tls": trusting, "token": "a" * 20}
        for address, how in ((by_tls.record.address, settings), (by_socket.record.address, {})):
            with Client(address, **PATIENT, **how) as client:
                assert client.lookup(["users:score"], {"users_id": [4]}).to_pydict() == {"users:score": [1.0]}
            asyncio.run(ask(address, **how))
        with pytest.raises(client_errors.TokenInvalid):
            Client(by_tls.record.address, tls=trusting, **PATIENT).lookup(["users:score"], {"users_id": [4]})
        with pytest.raises(client_errors.RoleMissing):
            Client(by_tls.record.address, **settings, **PATIENT).push("users", {"users_id": [1], "score": [1.0]})
        with pytest.raises(client_errors.NoAnswer, match="certificate"):
            Client(by_tls.record.address, token="a" * 20, **PATIENT).lookup(["users:score"], {"users_id": [4]})
