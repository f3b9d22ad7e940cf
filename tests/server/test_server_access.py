"""Commands that query a server over HTTP: the credentials that they send, and the certificates that they trust."""

import http.server
import threading
from pathlib import Path
from typing import Any

import pytest

from shoal.engine.base.errors import ServerFailed
from shoal.engine.base.server_access import ServerAccess, server_access
from shoal.engine.feast.diff import ServerSide
from shoal.engine.root.export_root import ExportRoot
from tests import stores
from tests.server.certificates import Authority
from tests.server.serving import Server

TOKEN = "reader-token-0123456789"


def test_a_server_with_tokens_and_certificates_is_asked(
    root: ExportRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(tmp_path / "authority")
    own = authority.sign("server")
    mine = authority.sign("client")
    stores.load(tmp_path / "store", root)
    files = {"tls_certificate": own.certificate, "tls_key": own.key, "tls_client_ca": authority.certificate}
    settings: dict[str, Any] = {name: str(path) for name, path in files.items()} | {"tokens_text": f"read {TOKEN}"}
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    with Server(tmp_path / "store", tls=authority.client(mine), **settings) as server:
        server.await_ready()
        address = server.record.address
        access = server_access(tmp_path / "token", authority.certificate, mine.certificate, mine.key)
        side = ServerSide(address, access)
        assert set(side.description.views) == {"items", "users", "recent", "pairs"}
        assert side.answer(["users:score"], {"users_id": [2]})["users:score"][0].value == 0.5
        with pytest.raises(ServerFailed, match=r"answers 401: .*has none; send it as Authorization"):
            ServerSide(address, ServerAccess(tls=access.tls))
        with pytest.raises(ServerFailed, match=r"does not answer like a Shoal server: .*certificate verify failed"):
            ServerSide(address, ServerAccess(TOKEN))
        with pytest.raises(ServerFailed, match="does not answer like a Shoal server"):
            ServerSide(address, server_access(tmp_path / "token", authority.certificate))
        monkeypatch.setenv("SHOAL_TOKEN", TOKEN)
        assert ServerSide(address, server_access(None, authority.certificate, mine.certificate, mine.key))


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    with pytest.raises(ServerFailed, match=r"the token in .*missing cannot be read"):
        server_access(tmp_path / "missing")
    with pytest.raises(ServerFailed, match="empty cannot be used for TLS"):
        server_access(ca=tmp_path / "empty")
    with pytest.raises(ServerFailed, match="empty cannot be used for TLS"):
        server_access(certificate=tmp_path / "empty")
    with pytest.raises(ServerFailed, match="empty has no certificate; give --tls-certificate too"):
        server_access(key=tmp_path / "empty")
    for address in ("file:///etc/hostname", "127.0.0.1:8080", ""):
        with pytest.raises(ServerFailed, match="is not the address of a server; give an address such as http://"):
            ServerSide(address, ServerAccess())


def test_a_token_does_not_follow_a_redirection() -> None:
    """Otherwise any server could redirect the token to another address."""
    seen: list[tuple[str, str | None]] = []

    class Redirecting(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers["Authorization"]))
            self.send_response(404 if self.path == "/elsewhere" else 302)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Redirecting) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(ServerFailed, match="answers 404"):
                ServerSide(f"http://127.0.0.1:{server.server_port}", ServerAccess(TOKEN))
        finally:
            server.shutdown()
            thread.join()
    assert seen == [("/v1/views", f"Bearer {TOKEN}"), ("/elsewhere", None)]
