"""`feast serve` and `shoal serve --feast-strict` give equal answers to the same requests."""

import json
from collections import Counter
from contextlib import closing
from typing import Any

import pytest

from tests.feast.compared import WRONG_BODIES, requests
from tests.server.serving import Answer, Connection, Server

REQUESTS = 1000


def test_a_thousand_requests(feast: str, strict_server: Server) -> None:
    kinds: Counter[str] = Counter()
    differences = []
    with strict_server.connection() as shoal:
        for body in requests(REQUESTS, seed=11):
            headers = {"Content-Type": "application/json"}
            theirs = ask(feast, body, **headers)
            ours = shoal.ask("POST", "/get-online-features", body, **headers)
            kinds[kind(theirs)] += 1
            for difference in differing(theirs, ours):
                differences.append(f"{difference}\n  of {json.dumps(body)}\n  {theirs.body!r}\n  {ours.body!r}")
    assert not differences, f"{len(differences)} differences\n" + "\n".join(differences[:3])
    assert kinds["200"] > REQUESTS * 0.7
    assert {"404 FeatureViewNotFoundException", "422", "500"} < kinds.keys()


@pytest.mark.parametrize(("body", "content_type"), WRONG_BODIES)
def test_bodies_that_are_no_requests(feast: str, strict_server: Server, body: bytes, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    theirs = ask(feast, body, **headers)
    ours = strict_server.ask("POST", "/get-online-features", body, **headers)
    assert list(differing(theirs, ours)) == [], (theirs.body, ours.body)


def ask(feast: str, body: Any, **headers: str) -> Answer:
    """Send a request to Feast's server on a new connection, because it closes connections without notice after some
    errors."""
    with closing(Connection(feast)) as connection:
        return connection.ask("POST", "/get-online-features", body, **headers)


def kind(answer: Answer) -> str:
    """Return the status, and the exception that a client would raise."""
    detail = exception(answer)
    return f"{answer.status} {detail['class']}" if detail else str(answer.status)


def exception(answer: Answer) -> dict[str, str]:
    try:
        detail: Any = json.loads(answer.json)
    except (TypeError, ValueError):
        return {}
    return detail if isinstance(detail, dict) else {}


def differing(theirs: Answer, ours: Answer) -> list[str]:
    """Return the differences between two answers."""
    if theirs.status != ours.status:
        return [f"status {theirs.status}, {ours.status}"]
    if theirs.status == 422:
        return [] if theirs.json == ours.json else ["what is wrong"]
    if theirs.status != 200:
        # For errors other than its own, Feast names no class.
        expected = exception(theirs)
        detail = exception(ours)
        same = not expected or expected["class"] == detail["class"]
        text = expected.get("message", "").partition(" in project")[0].partition(" found")[0]
        is_told = expected.get("class", "").startswith("FeatureNameCollision") or text in detail["message"]
        return [] if same and is_told else ["exception"]
    return differing_results(theirs.json, ours.json)


def differing_results(theirs: Any, ours: Any) -> list[str]:
    their_names = theirs["metadata"]["feature_names"]
    our_names = ours["metadata"]["feature_names"]
    if sorted(their_names) != sorted(our_names):
        return [f"names {their_names}, {our_names}"]
    found = []
    if theirs["metadata"].get("feature_view_metadata") != ours["metadata"].get("feature_view_metadata"):
        found.append("metadata of views")
    keys = [name for name in their_names if name.endswith("_id")]
    if our_names[: len(keys)] != keys:
        found.append("order of join keys")
    expected = dict(zip(their_names, theirs["results"], strict=True))
    for name, result in zip(our_names, ours["results"], strict=True):
        # The reprs of 1, 1.0 and true are different.
        if repr(expected[name]["values"]) != repr(result["values"]):
            found.append(f"values of {name}")
        if expected[name]["statuses"] != result["statuses"]:
            found.append(f"statuses of {name}")
        # Feast's sqlite keeps whole seconds.
        if [time[:19] for time in expected[name]["event_timestamps"]] != [
            time[:19] for time in result["event_timestamps"]
        ]:
            found.append(f"event times of {name}")
    return found
