"""A client of shards gives the same answers as an unsharded store, cell by cell and from one version, or an error that
says why it cannot."""

import asyncio
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from shoal.client import Client, ShardsDisagree, learning
from shoal.client.aio import AsyncClient
from shoal.client.errors import (
    KeyOutsideShard,
    PushIncomplete,
    RequestInvalid,
    ShardMisplaced,
    UnknownFeature,
)
from shoal.client.hashing import first_hashes, shard_starts, shards_of
from shoal.engine.base.shards import Shard
from shoal.engine.format.keys import key_identity
from tests import stores
from tests.client.conftest import PATIENT, SHARDS, Published, addresses
from tests.engine.test_keys import VECTORS
from tests.every_type import FEATURES, ITEMS, USERS
from tests.faulty_network import FaultyNetwork, faulty_network
from tests.server.serving import Server, eventually

NUMBERS = [f"items:{name}" for name, kind in FEATURES.items() if kind not in ("string", "bytes") and "list" not in kind]
ALL = [*(f"items:{name}" for name in FEATURES), "users:score", "users:text", "pairs:seen", "pairs:times"]
MATRIX = [*NUMBERS, "users:score", "pairs:times"]


@pytest.fixture(scope="module")
def one(whole: Server) -> Iterator[Client]:
    with Client(whole.record.address, **PATIENT) as client:
        yield client


@pytest.fixture(scope="module")
def many(shards: list[Server]) -> Iterator[Client]:
    with Client(shards=addresses(shards), **PATIENT) as client:
        yield client


