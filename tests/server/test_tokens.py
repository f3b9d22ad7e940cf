"""Tokens and their roles: the content of a token file, and its effect on a real server."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from shoal.engine.base.errors import RoleMissing, SettingsInvalid, TokenInvalid
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.server.settings import server_settings
from shoal.engine.server.tokens import Role, parse_tokens, warn_of_readers
from tests import stores
from tests.server.conftest import GRPC_PORT
from tests.server.serving import Answer, Server, eventually

READER, PUSHER, BOTH, ADMIN = (f"{name}-token-0123456789" for name in ("reader", "pusher", "both", "admin"))
FILE = f"""
# who may do what
read        {READER}  ranker
push        {PUSHER}
read,push   sha256:{sha256(BOTH.encode()).hexdigest()}  stream
admin       {ADMIN}  ops
"""
LOOKUP = {"features": ["users:score"], "entities": {"users_id": [2]}}
FEAST = {"features": ["users:score"], "entities": {"users_id": [2]}}


def bearing(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


# --- the token file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "roles"),
    [(READER, ["read"]), (PUSHER, ["push"]), (BOTH, ["read", "push"]), (ADMIN, ["read", "push", "admin"])],
)
def test_roles(token: str, roles: list[Role]) -> None:
    tokens = parse_tokens(FILE, "file")
    every: tuple[Role, ...] = ("read", "push", "admin")
    for role in every:
        if role in roles:
            tokens.check(f"Bearer {token}", role)
        else:
            with pytest.raises(RoleMissing, match=f"may {' and '.join(roles)}; the request needs one that may {role}"):
                tokens.check(f"Bearer {token}", role)


def test_names_are_those_of_the_file_or_its_lines() -> None:
    tokens = parse_tokens(FILE, "file")
    assert tokens.check(f"bearer  {READER} ", "read") == "ranker"
    assert tokens.check(f"Bearer {PUSHER}", "push") == "line 4"


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (None, "has none; send it as Authorization: Bearer TOKEN"),
        ("", "is not a bearer token"),
        ("Basic cmVhZGVyOg==", "is not a bearer token"),
        (READER, "is not a bearer token; send Bearer TOKEN"),
        ("Bearer", "not one of this server's"),
        ("Bearer wrong", "not one of this server's"),
        (f"Bearer {READER}x", "not one of this server's"),
        (f"Bearer {READER[:-1]}", "not one of this server's"),
        (f"Bearer sha256:{sha256(BOTH.encode()).hexdigest()}", "not one of this server's"),
        (f"Bearer {sha256(BOTH.encode()).hexdigest()}", "not one of this server's"),
        ("Bearer \udcff\udcfe", "not one of this server's"),
    ],
)
def test_what_is_no_token(sent: str | None, message: str) -> None:
    with pytest.raises(TokenInvalid, match=message):
        parse_tokens(FILE, "file").check(sent, "read")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "file holds no token"),
        ("# nothing\n\n", "file holds no token"),
        ("read", "file, line 1 has 1 fields; write lines of ROLES TOKEN"),
        (f"read {READER} a b", "file, line 1 has 4 fields"),
        (f"\n{READER} read", "file, line 2 does not begin with a role; the roles are read, push, admin"),
        (f"read,write {READER}", "file, line 1 does not begin with a role"),
        ("read short", "file, line 1: the token has 5 characters, but needs at least 16"),
        (f"read {READER}\u00e9", "file, line 1: a token may have only letters, digits and"),
        ("read sha256:abcdef", "file, line 1: after sha256: there must be 64 hex digits"),
        (f"read {READER}\npush {READER}", "file, line 2: the token appears twice"),
        (
            f"read {BOTH}\npush sha256:{sha256(BOTH.encode()).hexdigest().upper()}",
            "line 2: the token appears twice",
        ),
    ],
)
def test_a_file_that_is_wrong(text: str, message: str) -> None:
    with pytest.raises(SettingsInvalid, match=message) as caught:
        parse_tokens(text, "file")
    assert READER not in str(caught.value)


def test_who_else_can_read_the_file_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "tokens"
    for content, mode, told in (
        (FILE, 0o600, False),
        (FILE, 0o640, False),
        (FILE, 0o644, True),
        (f"read sha256:{'0' * 64}\n", 0o644, False),
    ):
        path.write_text(content)
        path.chmod(mode)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            warn_of_readers(path)
        assert bool(caplog.records) == told


def test_the_settings_do_not_show_tokens() -> None:
    assert READER not in repr(server_settings(store="s", tokens_text=FILE))


def test_others_are_let_in_only_if_that_is_said(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "", "10.0.0.1", "shoal.example.com"):
        with pytest.raises(SettingsInvalid, match="other machines can reach, and any of them could read, write and"):
            server_settings(store="s", host=host)
        server_settings(store="s", host=host, tokens="tokens")
        server_settings(store="s", host=host, tokens_text=FILE)
        server_settings(store="s", host=host, open_to_all=True)
        server_settings(store="s", host=host, unix_socket="s.sock")
        with pytest.raises(SettingsInvalid, match="other machines can reach"):
            server_settings(store="s", host=host, unix_socket="s.sock", grpc_port=1)
    for host in ("localhost", "127.0.0.1", "127.1.2.3", "::1"):
        server_settings(store="s", host=host)


# --- a server with tokens ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(root: ExportRoot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "store"
    stores.load(path, root)
    return path


@pytest.fixture(scope="module")
def guarded(store: Path, root: ExportRoot) -> Iterator[Server]:
    path = store.parent / "tokens"
    path.write_text(FILE)
    with Server(store, {"root": str(root)}, tokens=str(path), grpc_port=GRPC_PORT) as server:
        server.await_ready()
        yield server


@pytest.mark.parametrize(
    ("method", "path", "body", "role"),
    [
        ("POST", "/v1/lookup", LOOKUP, "read"),
        ("POST", "/get-online-features", FEAST, "read"),
        ("GET", "/v1/views", None, "read"),
        ("HEAD", "/v1/views", None, "read"),
        ("GET", "/v1/status", None, "read"),
        ("POST", "/v1/reload", {"view": "users"}, "admin"),
    ],
)
def test_each_endpoint_asks_for_its_role(guarded: Server, method: str, path: str, body: Any, role: str) -> None:
    may = {"read": (READER, BOTH, ADMIN), "admin": (ADMIN,)}[role]
    for token in (READER, PUSHER, BOTH, ADMIN):
        answer = guarded.ask(method, path, body, **bearing(token))
        assert answer.status == (200 if token in may else 403)
        if token not in may:
            assert answer.headers["www-authenticate"] == 'Bearer realm="shoal", error="insufficient_scope"'
    for headers in ({}, bearing("wrong"), {"Authorization": "Basic eDp5"}):
        answer = guarded.ask(method, path, body, **headers)
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == 'Bearer realm="shoal"'


def test_errors_say_what_is_missing(guarded: Server) -> None:
    assert guarded.lookup(["users:score"], {"users_id": [2]}).error == (
        "TokenInvalid",
        "the request needs a token, and has none; send it as Authorization: Bearer TOKEN",
    )
    answer = guarded.ask("POST", "/v1/reload", {}, **bearing(READER))
    assert answer.error == ("RoleMissing", "the token 'ranker' may read; the request needs one that may admin")


def test_feasts_clients_are_told_as_feast_tells_them(guarded: Server) -> None:
    answer = guarded.ask("POST", "/get-online-features", FEAST)
    assert answer.json == {"detail": "the request needs a token, and has none; send it as Authorization: Bearer TOKEN"}
    answer = guarded.ask("POST", "/get-online-features", FEAST, **bearing(PUSHER))
    message = "the token 'line 4' may push; the request needs one that may read"
    assert stores_json(answer) == {"module": "feast.errors", "class": "FeastPermissionError", "message": message}


def stores_json(answer: Answer) -> Any:
    """Return the JSON inside the JSON string of a Feast error."""
    return Answer(answer.status, {}, answer.json.encode()).json


def test_probes_and_metrics_are_open(guarded: Server) -> None:
    assert guarded.ask("GET", "/health").status == 200
    assert guarded.ask("GET", "/ready").status == 200
    metrics = guarded.ask("GET", "/metrics").body.decode()
    assert 'shoal_request_duration_seconds_count{endpoint="/v1/reload",status="401"}' in metrics


def test_a_refused_request_reads_no_body_and_does_nothing(guarded: Server) -> None:
    answer = guarded.ask("POST", "/v1/lookup", b"{" * 100_000)
    assert answer.status == 401
    assert guarded.ask("GET", "/nowhere").status == 404
    assert guarded.ask("DELETE", "/v1/lookup").status == 405


def test_the_log_says_who_gave_an_order_and_no_token(guarded: Server) -> None:
    assert guarded.ask("POST", "/v1/reload", {}, **bearing(ADMIN)).status == 200
    assert "POST /v1/reload by the token 'ops'" in guarded.log
    assert not [token for token in (READER, PUSHER, BOTH, ADMIN) if token in guarded.log]


def test_grpc_takes_the_same_tokens(guarded: Server) -> None:
    grpc = pytest.importorskip("grpc", reason="grpcio is not installed: pip install 'shoal[grpc]'")
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(guarded.grpc_address) as channel:

        def outcome(metadata: tuple[tuple[str, str], ...]) -> tuple[str, str]:
            call = channel.unary_unary("/feast.serving.ServingService/GetFeastServingInfo")
            try:
                call(b"", metadata=metadata, timeout=30)
            except grpc.RpcError as error:
                return error.code().name, error.details()
            return "OK", ""

        assert outcome((("authorization", f"Bearer {READER}"),)) == ("OK", "")
        assert outcome((("authorization", f"Bearer {ADMIN}"),)) == ("OK", "")
        code, message = outcome(())
        assert (code, "has none" in message) == ("UNAUTHENTICATED", True)
        assert outcome((("authorization", "Bearer wrong"),))[0] == "UNAUTHENTICATED"
        assert outcome((("authorization", f"Bearer {PUSHER}"),))[0] == "PERMISSION_DENIED"

        def is_serving() -> bool:
            health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
            return bool(health.status == health_pb2.HealthCheckResponse.SERVING)

        eventually(is_serving, "a server that is well, without a token")


def test_metrics_can_be_protected_and_tokens_come_from_the_environment(store: Path) -> None:
    with Server(store.with_name("other"), tokens_text=FILE, protect_metrics=True) as server:
        assert server.ask("GET", "/metrics").status == 401
        assert server.ask("GET", "/metrics", **bearing(PUSHER)).status == 403
        assert server.ask("GET", "/metrics", **bearing(READER)).status == 200
        assert server.ask("GET", "/health").status == 200


def test_tokens_are_replaced_in_all_workers_while_the_server_runs(store: Path, tmp_path: Path) -> None:
    """The file is replaced as in Kubernetes: it is a link into a directory, and the directory is a link that is
    replaced."""
    for number, token in enumerate((READER, PUSHER)):
        (tmp_path / f"version-{number}").mkdir()
        (tmp_path / f"version-{number}" / "tokens").write_text(f"read {token}\n")
    (tmp_path / "data").symlink_to("version-0")
    (tmp_path / "tokens").symlink_to("data/tokens")

    def outcomes() -> set[tuple[int, int]]:
        """Return the statuses for the old and the new token, from enough requests to reach both workers."""
        tokens = (READER, PUSHER)
        of_each = [
            tuple(server.ask("GET", "/v1/status", **bearing(token)).status for token in tokens) for _ in "12345678"
        ]
        return {(old, new) for old, new in of_each}

    with Server(store.with_name("replaced"), tokens=str(tmp_path / "tokens")) as server:
        assert outcomes() == {(200, 401)}
        (tmp_path / "new").symlink_to("version-1")
        (tmp_path / "new").replace(tmp_path / "data")
        eventually(lambda: server.log.count("tokens changed; the new value is in") >= 3, "all processes to see it")
        assert outcomes() == {(401, 200)}
        # An invalid file changes nothing, and each process reports it once.
        (tmp_path / "version-1" / "tokens").write_text("read me\n")
        line = "tokens, line 1: the token has 2 characters"
        eventually(lambda: server.log.count(line) >= 3, "all processes to see that it is wrong")
        assert outcomes() == {(401, 200)}
        (tmp_path / "version-1" / "tokens").unlink()
        eventually(lambda: server.log.count("which cannot be read") >= 3, "all processes to see that it is gone")
        assert outcomes() == {(401, 200)}
        assert server.log.count(line) == 3
        (tmp_path / "version-1" / "tokens").write_text(f"read {READER}\n")
        eventually(lambda: outcomes() == {(200, 401)}, "the tokens that are right again")


def test_a_server_does_not_start_with_a_file_that_is_wrong(store: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("read\n")
    server = Server(store.with_name("unstarted"), tokens=str(tmp_path / "tokens"))
    assert server.process.wait(30) != 0
    assert f"SettingsInvalid: {tmp_path / 'tokens'}, line 1 has 1 fields" in server.log


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (None, "shoal: host is '0.0.0.0', which other machines can reach"),
        ("read short", "shoal: SHOAL_TOKENS, line 1: the token has 5 characters"),
        ("", "shoal: SHOAL_TOKENS holds no token"),
    ],
)
def test_the_command_takes_tokens_from_the_environment(tmp_path: Path, tokens: str | None, message: str) -> None:
    environment = os.environ | ({"SHOAL_TOKENS": tokens} if tokens is not None else {})
    command = [sys.executable, "-m", "shoal", "serve", "--store", str(tmp_path / "store"), "--host", "0.0.0.0"]
    here = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=here, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert not (tmp_path / "store").exists()
