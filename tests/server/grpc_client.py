"""A gRPC client of Feast's serving protocol. It takes and returns messages in the JSON format of Protocol Buffers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.server.feast_messages import decode, encode
from tests.server.serving import PATIENCE_SECONDS, Server

SERVING = "feast.serving.ServingService"
Asked = dict[str, Any]


def texts(*values: str) -> Asked:
    return {"val": [{"string_val": value} for value in values]}


def integers(*values: int) -> Asked:
    return {"val": [{"int64_val": value} for value in values]}


def asked(features: list[str] | str, entities: Asked, **more: Any) -> Asked:
    kind = {"feature_service": features} if isinstance(features, str) else {"features": {"val": features}}
    return kind | {"entities": entities} | more


def as_sent(request: Asked) -> bytes:
    """Return the bytes of a request. Its maps are encoded as lists of entries, as Protocol Buffers encode them."""
    maps = {
        name: [{"key": key, "value": value} for key, value in request[name].items()]
        for name in ("entities", "request_context")
        if name in request
    }
    return encode("GetOnlineFeaturesRequest", request | maps)


class Client:
    """A client with its own channel and therefore its own connection."""

    def __init__(self, address: str) -> None:
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
        self.channel = grpc.insecure_channel(address, options=options)

    def call(self, request: bytes, service: str = SERVING, method: str = "GetOnlineFeatures") -> Any:
        """Return the answer's bytes and the call."""
        return self.channel.unary_unary(f"/{service}/{method}").with_call(
            request, timeout=PATIENCE_SECONDS, wait_for_ready=True
        )

    def ask(self, request: Asked) -> dict[str, Any]:
        return decode("GetOnlineFeaturesResponse", self.call(as_sent(request))[0])

    def refusal(self, request: bytes) -> tuple[str, str]:
        with pytest.raises(grpc.RpcError) as caught:
            self.call(request)
        return caught.value.code().name, caught.value.details()

    def health(self, service: str = "") -> str:
        request = health_pb2.HealthCheckRequest(service=service)
        status = health_pb2_grpc.HealthStub(self.channel).Check(request, timeout=PATIENCE_SECONDS).status
        name: str = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
        return name


@contextmanager
def client_of(server: Server) -> Iterator[Client]:
    client = Client(server.grpc_address)
    with client.channel:
        yield client
