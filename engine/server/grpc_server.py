"""One worker's gRPC server for Feast's serving protocol: lookups for clients of Feast's Go and Java servers.

    feast.serving.ServingService   GetOnlineFeatures, GetFeastServingInfo
    GrpcFeatureServer              GetOnlineFeatures, under the service name of `feast listen`
    grpc.health.v1.Health          for load balancers

Requests and answers are passed as encoded bytes, and gRPC runs in the worker's own event loop. Once a store is open,
every answer has x-shoal-version in its trailing metadata.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from shoal.engine.base.errors import DeadlinePassed, Overloaded, ShoalError
from shoal.engine.encoders import feast_protobuf
from shoal.engine.lookup.allowance import Allowance
from shoal.engine.lookup.remote_rows import NOTHING
from shoal.engine.server.accepting import HANDSHAKE_SECONDS
from shoal.engine.server.grpc_messages import parse_grpc_request, parse_keys
from shoal.engine.server.metrics import Metrics
from shoal.engine.server.outgoing import Outgoing
from shoal.engine.server.protection import Auth
from shoal.engine.server.requests import check_keys
from shoal.engine.server.responses import APPLIED_HEADER, VERSION_HEADER, sendable
from shoal.engine.server.served_store import ServedStore
from shoal.engine.server.served_tables import PARTIAL_HEADER, ServedTables, parse_partial
from shoal.engine.server.settings import ServerSettings
from shoal.engine.server.tls import Tls

log = logging.getLogger("shoal.worker")
_access_log = logging.getLogger("shoal.access")

_SERVING_SERVICE = "feast.serving.ServingService"
_FEATURE_SERVER = "GrpcFeatureServer"
_EVERYTHING = ""
"""The service name for the health of the whole server."""

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    421: grpc.StatusCode.FAILED_PRECONDITION,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
    503: grpc.StatusCode.UNAVAILABLE,
}


class Answer(NamedTuple):
    """An encoded message, the log positions of its views (see `StoreVersion.applied`), and the names of views with
    missing rows."""

    content: bytes
    applied: str = ""
    partial: Sequence[str] = ()


Method = Callable[[bytes, grpc.aio.ServicerContext], Awaitable[Answer]]
"""The handler of a gRPC method."""


class GrpcServer:
    """One worker's gRPC server."""

    def __init__(
        self,
        settings: ServerSettings,
        protection: Auth,
        served: ServedStore,
        metrics: Metrics,
        tables: ServedTables,
        outgoing: Outgoing,
    ) -> None:
        self._tables = tables
        self._settings = settings
        self._protection = protection
        self._served = served
        self._metrics = metrics
        self._outgoing = outgoing
        # The calls with an answer that the client has not read yet, and the time when the answer was ready.
        self._untaken: dict[asyncio.Task[Any], float] = {}
        self._health = health.aio.HealthServicer()
        options = {
            "grpc.so_reuseport": 1,
            "grpc.max_receive_message_length": settings.max_body_bytes,
            "grpc.max_allowed_incoming_connections": settings.max_connections,
            # The time limit for a client's TLS handshake and first bytes.
            "grpc.server_handshake_timeout_ms": _milliseconds(min(settings.patience_seconds, HANDSHAKE_SECONDS)),
            "grpc.max_connection_idle_ms": _milliseconds(settings.idle_seconds),
            # Close the connections of clients that are gone or read nothing, and drop their unread answers.
            "grpc.keepalive_time_ms": _milliseconds(settings.patience_seconds),
            "grpc.keepalive_timeout_ms": _milliseconds(settings.patience_seconds),
        }
        # While this many requests are being answered, further requests get RESOURCE_EXHAUSTED.
        self._server = grpc.aio.server(options=tuple(options.items()), maximum_concurrent_rpcs=settings.max_connections)
        self._offer(_SERVING_SERVICE, self._get_online_features, self._get_feast_serving_info)
        self._offer(_FEATURE_SERVER, self._get_online_features)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    async def start(self, address: str) -> None:
        """Listen on an address that is shared with other workers, and start the server.

        Raises:
            RuntimeError: the server cannot listen on the address.
        """
        tls = self._protection.tls
        if tls is None:
            self._server.add_insecure_port(address)
        else:
            self._server.add_secure_port(address, _credentials(self._protection, tls))
        await self.show_health()
        await self._server.start()

    async def show_health(self) -> None:
        """Update the health status: SERVING if this server is ready for lookups, else NOT_SERVING."""
        try:
            self._served.ready()
            state = health_pb2.HealthCheckResponse.SERVING
        except ShoalError:
            state = health_pb2.HealthCheckResponse.NOT_SERVING
        for service in (_EVERYTHING, _SERVING_SERVICE, _FEATURE_SERVER):
            await self._health.set(service, state)

    async def stop(self) -> None:
        """Accept no more requests, and finish the current ones."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(self._settings.drain_seconds)

    def _offer(self, service: str, *methods: Method) -> None:
        handlers = {}
        for method in methods:
            name = "".join(word.capitalize() for word in method.__name__.split("_"))
            handlers[name] = grpc.unary_unary_rpc_method_handler(partial(self._answer, name, method))
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))

    async def _answer(self, name: str, method: Method, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Answer any request: turn errors into status codes, set the trailing metadata, and count the answer."""
        started = time.perf_counter()
        answer = Answer(b"")
        code = grpc.StatusCode.OK
        message = ""
        try:
            if self._protection.asks_for_tokens:
                self._protection.authorize(_metadata(context, "authorization"), "read")
            remaining = context.time_remaining()
            if remaining is not None and remaining <= 0:
                raise DeadlinePassed("the request's deadline had passed before it could be answered")
            answer = await method(request, context)
        except ShoalError as error:
            if isinstance(error, DeadlinePassed | Overloaded):
                self._metrics.count_shed(error.reason if isinstance(error, Overloaded) else "deadline")
            code = _CODES.get(error.http_status, grpc.StatusCode.INTERNAL)
            message = sendable(str(error))
        except Exception:
            log.exception("%s failed", name)
            code = grpc.StatusCode.INTERNAL
            message = "an unexpected error occurred; see the log of the server"
        now = self._served.version()
        if now is not None:
            metadata = [(VERSION_HEADER.lower(), str(now.id))]
            if answer.applied:
                metadata.append((APPLIED_HEADER.lower(), answer.applied))
            if answer.partial:
                metadata.append((PARTIAL_HEADER.lower(), ",".join(answer.partial)))
                self._metrics.count_partial(answer.partial)
            context.set_trailing_metadata(tuple(metadata))
        seconds = time.perf_counter() - started
        self._metrics.count_request(f"grpc:{name}", code.name, seconds)
        if self._settings.access_log:
            _access_log.info("%s %s %s %d bytes, %.6f s", context.peer(), name, code.name, len(answer.content), seconds)
        if code is not grpc.StatusCode.OK:
            await context.abort(code, message)
        if answer.content:
            self._hold_until_done(answer.content, context)
        return answer.content

    def _hold_until_done(self, content: bytes, context: grpc.aio.ServicerContext) -> None:
        """Count an answer as unread until gRPC has sent it."""
        size = len(content)
        call = asyncio.current_task()
        assert call is not None

        def done(_: object) -> None:
            self._outgoing.release(size)
            self._untaken.pop(call, None)

        self._outgoing.hold(size)
        self._untaken[call] = time.monotonic()
        context.add_done_callback(done)

    def end_overdue(self) -> None:
        """Cancel the calls of clients that take too long to read their answer, but only while memory is short."""
        if not self._outgoing.is_short:
            return
        for call, since in list(self._untaken.items()):
            if time.monotonic() - since > self._settings.patience_seconds and call.cancel():
                self._metrics.count_shed("slow")

    async def _get_online_features(self, request: bytes, context: grpc.aio.ServicerContext) -> Answer:
        asked = parse_grpc_request(request)
        entities = {name: parse_keys(name, data) for name, data in asked.entities.items()}
        check_keys(entities, self._settings.max_keys)
        # Rows that are too old are served and marked as such, as in Feast's own servers.
        options: dict[str, Any] = {"stale": "serve", "incomplete": "not_found", "max_values": self._settings.max_values}
        options["max_bytes"] = self._settings.max_answer_bytes
        options |= {"fetched": NOTHING, "partial": parse_partial(_metadata(context, PARTIAL_HEADER.lower()))}
        if self._tables.are_needed():
            remaining = context.time_remaining()
            options["fetched"] = await self._tables.fetch(asked.wanted, entities, "not_found", remaining)
        self._outgoing.check()
        # There is no await from here to the end of the lookup, so the store version is held only until its rows are
        # copied.
        store = self._served.open()
        result = store.lookup(asked.wanted, entities, **options)
        self._metrics.count_lookup(result)
        views = store.version().views
        used = frozenset().union(*(views[part.rows.view].join_key_names for part in result.parts))
        join_keys = {name: data for name, data in asked.entities.items() if name in used}

        def encode(allowance: Allowance) -> bytes:
            return feast_protobuf.encode(
                result,
                join_keys,
                full_feature_names=asked.full_feature_names,
                name_views=asked.name_views,
                allowance=allowance,
            )

        content = await self._outgoing.encode(result, encode)
        return Answer(content, result.applied, result.partial)

    async def _get_feast_serving_info(self, request: bytes, context: grpc.aio.ServicerContext) -> Answer:
        return Answer(feast_protobuf.encode_serving_info(version("shoal")))


def _milliseconds(seconds: float) -> int:
    """Convert seconds to milliseconds for gRPC's options."""
    return min(max(1, round(1e3 * seconds)), 2**31 - 1)


def _metadata(context: grpc.aio.ServicerContext, wanted: str) -> str | None:
    for name, value in context.invocation_metadata() or ():
        if name == wanted:
            return str(value)
    return None


def _credentials(protection: Auth, first: Tls) -> grpc.ServerCredentials:
    """Return gRPC's TLS credentials. gRPC calls `changed` before each new connection, so that a changed certificate is
    used."""
    given = first

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal given
        tls = protection.tls
        if tls is None or tls is given:
            return None
        given = tls
        return _certificates(tls)

    asks_for_certificate = first.client_ca is not None
    return grpc.dynamic_ssl_server_credentials(_certificates(first), changed, asks_for_certificate)


def _certificates(tls: Tls) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(tls.key, tls.certificate)], tls.client_ca)
