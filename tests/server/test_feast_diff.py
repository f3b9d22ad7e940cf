"""The part of `shoal feast-diff` that queries a server. The store itself takes the place of Feast."""

from typing import Any

import pytest

from shoal.engine.base.errors import RequestTooLarge
from shoal.engine.base.server_access import ServerAccess
from shoal.engine.feast.diff import ServerSide, StoreSide, Summary, compare
from tests.server.serving import Server

FEATURES = ["users:*", "pairs:*"]


def differences(server: Server, keys: dict[str, list[Any]]) -> Summary:
    store = StoreSide(server.store)
    asked = ServerSide(server.record.address, ServerAccess())
    summary = Summary()
    references = asked.description.references(FEATURES)
    assert [*compare(references, keys, store, asked, asked.description, summary=summary)] == []
    return summary


@pytest.mark.parametrize("rows", [1, 50, 51, 1234])
def test_more_keys_than_the_server_takes_are_asked_in_parts(server: Server, rows: int) -> None:
    keys: dict[str, list[Any]] = {
        "users_id": [row % 12 for row in range(rows)],
        "items_id": [f"item-{row % 5}" for row in range(rows)],
    }
    summary = differences(server, keys)
    assert (summary.keys, summary.equal) == (rows, rows * 4)


def test_a_body_that_is_too_large_is_sent_in_parts(server: Server) -> None:
    keys: dict[str, list[Any]] = {"users_id": [*range(40)], "items_id": ["x" * 1000] * 40}
    summary = differences(server, keys)
    assert (summary.keys, summary.equal) == (40, 160)


def test_a_server_that_takes_nothing_is_an_error(server: Server) -> None:
    with pytest.raises(RequestTooLarge, match=r"rejects even a request for one key: .*max_body_bytes"):
        differences(server, {"users_id": [1], "items_id": ["x" * 30_000]})
