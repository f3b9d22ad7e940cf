"""A wrong argument raises an error of the client that names the argument, before a request is sent."""

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pytest

from shoal.client import Client, Limits
from shoal.client.addresses import parse_address
from shoal.client.aio import AsyncClient
from shoal.client.errors import AddressInvalid, RequestInvalid

NOWHERE = "http://127.0.0.1:1"
"""An address where nothing listens: a request that is sent ends in another error."""
FEATURES = ["users:score"]
KEYS = {"users_id": [1]}


@pytest.mark.parametrize(
    "text",
    [
        *("", "host:80", "ftp://h", "http://", "http://h/path", "http://h:x", "unix:", "http://a@h", "http://:a@h"),
        *("http://h:0", "http://h:65536", "http://h#f", "http://h?q", "http://a b", "http://a\nb", "http://é"),
        *("http://a..b", f"http://{'a' * 64}", "http://[::1", "unix:a\0b"),
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(AddressInvalid, match="write http://HOST:PORT"):
        parse_address(text)


def test_addresses_of_a_client_are_a_list_of_texts() -> None:
    twice = (["http://a", "http://a"], ["http://a", "http://a/"])
    addresses: tuple[Any, ...] = (*twice, [], 5, [5], b"http://a", [None], {}, [["http://a"]])
    for wrong in addresses:
        with pytest.raises(AddressInvalid):
            Client(wrong)
    shards: tuple[Any, ...] = ([], [[]], "http://a", 5, [5], [["http://a"], []], [["http://a"], "http://a/"], *twice)
    for wrong in shards:
        with pytest.raises(AddressInvalid):
            Client(shards=wrong)
    with pytest.raises(AddressInvalid, match="give either"):
        Client()
    with pytest.raises(AddressInvalid, match="give either"):
        Client("http://a", shards=["http://b"])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("timeout", [0, -1, float("nan"), float("inf"), "1", None, True, [1], 10**400]),
        ("connect_timeout", [0, -1, float("nan"), "1", None]),
        ("max_tries", [0, -1, 1.5, "3", None, True, float("nan")]),
        ("max_skew", [-1, 0.5, "0", None]),
        ("hedge", ["p99", 0, -1, float("nan"), float("inf"), True, [], "0.1"]),
        ("token", ["a\nb", "", 5, b"secret", "é"]),
        ("tls", [True, "ca.pem", 5]),
        ("limits", [5, None, {}, Limits(retry_share=-1), Limits(hedge_reserve="1"), Limits(hedge_share=float("nan"))]),  # type: ignore[arg-type]
        ("time_out", [1]),
    ],
)
def test_settings_are_checked(name: str, values: list[Any]) -> None:
    for kind in (Client, AsyncClient):
        for value in values:
            with pytest.raises(RequestInvalid, match=name):
                kind("http://a", **{name: value})


def mistakes() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield operations, texts that the error must contain, and arguments with one mistake."""
    right: dict[str, Any] = {"features": FEATURES, "entities": KEYS}
    frame = pandas.DataFrame({"users_id": [1]})
    features: tuple[Any, ...] = (None, 5, "", "users:score", [], [1], [None], b"users", {"a:b": 1}, {"a:b"}, [["a:b"]])
    for wrong in features:
        yield "lookup", "features", right | {"features": wrong}
    names: tuple[Any, ...] = (None, 5, "users_id", [1], {}, {1: [1]}, frame, pa.table(frame))
    for wrong in (*names, {"users_id": {1}}, {"users_id": {1: 2}}):
        yield "lookup", "entities", right | {"entities": wrong}
    yield "lookup", "one length", right | {"entities": {"users_id": [1, 2], "items_id": ["a"]}}
    yield "lookup", "entities", right | {"entities": {"users_id": np.array(5)}}
    options: dict[str, list[Any]] = {
        "format": ["xml", "ARROW", None, 5, ["arrow"], np.array(["arrow"])],
        "stale": ["", None, 5, "drop", []],
        "partial": ["", None, 5, "null"],
        "max_age": [5, 1.5, b"1h", ["1h"], timedelta(0), timedelta(days=-1), timedelta(seconds=1.5)],
        "timeout": [0, -1, float("nan"), float("inf"), 10**6, "1", True, [1]],
    }
    for name, values in options.items():
        for value in values:
            yield "lookup", name, right | {name: value}
    pushed: dict[str, Any] = {"view": "users", "rows": {"users_id": [1]}}
    for view in (None, 5, "", b"users", ["users"]):
        yield "push", "view", pushed | {"view": view}
    rows: tuple[Any, ...] = (5, "rows", [], [{"users_id": 1}], {}, {1: [1]}, frame)
    rows += ({"users_id": 1}, {"users_id": "abc"})
    for columns in (*rows, {"users_id": {1}}, {"users_id": None}, {"users_id": np.array(5)}):
        yield "push", "rows", pushed | {"rows": columns}
        yield "push", "deletes", pushed | {"deletes": columns}
    yield "push", "deletes", pushed | {"rows": None}
    yield "push", "one length", pushed | {"rows": {"users_id": [1], "score": [1.0, 2.0]}}
    yield "push", "cannot have deletes", pushed | {"rows": pa.table(frame), "deletes": {"users_id": [1]}}
    for key in ("", 5, b"key", "a\nb", "é"):
        yield "push", "idempotency key", pushed | {"idempotency_key": key}
    for operation in ("push", "views", "status", "ready"):
        for timeout in (0, float("nan"), "1", False):
            yield operation, "timeout", (pushed if operation == "push" else {}) | {"timeout": timeout}


def test_every_mistake_in_a_call_is_named_before_anything_is_sent() -> None:
    async def ask_asynchronously() -> None:
        servers: dict[str, Any]
        for servers in ({"addresses": NOWHERE}, {"shards": [NOWHERE, "http://127.0.0.1:2"]}):
            async with AsyncClient(**servers) as client:
                for operation, told, arguments in mistakes():
                    with pytest.raises(RequestInvalid, match=told):
                        await getattr(client, operation)(**arguments)

    asyncio.run(ask_asynchronously())
    with Client(NOWHERE) as client:
        for operation, told, arguments in mistakes():
            with pytest.raises(RequestInvalid, match=told):
                getattr(client, operation)(**arguments)
        with pytest.raises(RequestInvalid, match="cannot be written as JSON"):
            client.lookup(FEATURES, {"users_id": [object()]})
