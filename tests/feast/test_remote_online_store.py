"""Feast's SDK reads from Shoal as its online store of type `remote`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.engine.root.export_root import ExportRoot
from tests import stores
from tests.feast.conftest import FeastEnvironment
from tests.server.certificates import Authority
from tests.server.serving import Server

TENTHS = [0.1, 0.2]
WIDENED = [float(np.float32(number)) for number in TENTHS]

REQUESTS: dict[str, Mapping[str, Any]] = {
    "numbers": {
        "features": ["items:small", "items:large", "items:single", "items:double", "items:flag"],
        "entities": {"items_id": ["empties", "nobody"]},
    },
    "texts": {
        "features": ["items:text", "items:blob", "items:at", "items:words"],
        "entities": [{"items_id": "extremes"}],
        "full_feature_names": True,
    },
    "lists": {"features": ["items:integers", "items:floats", "items:vector"], "entities": [{"items_id": "extremes"}]},
    "service": {"service": "of_pairs", "entities": {"users_id": [2], "items_id": ["item-3"], "ageing_id": [3]}},
    "no view": {"features": ["nowhere:text"], "entities": [{"items_id": "extremes"}]},
    "collision": {"features": ["users:text", "items:text"], "entities": [{"items_id": "extremes", "users_id": 1}]},
    "old": {"features": ["ageing:clicks"], "entities": {"ageing_id": [0, 1]}},
}


def ask(environment: FeastEnvironment, repo: Path, server: Server, *security: object) -> dict[str, Any]:
    """Return the SDK's answers to REQUESTS."""
    asked = json.dumps(list(REQUESTS.values()))
    text = environment.run("remote_client.py", repo, server.record.address, *security, text=asked)
    return dict(zip(REQUESTS, json.loads(text), strict=True))


@pytest.mark.parametrize("strict", [False, True])
def test_the_sdk_reads(
    feast_environment: FeastEnvironment, feast_repo: Path, request: pytest.FixtureRequest, strict: bool
) -> None:
    server: Server = request.getfixturevalue("strict_server" if strict else "default_server")
    answers = ask(feast_environment, feast_repo, server)
    assert answers["numbers"] == {
        "items_id": ["empties", "nobody"],
        "small": [0, None],
        "large": [-(2**63), None],
        "single": [0.0, None],
        "double": [0.1, None],
        "flag": [False, None],
    }
    assert answers["texts"] == {
        "items_id": ["extremes"],
        "items__text": ['quote " backslash \\ newline \n and \u2603 \U0001f600'],
        "items__blob": ["AP8="],
        "items__at": [-62_135_596_800],
        "items__words": [["", "é", "z"]],
    }
    tenths = WIDENED if strict else TENTHS
    assert answers["lists"] == {
        "items_id": ["extremes"],
        "integers": [[2**63 - 1, -(2**63)]],
        "floats": [tenths],
        "vector": [[tenths[0], 0.0, -1.5]],
    }
    service = answers["service"]
    assert (service["users_id"], service["items_id"], service["times"]) == ([2], ["item-3"], [3])
    assert answers["no view"]["error"] == "FeatureViewNotFoundException"
    assert "Feature view nowhere does not exist" in answers["no view"]["message"]
    # One of the rows is five hours old, and its view has a TTL of one hour.
    assert answers["old"]["clicks"] == ([0, 1] if strict else [0, None])


def test_the_sdk_raises_what_shoal_tells(
    feast_environment: FeastEnvironment, feast_repo: Path, default_server: Server
) -> None:
    answer = ask(feast_environment, feast_repo, default_server)["collision"]
    assert answer["error"] == "FeatureNameCollisionError"
    assert "set full_feature_names" in answer["message"]


def test_the_sdk_sends_its_token_over_tls(
    feast_environment: FeastEnvironment, feast_repo: Path, shoal_root: ExportRoot, tmp_path: Path
) -> None:
    reader, pusher = "reader-token-0123456789", "pusher-token-0123456789"
    authority = Authority(tmp_path / "authority")
    own = authority.sign("server")
    stores.load(tmp_path / "store", shoal_root)
    files: dict[str, Any] = {"tls_certificate": str(own.certificate), "tls_key": str(own.key)}
    tokens = f"read {reader}\npush {pusher} stream"
    with Server(tmp_path / "store", tls=authority.client(), tokens_text=tokens, **files) as server:
        server.await_ready()
        answers = {
            token: ask(feast_environment, feast_repo, server, token, authority.certificate)["numbers"]
            for token in (reader, pusher, "wrong")
        }
    assert answers[reader]["large"] == [-(2**63), None]
    assert answers[pusher]["error"] == "FeastPermissionError"
    assert "the token 'stream' may push; the request needs one that may read" in answers[pusher]["message"]
    assert "not one of this server's" in answers["wrong"]["message"]
