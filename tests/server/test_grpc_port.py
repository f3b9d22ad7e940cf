"""The gRPC port is bound before the workers start, so an unusable port ends the server at once."""

import importlib.util
import socket
from pathlib import Path
from typing import Any

import pytest

from shoal.engine.base.errors import AddressUnusable, GrpcMissing
from shoal.engine.server.grpc_port import grpc_address, reserve_port
from shoal.engine.server.settings import ServerSettings

pytest.importorskip("grpc", reason="grpcio is not installed: pip install 'shoal[grpc]'")


def settings(**values: Any) -> ServerSettings:
    return ServerSettings(store=Path("store"), **values)


def test_without_a_port_nothing_is_held() -> None:
    with reserve_port(settings()) as holder:
        assert holder is None


def test_workers_can_listen_on_the_port_and_other_servers_cannot() -> None:
    with reserve_port(settings(grpc_port=0)) as holder:
        assert holder is not None
        host, _, port = grpc_address(holder).rpartition(":")
        refusal = pytest.raises(AddressUnusable, match=f"cannot listen for gRPC on {host}:{port}: .* give another port")
        with refusal, reserve_port(settings(grpc_port=int(port))):
            pass
        for _ in range(2):
            worker = socket.create_server((host, int(port)), reuse_port=True)
            worker.close()


def test_a_host_that_is_not_this_machines_is_refused() -> None:
    with pytest.raises(AddressUnusable), reserve_port(settings(grpc_port=0, host="192.0.2.1")):
        pass


@pytest.mark.parametrize("missing", ["grpc", "google.protobuf"])
def test_packages_that_are_missing_are_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    refusal = pytest.raises(GrpcMissing, match=rf"{missing}; install it: pip install 'shoal\[grpc\]'")
    with refusal, reserve_port(settings(grpc_port=0)):
        pass