def random_request(source: random.Random, features: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Return features of some views in random order, and entities as columns, arrays or one scalar for all rows. Some
    of the entities do not exist."""
    asked = source.sample(features, source.randrange(1, 7))
    count = source.choice([0, 1, 2, 7, 60])
    items: Any = [f"item-{source.randrange(400)}" for _ in range(count)]
    users: Any = [source.randrange(6) for _ in range(count)]
    if source.random() < 0.3:
        users = source.randrange(6)
    if source.random() < 0.2:
        items = f"item-{source.randrange(6)}"
    if source.random() < 0.3 and isinstance(users, list):
        users = np.array(users, np.int64)
    if source.random() < 0.3 and isinstance(items, list):
        items = pa.array(items, pa.string())
    return asked, {"items_id": items, "users_id": users}


def test_hashes_are_those_of_the_store() -> None:
    starts = shard_starts(7)
    for key, first, _ in VECTORS:
        columns = [("key", "string" if isinstance(value, str) else "int64", [value]) for value in key]
        assert first_hashes(columns).tolist() == [first] == [key_identity(key)[0]]
        assert shards_of(first_hashes(columns), starts).tolist() == [Shard(1, 7).of_hash(first).number - 1]


def test_answers_of_shards_are_those_of_an_unsharded_store(one: Client, many: Client) -> None:
    source = random.Random(11)
    for _ in range(60):
        features, entities = random_request(source, ALL)
        expected = one.lookup(features, entities)
        found = many.lookup(features, entities)
        assert found.to_arrow().schema == expected.to_arrow().schema
        assert repr(found.to_pydict()) == repr(expected.to_pydict())
        assert found.applied == expected.applied
        features, entities = random_request(source, MATRIX)
        expected, found = (client.lookup(features, entities, format="npy") for client in (one, many))
        assert found.to_numpy().dtype == expected.to_numpy().dtype
        assert np.array_equal(found.to_numpy(), expected.to_numpy(), equal_nan=True)
        by_text = [client.lookup(features, entities, format="json") for client in (one, many)]
        assert by_text[0].to_pydict() == by_text[1].to_pydict()
        assert by_text[0].statuses == by_text[1].statuses
        assert by_text[0].event_timestamps == by_text[1].event_timestamps


def test_services_ages_and_the_asynchronous_client(one: Client, shards: list[Server]) -> None:
    entities = {"items_id": [f"item-{number}" for number in range(40)], "users_id": 3}

    async def ask() -> None:
        async with AsyncClient(shards=addresses(shards), **PATIENT) as client:
            found = await client.lookup("ranking", entities)
            whole = one.lookup("ranking", entities)
            assert repr(found.to_pydict()) == repr(whole.to_pydict())
            old = await client.lookup(["items:single"], entities, max_age="1d", format="json")
            assert set(old.statuses["items"]) == {"NOT_FOUND", "OUTSIDE_MAX_AGE"}
            assert (await client.ready(), len(await client.status())) == (True, SHARDS)

    asyncio.run(ask())


def test_what_is_asked_wrongly_is_refused(many: Client, shards: list[Server], whole: Server) -> None:
    with pytest.raises(UnknownFeature, match="no feature 'nope'; it has score, text"):
        many.lookup(["users:nope"], {"users_id": [1]})
    with pytest.raises(UnknownFeature, match="no feature service 'nope'; they have ranking"):
        many.lookup("nope", {"users_id": [1]})
    with pytest.raises(RequestInvalid, match="'users_id' must be int64"):
        many.lookup(["users:score"], {"users_id": ["1"]})
    with pytest.raises(RequestInvalid, match="looked up by 'items_id', which is not among the entities"):
        many.lookup(["items:single"], {"users_id": [1]})
    with pytest.raises(RequestInvalid, match="must be of one length"):
        many.lookup(["pairs:seen"], {"users_id": [1], "items_id": ["a", "b"]})
    urls = addresses(shards)
    for _ in range(4):
        # The client may have learned the sharding from a misplaced shard or from a correctly placed one.
        with (
            Client(shards=[urls[1], urls[0], urls[2]], **PATIENT) as misled,
            pytest.raises(ShardMisplaced, match=r"holds shard (1|2)/3, but the client expects shard (?!\1)(1|2)/3"),
        ):
            misled.lookup(["users:score"], {"users_id": list(range(100))})
    with pytest.raises(ShardMisplaced, match="holds all rows"):
        Client(shards=[whole.record.address], **PATIENT).lookup(["users:score"], {"users_id": [1]})
    with pytest.raises(KeyOutsideShard, match="are not in this store, which is shard 1/3") as refused:
        Client(urls[0], **PATIENT).lookup(["users:score"], {"users_id": list(range(50))})
    assert (refused.value.status, refused.value.code) == (421, "KeyOutsideShard")


def test_servers_say_which_shard_they_are(shards: list[Server]) -> None:
    assert [server.ask("GET", "/v1/status").json["shard"] for server in shards] == ["1/3", "2/3", "3/3"]
    assert 'shoal_shard_info{shard="2",shards="3"} 1.0' in shards[1].ask("GET", "/metrics").body.decode()


def test_a_push_is_divided_and_one_of_other_rows_refused(many: Client, shards: list[Server]) -> None:
    users = list(range(1000, 1020))
    pushed = many.push("users", {"users_id": users, "score": [float(user) for user in users]})
    assert (pushed.rows, pushed.superseded, set(pushed.versions)) == (20, 0, set(addresses(shards)))
    assert many.lookup(["users:score"], {"users_id": users}, format="npy").to_numpy()[:, 0].tolist() == users
    in_arrow = pa.table({"users_id": users, "text": ["x"] * 20})
    assert many.push("users", in_arrow).rows == 20
    many.push("users", deletes={"users_id": users[:3]})
    texts = many.lookup(["users:text"], {"users_id": users}).to_pydict()["users:text"]
    assert texts == [None] * 3 + ["x"] * 17
    # If one row of a push belongs to another shard, the server applies none of its rows.
    answer = shards[0].ask("POST", "/v1/push", {"view": "users", "rows": {"users_id": users, "score": [0.0] * 20}})
    assert (answer.status, answer.error[0]) == (421, "KeyOutsideShard")
    assert many.lookup(["users:score"], {"users_id": users[3:]}, format="npy").to_numpy()[:, 0].tolist() == users[3:]


def test_shards_that_do_not_agree_are_asked_again_and_else_refused(
    published: Published, one: Client, many: Client, shards: list[Server]
) -> None:
    entities = {"users_id": list(range(100))}
    before = many.lookup(["users:score"], entities).applied["users"]
    writer = shards[1].record.writer
    assert writer is not None
    os.kill(writer, signal.SIGSTOP)
    try:
        rows = [{"users_id": user, "score": -1.0, "text": "new", stores.TIMESTAMP: stores.NOW} for user in range(100)]
        stores.publish_delta(published.root, USERS, rows)
        for server in (shards[0], shards[2]):
            eventually(partial(is_past, server, before.seq), "the delta")
        with pytest.raises(ShardsDisagree, match=r"users: shard 1 at 2@.*, shard 2 at 1@.*, shard 3 at 2@") as refused:
            many.lookup(["users:score"], entities, timeout=0.5)
        seqs = {shard: position.seq for shard, position in refused.value.positions["users"].items()}
        assert seqs == {1: 2, 2: 1, 3: 2}
        # The slow shard does not affect lookups of views and keys that do not need it.
        assert many.lookup(["items:single"], {"items_id": ["item-3"]}).to_pydict() == {"items:single": [77.0]}
        with Client(shards=addresses(shards), max_skew=1, **PATIENT) as lenient:
            mixed = lenient.lookup(["users:score"], entities, format="npy").to_numpy()[:, 0]
        assert 0 < (mixed == -1.0).sum() < 100
        timer = threading.Timer(0.3, os.kill, (writer, signal.SIGCONT))
        timer.start()
        answer = many.lookup(["users:score"], entities, format="npy")
        assert (answer.to_numpy() == -1.0).all()
        assert answer.applied["users"].seq == before.seq + 1
        timer.join()
    finally:
        os.kill(writer, signal.SIGCONT)


def is_past(server: Server, seq: int) -> bool:
    views = server.ask("GET", "/v1/status").json["views"]
    return next(int(view["applied_seq"]) for view in views if view["name"] == "users") > seq


def test_pushed_rows_are_copied_to_another_number_of_shards_by_the_documented_steps(one: Client, many: Client) -> None:
    page = (Path(__file__).parents[2] / "docs" / "shards.md").read_text()
    program = next(code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def copy_pushed" in code)
    documented: dict[str, Any] = {}
    exec(compile(program, "docs/shards.md", "exec"), documented)
    copy_pushed = documented["copy_pushed"]

    at = [f"2026-03-01T00:00:{second:02}Z" for second in range(20)]
    items = [f"copied-{number}" for number in range(20)]
    blobs = [bytes([number, 255]) for number in range(20)]
    times = [datetime(2026, 1, 1, tzinfo=UTC)] * 20
    values = {
        "large": [2**60 + 1] * 20,
        "blob": blobs,
        "at": times,
        "vector": [[0.1, 0.2, 0.3]] * 20,
        "words": [["é"]] * 20,
    }
    many.push("items", {"items_id": items, "event_timestamp": at} | values)
    many.push("users", deletes={"users_id": [150, 151]})
    keys = {"items_id": [*items, "item-7", "never"]}
    published = one.lookup(["users:score"], {"users_id": [150, 151]}).to_pydict()["users:score"]
    assert published == [37.5, 37.75]
    # A newer push of one feature is already in the new store, and reaches the old stores a little later.
    newer = {"items_id": items[:1], "single": [7.0], "event_timestamp": ["2026-03-02T00:00:00Z"]}
    one.push("items", newer)
    timer = threading.Timer(0.3, many.push, ("items", newer))
    timer.start()
    copy_pushed(many, one, "items", keys)
    timer.join()
    copy_pushed(many, one, "users", {"users_id": [150, 151, 152]})
    for format in ("arrow", "json"):
        expected, found = (client.lookup(["items:*"], keys, stale="serve", format=format) for client in (many, one))
        assert repr(found.to_pydict()) == repr(expected.to_pydict())
    assert found.event_timestamps == expected.event_timestamps
    assert (found.to_pydict()["items:single"][0], found.to_pydict()["items:large"][0]) == (7.0, 2**60 + 1)
    scores = one.lookup(["users:score"], {"users_id": [150, 151, 152]}).to_pydict()
    assert scores == {"users:score": [None, None, 38.0]}


def users_outside(shard: int) -> list[int]:
    """Return users with rows outside a shard."""
    of_row = shards_of(first_hashes([("users_id", "int64", list(range(100)))]), shard_starts(SHARDS))
    return np.flatnonzero(of_row != shard).tolist()


def test_a_client_keeps_what_it_learned_and_no_request_waits_for_news(
    shards: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "_OLD_SECONDS", 0.0)
    users = {"users_id": list(range(100))}
    with ExitStack() as opened:
        networks = [opened.enter_context(faulty_network(server.record.address)) for server in shards]
        urls = [network.url for network in networks]

        def asked_for_schema() -> int:
            return sum(request == "GET /v1/views" for network in networks for request in network.requests)

        def hang(*hanging: FaultyNetwork) -> None:
            for network in hanging:
                network.fail(text="/v1/views", times=float("inf"), hangs=True)

        def new_client_learns_from_any_shard() -> None:
            with Client(shards=urls, **PATIENT) as new:
                assert new.lookup(["users:score"], users, format="npy").to_numpy().shape == (100, 1)
                assert {view["name"] for view in new.views()["views"]} >= {"users", "items"}

        async def ask() -> None:
            async with AsyncClient(shards=urls, **PATIENT) as client:
                await client.lookup(["users:score"], users)
                before = asked_for_schema()
                hang(*networks)
                for _ in range(3):
                    assert (await client.lookup("ranking", users | {"items_id": "item-3"})).applied
                assert asked_for_schema() > before

        with Client(shards=urls, **PATIENT) as client:
            client.lookup(["users:score"], users)
            hang(*networks[:2])
            for _ in range(3):
                new_client_learns_from_any_shard()
            before = asked_for_schema()
            hang(networks[2])
            for _ in range(3):
                assert client.lookup("ranking", users | {"items_id": "item-3"}).applied
            eventually(lambda: asked_for_schema() > before, "a request for the schema")
            # An invalid request fails as usual, although no server answers the request for the schema.
            monkeypatch.setattr(learning, "_NEW_SECONDS", 0.0)
            with pytest.raises(UnknownFeature, match="no feature 'nope'"):
                client.lookup(["users:nope"], users, timeout=1.0)
            for network in networks:
                network.mend()
            asyncio.run(ask())


def test_a_shard_that_is_away_fails_what_needs_it_alone(published: Published, shards: list[Server]) -> None:
    # This test must be the last of the file, because it kills a server.
    urls = addresses(shards)
    with Client(shards=urls, timeout=5.0) as client:
        inside = users_outside(2)
        client.lookup(["users:score"], {"users_id": inside})
        shards[2].kill()
        assert client.lookup(["users:score"], {"users_id": inside}).to_arrow().num_rows == len(inside)
        for _ in range(6):
            with Client(shards=urls, **PATIENT) as new:
                assert new.lookup(["users:score"], {"users_id": inside}).to_arrow().num_rows == len(inside)
        started = time.monotonic()
        with pytest.raises(ConnectionError, match="does not answer"):
            client.lookup(["users:score"], {"users_id": list(range(100))})
        assert time.monotonic() - started < 5.0
        with pytest.raises(PushIncomplete, match="1 of 3 stores did not confirm") as failure:
            client.push("users", {"users_id": list(range(100)), "score": [1.0] * 100}, idempotency_key="k")
        assert (set(failure.value.done), set(failure.value.failed)) == (set(urls[:2]), {urls[2]})
        assert failure.value.idempotency_key == "k"
        assert not client.ready()
    assert ITEMS.name in {view["name"] for view in shards[0].ask("GET", "/v1/views").json["views"]}
