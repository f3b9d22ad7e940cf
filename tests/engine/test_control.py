"""The address of the control socket, and clients that find no writer, or something that is not a writer."""

import asyncio
import socket
import threading
from pathlib import Path

import pytest

from shoal.engine.base.errors import AddressUnusable, NotPublished, ShoalError, WriterUnavailable
from shoal.engine.process.control import WriterClient, listen_unix, unix_address, writer_socket_path


@pytest.mark.parametrize("depth", [1, 30])
def test_addresses_of_any_length_bind_and_connect(tmp_path: Path, depth: int) -> None:
    path = tmp_path.joinpath(*["directory"] * depth) / "writer.sock"
    with listen_unix(path) as listener, socket.socket(socket.AF_UNIX) as client:
        with unix_address(path) as address:
            client.connect(address)
        listener.setblocking(True)
        listener.accept()[0].close()
        with pytest.raises(AddressUnusable, match="another process listens"):
            listen_unix(path)
    listen_unix(path).close()


def test_no_writer(tmp_path: Path) -> None:
    with pytest.raises(WriterUnavailable, match=r"no writer answers on .*writer\.sock .*`shoal serve` runs one"):
        asyncio.run(WriterClient(tmp_path).status())


@pytest.mark.parametrize(
    ("status", "body", "error", "message"),
    [
        (404, '{"error": {"code": "NotPublished", "message": "no view x"}}', NotPublished, "no view x"),
        (500, '{"error": {"code": "Unheard", "message": "a bug"}}', ShoalError, "a bug"),
        (500, '{"error": {"code": "annotations", "message": "a bug"}}', ShoalError, "a bug"),
        (500, "<html>", WriterUnavailable, "is not a writer: status 500, b'<html>'"),
        (200, "", WriterUnavailable, "is not a writer: status 200"),
    ],
)
def test_errors_of_the_writer_are_raised_as_they_are(
    tmp_path: Path, status: int, body: str, error: type[ShoalError], message: str
) -> None:
    with listen_unix(writer_socket_path(tmp_path)) as listener:
        listener.setblocking(True)
        answering = threading.Thread(target=answer_once, args=(listener, status, body))
        answering.start()
        with pytest.raises(ShoalError, match=message) as raised:
            asyncio.run(WriterClient(tmp_path).reload("x"))
        answering.join()
    assert type(raised.value) is error


def answer_once(listener: socket.socket, status: int, body: str) -> None:
    connection, _ = listener.accept()
    with connection:
        received = b""
        while not received.endswith(b"}"):
            received += connection.recv(65536)
        head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        connection.sendall((head + body).encode())
