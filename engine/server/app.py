"""The HTTP application of one worker: its endpoints, and their common error handling, authorization and metrics.

    POST /v1/lookup               features in JSON, Arrow or NumPy
    POST /get-online-features     the same for Feast's clients
    POST /v1/push                 rows written directly
    POST /push                    the same for Feast's clients, by push source
    POST /write-to-online-store   and by feature view
    GET  /v1/views              schemas and feature services
    GET  /v1/status             the state of each view, and the processes
    POST /v1/reload             forwarded to the writer
    GET  /openapi.json          the OpenAPI document of these endpoints
    GET  /health, /ready        for load balancers
    GET  /metrics               for Prometheus

Once a store is open, every response has the header X-Shoal-Version. A response to a lookup also has X-Shoal-Applied. If
the server has tokens, a request needs a token with the endpoint's role. The endpoints for load balancers need no token.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple

from aiohttp import StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage

from shoal.engine.base.errors import (
    BodyTooSlow,
    DeadlinePassed,
    MaterializeElsewhere,
    Overloaded,
    RoleMissing,
    ShoalError,
    TokenInvalid,
)
from shoal.engine.lookup.remote_rows import NOTHING
from shoal.engine.lookup.result import LookupResult, MatrixResult
from shoal.engine.process.control import WriterClient, error_document, first_failure
from shoal.engine.server import feast
from shoal.engine.server.accepting import ConnectionCounts
from shoal.engine.server.admission import TIMEOUT_HEADER, Admission, timeout_seconds
from shoal.engine.server.connections import Connection, ConnectionServer
from shoal.engine.server.metrics import Metrics
from shoal.engine.server.negotiation import choose_format
from shoal.engine.server.openapi import DOCUMENT
from shoal.engine.server.outgoing import Outgoing
from shoal.engine.server.protection import Auth
from shoal.engine.server.pushes import Pushes
from shoal.engine.server.requests import (
    BodyReader,
    LookupRequest,
    ReloadBody,
    check_keys,
    remaining_seconds,
    set_deadline,
)
from shoal.engine.server.responses import (
    VERSION_HEADER,
    answer_lookup,
    bytes_response,
    error_response,
    json_response,
)
from shoal.engine.server.served_store import ServedStore
from shoal.engine.server.served_tables import PARTIAL_HEADER, ServedTables, parse_partial
from shoal.engine.server.settings import ServerSettings
from shoal.engine.server.tokens import Role
from shoal.engine.status.live import describe_live
from shoal.engine.status.processes import describe_server
from shoal.engine.status.replication import read_replication
from shoal.engine.status.scrubbed import describe_scrub
from shoal.engine.status.store import describe_version, describe_views

log = logging.getLogger("shoal.worker")

_FEAST_PATHS = {
    _FEAST_LOOKUP := "/get-online-features",
    _FEAST_PUSH := "/push",
    _FEAST_WRITE := "/write-to-online-store",
    *(_FEAST_MATERIALIZE := ("/materialize", "/materialize-incremental")),
}

Handler = Callable[[web.BaseRequest], Awaitable[web.Response]]


class Endpoint(NamedTuple):
    """The handler of one method of a path, and the role that a request needs. The role is None if the request needs no
    token. If `has_deadline`, requests that cannot be answered in time are rejected. Endpoints for operators have no
    deadline."""

    handler: Handler
    role: Role | None
    has_deadline: bool = False


def _path(request: web.BaseRequest) -> str:
    """Return the requested path. Remove a trailing slash from Feast's paths, because Feast's server redirects requests
    with such a slash."""
    path = request.path
    return path[:-1] if path.endswith("/") and path[:-1] in _FEAST_PATHS else path


def _shed_reason(error: Overloaded | DeadlinePassed | BodyTooSlow) -> str:
    if isinstance(error, Overloaded):
        return error.reason
    return "deadline" if isinstance(error, DeadlinePassed) else "slow"


class Application:
    """One worker's `endpoints`, by path and method. `admission` decides which requests are accepted; `in_flight` is the
    number of requests without a response so far."""

    def __init__(
        self,
        settings: ServerSettings,
        protection: Auth,
        served: ServedStore,
        metrics: Metrics,
        writer: WriterClient,
        tables: ServedTables,
        outgoing: Outgoing,
    ) -> None:
        self._tables = tables
        self._settings = settings
        self._protection = protection
        self._served = served
        self._metrics = metrics
        self._writer = writer
        self._outgoing = outgoing
        self._bodies = BodyReader(settings)
        pushes = Pushes(settings, self._bodies, served, metrics, writer)
        self.endpoints: dict[str, dict[str, Endpoint]] = {
            "/v1/lookup": {"POST": Endpoint(self._lookup, "read", True)},
            "/v1/push": {"POST": Endpoint(pushes.push, "push", True)},
            _FEAST_LOOKUP: {"POST": Endpoint(self._lookup_for_feast, "read", True)},
            _FEAST_PUSH: {"POST": Endpoint(pushes.push_for_feast, "push", True)},
            _FEAST_WRITE: {"POST": Endpoint(pushes.write_for_feast, "push", True)},
            **{path: {"POST": Endpoint(self._materialize_for_feast, "push")} for path in _FEAST_MATERIALIZE},
            "/v1/views": {"GET": Endpoint(self._views, "read")},
            "/v1/status": {"GET": Endpoint(self._status, "read")},
            "/v1/reload": {"POST": Endpoint(self._reload, "admin")},
            "/openapi.json": {"GET": Endpoint(self._describe, "read")},
            "/health": {"GET": Endpoint(self._health, None)},
            "/ready": {"GET": Endpoint(self._ready, None)},
            "/metrics": {"GET": Endpoint(self._expose_metrics, "read" if settings.protect_metrics else None)},
        }
        refusable = {path for path, methods in self.endpoints.items() for e in methods.values() if e.has_deadline}
        timeout = settings.request_timeout_ms / 1e3
        self.admission = Admission(timeout, refusable - _FEAST_PATHS, refusable & _FEAST_PATHS)
        self.in_flight = 0
        self._limits = {"max_values": settings.max_values, "max_bytes": settings.max_answer_bytes}

    def server(self, counts: ConnectionCounts, worker: int) -> ConnectionServer:
        """Return the server that makes the protocol of each connection. It counts the connections of `worker`.

        This is aiohttp's low-level server, without router and middlewares: a dict of the few fixed paths saves a third
        of the CPU time of a small request.
        """
        access_log = logging.getLogger("shoal.access") if self._settings.access_log else None
        options = {"request_factory": self._request, "access_log": access_log}
        return ConnectionServer(
            self._answer,
            self.admission,
            self._outgoing,
            counts,
            worker,
            patience=self._settings.patience_seconds,
            keepalive_timeout=self._settings.idle_seconds,
            **options,
        )

    def _request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: web.RequestHandler,
        writer: AbstractStreamWriter,
        task: "asyncio.Task[None]",
    ) -> web.BaseRequest:
        loop = asyncio.get_running_loop()
        most = self._settings.max_body_bytes
        return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=most)

    def _handler(self, request: web.BaseRequest) -> Handler:
        """Return the handler of a request; raise an error if there is no handler, or if the request is not allowed or
        too late."""
        methods = self.endpoints.get(_path(request))
        if methods is None:
            raise web.HTTPNotFound
        endpoint = methods.get("GET" if request.method == "HEAD" else request.method)
        if endpoint is None:
            allowed = {*methods, "HEAD"} if "GET" in methods else methods
            raise web.HTTPMethodNotAllowed(request.method, allowed)
        if endpoint.has_deadline:
            self._admit(request)
        if endpoint.role is not None and self._protection.asks_for_tokens:
            name = self._protection.authorize(request.headers.get("Authorization"), endpoint.role)
            if endpoint.role == "admin":
                log.info("%s %s by the token %r", request.method, request.path, name)
        return endpoint.handler

    def _admit(self, request: web.BaseRequest) -> None:
        """Raise Overloaded if a request would be answered too late. At this point only its head has been parsed."""
        connection = request.protocol
        timeout = self.admission.timeout
        assert isinstance(connection, Connection)
        if connection.is_extra:
            raise Overloaded(
                f"the worker has {self._settings.max_connections} connections, its max_connections; try again later",
                "connections",
            )
        waited = connection.waited()
        asked = request.headers.get(TIMEOUT_HEADER)
        if asked is not None:
            timeout = timeout_seconds(asked)
            set_deadline(request, timeout - waited)
        if not self.admission.is_late_when_begun(waited, timeout) or (
            asked is None and not self.admission.has_standing_queue()
        ):
            return
        who = "the request" if asked is not None else "requests have queued up, and this one"
        raise Overloaded(
            f"{who} has waited for {1e3 * waited:.0f} ms, and must be answered within {1e3 * timeout:.0f} ms; "
            f"try again later",
            "waited",
        )

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Handle any request: turn errors into responses, set the common headers, and count the response."""
        started = time.perf_counter()
        connection = request.protocol
        assert isinstance(connection, Connection)
        connection.begin_request()
        self.in_flight += 1
        try:
            response = await self._handler(request)(request)
        except ShoalError as error:
            response = self._refuse(request, error, str(error), error.http_status)
            if error.retry_after is not None:
                response.headers["Retry-After"] = str(error.retry_after)
            if isinstance(error, TokenInvalid | RoleMissing):
                response.headers["WWW-Authenticate"] = error.challenge
            if isinstance(error, Overloaded | DeadlinePassed | BodyTooSlow):
                self._metrics.count_shed(_shed_reason(error))
        except web.HTTPException as error:
            message = f"{request.method} {request.path}: {error.reason}"
            response = self._refuse(request, error, message, error.status)
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
        except Exception as error:
            log.exception("%s %s failed", request.method, request.path)
            response = self._refuse(request, error, "an unexpected error occurred; see the log of the server", 500)
        finally:
            self.in_flight -= 1
            connection.end_request()
        version = None if VERSION_HEADER in response.headers else self._served.version()
        if version is not None:
            response.headers[VERSION_HEADER] = str(version.id)
        if self.admission.is_draining or connection.is_extra:
            response.force_close()
        path = _path(request)
        endpoint = path if path in self.endpoints else "other"
        self._metrics.count_request(endpoint, response.status, time.perf_counter() - started)
        return response

    def _refuse(self, request: web.BaseRequest, error: Exception, message: str, status: int) -> web.Response:
        if _path(request) in _FEAST_PATHS:
            return feast.feast_error_response(error, message, status, strict=self._settings.feast_strict)
        is_foreseen = isinstance(error, ShoalError | web.HTTPException)
        return error_response(type(error).__name__ if is_foreseen else "InternalError", message, status)

    # --- lookups -----------------------------------------------------------------------------------------------

    async def _lookup(self, request: web.BaseRequest) -> web.Response:
        asked = await self._bodies.parse(request, LookupRequest)
        check_keys(asked.entities, self._settings.max_keys)
        encoding = choose_format(request.headers.get("Accept", ""))
        options: dict[str, Any] = self._limits | {"max_age": asked.max_age, "stale": asked.stale}
        options |= {"fetched": NOTHING, "partial": parse_partial(request.headers.get(PARTIAL_HEADER))}
        if self._tables.are_needed():
            remaining = remaining_seconds(request)
            options["fetched"] = await self._tables.fetch(asked.wanted, asked.entities, "fail", remaining)
        self._outgoing.check()
        # There is no await from here to the end of the lookup, so the store version is held only until its rows are
        # copied.
        store = self._served.open()
        result = encoding.look_up(store, asked.wanted, asked.entities, **options)
        self._metrics.count_lookup(result)
        content = await self._outgoing.encode(result, partial(encoding.encode, result))
        return self._marked(answer_lookup(content, encoding.media_type, result), result)

    async def _lookup_for_feast(self, request: web.BaseRequest) -> web.Response:
        strict = self._settings.feast_strict
        body = await self._bodies.read(request)
        asked = feast.parse_feast_request(body, request.content_type if strict else feast.MEDIA_TYPE)
        check_keys(asked.entities, self._settings.max_keys)
        options: dict[str, Any] = self._limits | {"fetched": NOTHING}
        options["partial"] = parse_partial(request.headers.get(PARTIAL_HEADER))
        if self._tables.are_needed():
            wanted, entities = feast.lenient(self._served.open().version(), asked)
            options["fetched"] = await self._tables.fetch(wanted, entities, "not_found", remaining_seconds(request))
        self._outgoing.check()
        result, encode = feast.look_up(self._served.open(), asked, strict=strict, **options)
        self._metrics.count_lookup(result)
        content = await self._outgoing.encode(result, encode)
        return self._marked(answer_lookup(content, feast.MEDIA_TYPE, result), result)

    def _marked(self, response: web.Response, result: LookupResult | MatrixResult) -> web.Response:
        """Add the header that names the views whose rows did not all arrive in time, and return the response."""
        if result.partial:
            response.headers[PARTIAL_HEADER] = ",".join(result.partial)
            self._metrics.count_partial(result.partial)
        return response

    async def _materialize_for_feast(self, request: web.BaseRequest) -> web.Response:
        raise MaterializeElsewhere(
            "the store follows an export root: run `shoal export` to publish changes, or `feast materialize` with "
            "Shoal as its online store"
        )

    # --- the store ---------------------------------------------------------------------------------------------

    async def _views(self, request: web.BaseRequest) -> web.Response:
        version = self._served.open().version()
        return json_response(describe_views(version), version.id)

    async def _status(self, request: web.BaseRequest) -> web.Response:
        """Return the status. If the store is not open, the status has only the processes."""
        # Do this in a thread, because the kernel may take long to add up the memory of processes.
        server = await asyncio.to_thread(describe_server, self._settings.store)
        version = self._served.version()
        trouble = self._served.trouble()
        document: dict[str, Any] = {"version": None, "views": []}
        if version is not None:
            standing = read_replication(self._settings.store)
            document = describe_version(version, standing)
            if trouble is None:
                document["live"] = describe_live(self._settings.store)
            document["scrub"] = describe_scrub(self._settings.store)
        document["trouble"] = error_document(trouble)["error"] if trouble is not None else None
        return json_response({"server": server} | document, version.id if version else None)

    async def _reload(self, request: web.BaseRequest) -> web.Response:
        asked = await self._bodies.parse(request, ReloadBody)
        answer = await self._writer.reload(
            asked.view, snapshot=asked.snapshot, accept_schema_change=asked.accept_schema_change
        )
        error = first_failure(answer["views"])
        if error is None:
            return json_response(answer)
        return json_response(error_document(error) | answer, status=error.http_status)

    async def _describe(self, request: web.BaseRequest) -> web.Response:
        return bytes_response(DOCUMENT, "application/json")

    # --- the worker --------------------------------------------------------------------------------------------

    async def _health(self, request: web.BaseRequest) -> web.Response:
        return json_response({"status": "alive"})

    async def _ready(self, request: web.BaseRequest) -> web.Response:
        if self.admission.is_draining:
            return error_response("Draining", "the server is stopping", 503)
        try:
            version = self._served.ready()
        except ShoalError as error:
            return error_response(type(error).__name__, str(error), 503)
        return json_response({"status": "ready", "version": version.id}, version.id)

    async def _expose_metrics(self, request: web.BaseRequest) -> web.Response:
        content, content_type = self._metrics.exposition(self._served.version(), request.headers.get("Accept", ""))
        return bytes_response(content, content_type)
