"""HTTPS and gRPC over TLS: the server's certificate, the clients that it accepts, and the replacement of its
certificate."""

import contextlib
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from shoal.engine.base.errors import SettingsInvalid
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.server.settings import server_settings
from shoal.engine.server.tls import read_tls
from tests import stores
from tests.deploy.chart import CHART
from tests.server.certificates import Authority, Certificate, openssl
from tests.server.conftest import GRPC_PORT
from tests.server.serving import PATIENCE_SECONDS, Connection, Server, eventually

ASKED = (["users:score"], {"users_id": [2]})


def settings_of(certificate: Certificate, **more: Any) -> dict[str, Any]:
    paths = {"tls_certificate": certificate.certificate, "tls_key": certificate.key} | more
    return {name: str(value) if isinstance(value, Path) else value for name, value in paths.items()}


@pytest.fixture(scope="module")
def store(root: ExportRoot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "store"
    stores.load(path, root)
    return path


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def secured(store: Path, authority: Authority) -> Iterator[Server]:
    settings: dict[str, Any] = {"grpc_port": GRPC_PORT} | settings_of(authority.sign("server"))
    with Server(store, tls=authority.client(), environment={"OPEN_FILES": "512"}, **settings) as server:
        server.await_ready()
        yield server


def open_by(server: Server, context: ssl.SSLContext) -> ssl.SSLSocket:
    host, _, port = server.record.address.removeprefix("https://").rpartition(":")
    plain = socket.create_connection((host, int(port)), timeout=PATIENCE_SECONDS)
    return context.wrap_socket(plain, server_hostname=host)


def serial_of(server: Server, authority: Authority) -> Any:
    with open_by(server, authority.client()) as connection:
        found = connection.getpeercert()
        assert found is not None
        return found["serialNumber"]


def test_lookups_over_tls(secured: Server) -> None:
    assert secured.record.address.startswith("https://127.0.0.1:")
    with secured.connection() as connection:
        for _ in range(3):
            body = {"features": ASKED[0], "entities": ASKED[1]}
            answer = connection.ask("POST", "/v1/lookup", body)
            assert (answer.status, answer.json["features"]) == (200, {"users:score": [0.5]})
        large = connection.ask("POST", "/v1/lookup", body | {"entities": {"users_id": [2] * 5000}})
        assert large.json["keys"] == 5000


def test_clients_that_never_speak_tls_lock_nobody_out(secured: Server) -> None:
    host, _, port = secured.record.address.removeprefix("https://").rpartition(":")
    with contextlib.ExitStack() as silent:
        # More connections than two workers with 512 open files accept.
        for _ in range(500):
            silent.enter_context(socket.create_connection((host, int(port))))
        assert [secured.ask("GET", path).status for path in ("/health", "/ready", "/metrics")] == [200] * 3
        eventually(lambda: secured.lookup(*ASKED).status == 200, "a place for a client that asks")


def is_refused(server: Server, context: ssl.SSLContext) -> bool:
    """Return whether a client gets no answer.

    With TLS 1.3, a client without the right certificate learns about the rejection only when it reads.
    """
    try:
        with open_by(server, context) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: shoal\r\n\r\n")
            return connection.recv(1) == b""
    except OSError:
        return True


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_what_is_older_than_tls_1_2_is_not_spoken(secured: Server, authority: Authority) -> None:
    old = authority.client()
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.minimum_version = ssl.TLSVersion.TLSv1
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    assert is_refused(secured, old)
    middle = authority.client()
    middle.maximum_version = ssl.TLSVersion.TLSv1_2
    with open_by(secured, middle) as connection:
        cipher = connection.cipher()
        assert cipher is not None
        assert connection.version() == "TLSv1.2"
        assert cipher[0].startswith("ECDHE-")
    with open_by(secured, authority.client()) as connection:
        assert connection.version() == "TLSv1.3"
    assert not is_refused(secured, authority.client())


def test_connections_that_come_to_nothing_leave_nothing(secured: Server) -> None:
    """A handshake that fails or stops half way leaves no open socket, and does not stay in the worker's connection
    count. Otherwise the other worker would get all new connections."""

    def connected() -> list[int]:
        of_workers = [psutil.Process(pid).net_connections("tcp") for pid in secured.record.workers]
        return [sum(each.status != psutil.CONN_LISTEN for each in connections) for connections in of_workers]

    host, _, port = secured.record.address.removeprefix("https://").rpartition(":")
    eventually(lambda: connected() == [0, 0], "no connection yet")
    for number in range(30):
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall((b"", b"\x16\x03\x01", b"GET /health HTTP/1.1\r\n\r\n")[number % 3])
            if number % 3 == 2:
                with contextlib.suppress(ConnectionError):
                    assert b"HTTP/1" not in stranger.recv(100)
    eventually(lambda: connected() == [0, 0], "no connection left")
    connections = [Connection(secured.record.address, secured.tls) for _ in range(8)]
    assert all(connection.ask("GET", "/health").status == 200 for connection in connections)
    assert connected() == [4, 4]
    for connection in connections:
        connection.close()
    assert "TLS handshake with ('127.0.0.1', " in secured.log
    assert "Traceback" not in secured.log


def test_a_certificate_is_replaced_while_requests_go_on(secured: Server, authority: Authority) -> None:
    before = serial_of(secured, authority)
    with secured.connection() as old:
        authority.sign("server")
        # Each worker reloads the certificate by itself, and any worker may accept a connection.
        for _ in range(5):
            eventually(lambda: serial_of(secured, authority) != before, "the new certificate")
        assert old.ask("GET", "/health").status == 200


def test_a_certificate_that_is_bad_is_not_taken_over(secured: Server, authority: Authority) -> None:
    before = serial_of(secured, authority)
    path = authority.certificate.with_name("server.pem")
    path.write_text("no certificate")
    eventually(lambda: f"tls_certificate is '{path}', which holds no certificate" in secured.log, "a line of the log")
    eventually(lambda: secured.log.count("the previous value stays in force") >= 3, "the supervisor and both workers")
    assert serial_of(secured, authority) == before
    # A new worker uses the last good certificate, too.
    victim = secured.record.workers[0]
    psutil.Process(victim).kill()
    eventually(lambda: len(secured.record.workers) == 2 and victim not in secured.record.workers, "another worker")
    eventually(lambda: secured.log.count("opened") >= 3, "that it is open")
    assert {serial_of(secured, authority) for _ in range(10)} == {before}


def test_clients_without_a_certificate_are_sent_away(store: Path, authority: Authority, tmp_path: Path) -> None:
    client = authority.sign("client")
    stranger = Authority(tmp_path / "strangers").sign("client")
    settings = settings_of(authority.sign("server"), tls_client_ca=authority.certificate)
    with Server(store, tls=authority.client(client), **settings) as server:
        server.await_ready()
        assert server.lookup(*ASKED).status == 200
        assert is_refused(server, authority.client())
        assert is_refused(server, authority.client(stranger))
        assert (probe(server, client).returncode, probe(server, client).stdout[:4]) == (0, "200 ")
        assert probe(server, stranger).returncode != 0
        eventually(lambda: server.log.count("TLS handshake with") >= 2, "both in the log")


def probe(server: Server, own: Certificate) -> "subprocess.CompletedProcess[str]":
    """Run the chart's probe with a client's certificate. In production, it runs in the server's container."""
    program = (CHART / "files" / "probe.py").read_text()
    for mounted, file in (("tls.crt", own.certificate), ("tls.key", own.key)):
        program = program.replace(f"/etc/shoal/client/{mounted}", str(file))
    port = server.record.address.rpartition(":")[2]
    return subprocess.run([sys.executable, "-c", program, port, "/ready"], capture_output=True, text=True, check=False)


def test_a_server_with_a_client_ca_may_listen_to_all(store: Path, authority: Authority) -> None:
    files = settings_of(authority.sign("server"))
    with pytest.raises(SettingsInvalid, match=r"host is '0\.0\.0\.0', which other machines can reach"):
        server_settings(store=store, host="0.0.0.0", **files)
    server_settings(store=store, host="0.0.0.0", tls_client_ca=authority.certificate, **files)


def test_grpc_over_tls(secured: Server, authority: Authority, tmp_path: Path) -> None:
    grpc = pytest.importorskip("grpc", reason="grpcio is not installed: pip install 'shoal[grpc]'")
    trusted = grpc.ssl_channel_credentials(authority.certificate.read_bytes())
    strangers = grpc.ssl_channel_credentials(Authority(tmp_path / "stranger").certificate.read_bytes())
    assert grpc_info(grpc, secured, strangers) == "UNAVAILABLE"
    assert grpc_info(grpc, secured, trusted) == "OK"
    assert grpc_info(grpc, secured, None) == "UNAVAILABLE"
    other = Authority(tmp_path / "other")
    replace(authority, other)
    credentials = grpc.ssl_channel_credentials(other.certificate.read_bytes())
    eventually(lambda: grpc_info(grpc, secured, credentials) == "OK", "the new certificate")


def test_grpc_asks_for_certificates(store: Path, authority: Authority, tmp_path: Path) -> None:
    grpc = pytest.importorskip("grpc", reason="grpcio is not installed: pip install 'shoal[grpc]'")
    client = authority.sign("client")
    stranger = Authority(tmp_path / "strangers").sign("client")
    settings = settings_of(authority.sign("server"), tls_client_ca=authority.certificate)
    ca = authority.certificate.read_bytes()
    with Server(store, tls=authority.client(client), grpc_port=0, **settings) as server:
        server.await_ready()
        for own, outcome in ((client, "OK"), (stranger, "UNAVAILABLE"), (None, "UNAVAILABLE")):
            mine = (own.key.read_bytes(), own.certificate.read_bytes()) if own else ()
            assert grpc_info(grpc, server, grpc.ssl_channel_credentials(ca, *mine)) == outcome


def grpc_info(grpc: Any, server: Server, credentials: Any) -> str:
    """Return the status of a gRPC call on a new connection."""
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
    address = server.grpc_address
    channel = (
        grpc.secure_channel(address, credentials, options)
        if credentials is not None
        else grpc.insecure_channel(address, options)
    )
    with channel:
        try:
            channel.unary_unary("/feast.serving.ServingService/GetFeastServingInfo")(b"", timeout=PATIENCE_SECONDS)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def replace(authority: Authority, other: Authority) -> None:
    """Replace a server's certificate with one that another authority signed."""
    new = other.sign("server")
    # The two files are replaced one after the other, and do not match in between.
    new.key.replace(authority.certificate.with_name("server.key"))
    new.certificate.replace(authority.certificate.with_name("server.pem"))


# --- startup -------------------------------------------------------------------------------------------------------


def test_files_that_will_not_do(authority: Authority, tmp_path: Path) -> None:
    good = authority.sign("server")
    other = authority.sign("other")
    empty = tmp_path / "empty"
    missing = tmp_path / "missing"
    locked = tmp_path / "locked"
    empty.write_text("")
    openssl("ec", "-in", good.key, "-aes128", "-passout", "pass:secret", "-out", locked)
    cases: list[tuple[dict[str, Path], str]] = [
        ({"tls_certificate": missing}, "tls_certificate is '.*missing', which cannot be read: .*No such file"),
        ({"tls_key": missing}, "tls_key is '.*missing', which cannot be read: .*No such file"),
        ({"tls_client_ca": missing}, "tls_client_ca is '.*missing', which cannot be read: .*No such file"),
        ({"tls_certificate": empty}, "tls_certificate is '.*empty', which holds no certificate as PEM"),
        ({"tls_client_ca": empty}, "tls_client_ca is '.*empty', which holds no certificate as PEM"),
        ({"tls_key": empty}, "tls_key is '.*empty', which holds no private key"),
        ({"tls_key": other.key}, "tls_key is '.*other.key', which is the key of another certificate"),
        ({"tls_key": locked}, "tls_key is '.*locked', which holds no private key; .* without a passphrase"),
    ]
    for wrong, message in cases:
        settings = server_settings(store=tmp_path, **(settings_of(good) | wrong))
        with pytest.raises(SettingsInvalid, match=message):
            read_tls(settings)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tls_key": "k"}, "tls_key is set, but tls_certificate is not"),
        ({"tls_certificate": "c"}, "tls_certificate is set, but tls_key is not"),
        ({"tls_client_ca": "a"}, "tls_client_ca is set, but tls_certificate is not"),
    ],
)
def test_settings_that_need_each_other(values: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsInvalid, match=message):
        server_settings(store="s", **values)
