"""The HTTP application of one worker: its endpoints, and what all of them have in common.

    POST /v1/lookup               features in JSON, Arrow or NumPy
    POST /get-online-features     the same for Feast's clients
    POST /v1/push                 rows written directly
    POST /push                    the same for Feast's clients, by push source
    POST /write-to-online-store   and by feature view
    GET  /v1/views              schemas and feature services
    GET  /v1/status             where each view stands, and the processes
    POST /v1/reload             forwarded to the writer
    GET  /openapi.json          all of this, as OpenAPI has it
    GET  /health, /ready        for load balancers
    GET  /metrics               for Prometheus

Every answer carries the header X-Shoal-Version once a store is open, and that to a lookup X-Shoal-Applied. Where there
are tokens, a request needs one with the role that the endpoint names; those for load balancers name none.
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

from engine.control import WriterClient, error_document, first_failure
from engine.encoders.negotiation import choose_format
from engine.errors import (
    BodyTooSlow,
    DeadlinePassed,
    MaterializeElsewhere,
    Overloaded,
    RoleMissing,
    ShoalError,
    TokenInvalid,
)
from engine.live_status import describe_live
from engine.processes import describe_server
from engine.remote_rows import NOTHING
from engine.result import LookupResult, MatrixResult
from engine.scrubbed import describe_scrub
from engine.server import feast
from engine.server.accepting import ConnectionCounts
from engine.server.admission import TIMEOUT_HEADER, Admission, timeout_seconds
from engine.server.connections import Connection, ConnectionServer
from engine.server.metrics import Metrics
from engine.server.openapi import DOCUMENT
from engine.server.outgoing import Outgoing
from engine.server.protection import Protection
from engine.server.pushes import Pushes
from engine.server.requests import (
    BodyReader,
    LookupRequest,
    ReloadRequest,
    check_keys,
    remaining_seconds,
    set_deadline,
)
from engine.server.responses import VERSION_HEADER, answer_bytes, answer_error, answer_json, answer_lookup
from engine.server.served_store import ServedStore
from engine.server.served_tables import PARTIAL_HEADER, ServedTables, parse_partial
from engine.server.tokens import Role
from engine.settings import ServerSettings
from engine.standing import read_standing
from engine.status import describe_version, describe_views

log = logging.getLogger("shoal.worker")

_FEAST_PATHS = {
    _FEAST_LOOKUP := "/get-online-features",
    _FEAST_PUSH := "/push",
    _FEAST_WRITE := "/write-to-online-store",
    *(_FEAST_MATERIALIZE := ("/materialize", "/materialize-incremental")),
}

Handler = Callable[[web.BaseRequest], Awaitable[web.Response]]


class Endpoint(NamedTuple):
    """What answers one method of a path, and the role that it takes to ask; anybody may where that is None. Where it
    `has_deadline`, a request that cannot be answered in time is refused; what operators ask is answered anyway."""

    handler: Handler
    role: Role | None
    has_deadline: bool = False


def _path(request: web.BaseRequest) -> str:
    """The path that was asked for. Feast's server sends clients that end it with a slash to the one without."""
    path = request.path
    return path[:-1] if path.endswith("/") and path[:-1] in _FEAST_PATHS else path


def _shed_reason(error: Overloaded | DeadlinePassed | BodyTooSlow) -> str:
    if isinstance(error, Overloaded):
        return error.reason
    return "deadline" if isinstance(error, DeadlinePassed) else "slow"


class Application:
    """One worker's `endpoints`, by path and method. `admission` says which requests are taken on; `in_flight` counts
    those whose answer is not made yet."""

    def __init__(
        self,
        settings: ServerSettings,
        protection: Protection,
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
        """What makes the protocol of each connection, and counts it in a worker's place.

        It is aiohttp's low-level server: finding one of a few fixed paths in a dict takes a third less of the CPU of a
        small request than a router and middlewares do.
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
        """What is to answer a request, which may ask for it."""
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
        """Refuse what would not be answered in time, while that costs no more than its head."""
        connection, timeout = request.protocol, self.admission.timeout
        assert isinstance(connection, Connection)
        if connection.is_extra:
            raise Overloaded(
                f"the worker has {self._settings.max_connections} connections, its max_connections; try again later",
                "connections",
            )
        waited, asked = connection.waited(), request.headers.get(TIMEOUT_HEADER)
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
        """Every request: errors become answers, and every answer is counted and gets its headers."""
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
            response = self._refuse(request, error, "the server met something unexpected; its log says what", 500)
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
            return feast.answer_error(error, message, status, strict=self._settings.feast_strict)
        is_foreseen = isinstance(error, ShoalError | web.HTTPException)
        return answer_error(type(error).__name__ if is_foreseen else "InternalError", message, status)

    # --- lookups -----------------------------------------------------------------------------------------------

    async def _lookup(self, request: web.BaseRequest) -> web.Response:
        asked = await self._bodies.parse(request, LookupRequest)
        check_keys(asked.entities, self._settings.max_keys)
        encoding = choose_format(request.headers.get("Accept", ""))
        how: dict[str, Any] = self._limits | {"max_age": asked.max_age, "stale": asked.stale}
        how |= {"fetched": NOTHING, "partial": parse_partial(request.headers.get(PARTIAL_HEADER))}
        if self._tables.are_needed():
            remaining = remaining_seconds(request)
            how["fetched"] = await self._tables.fetch(asked.wanted, asked.entities, "fail", remaining)
        self._outgoing.check()
        # From here on nothing waits: the version that is read is held only until its rows are copied.
        store = self._served.open()
        result = encoding.look_up(store, asked.wanted, asked.entities, **how)
        self._metrics.count_lookup(result)
        content = await self._outgoing.encode(result, partial(encoding.encode, result))
        return self._marked(answer_lookup(content, encoding.media_type, result), result)

    async def _lookup_for_feast(self, request: web.BaseRequest) -> web.Response:
        strict = self._settings.feast_strict
        body = await self._bodies.read(request)
        asked = feast.parse_request(body, request.content_type if strict else feast.MEDIA_TYPE)
        check_keys(asked.entities, self._settings.max_keys)
        how: dict[str, Any] = self._limits | {"fetched": NOTHING}
        how["partial"] = parse_partial(request.headers.get(PARTIAL_HEADER))
        if self._tables.are_needed():
            wanted, entities = feast.lenient(self._served.open().version(), asked)
            how["fetched"] = await self._tables.fetch(wanted, entities, "not_found", remaining_seconds(request))
        self._outgoing.check()
        result, encode = feast.look_up(self._served.open(), asked, strict=strict, **how)
        self._metrics.count_lookup(result)
        content = await self._outgoing.encode(result, encode)
        return self._marked(answer_lookup(content, feast.MEDIA_TYPE, result), result)

    def _marked(self, response: web.Response, result: LookupResult | MatrixResult) -> web.Response:
        """An answer that says of which views rows are missing in it that did not come in time."""
        if result.partial:
            response.headers[PARTIAL_HEADER] = ",".join(result.partial)
            self._metrics.count_partial(result.partial)
        return response

    async def _materialize_for_feast(self, request: web.BaseRequest) -> web.Response:
        raise MaterializeElsewhere(
            "the store follows an export root: run `shoal export`, which publishes what changed, or `feast "
            "materialize` with Shoal as its online store"
        )

    # --- the store ---------------------------------------------------------------------------------------------

    async def _views(self, request: web.BaseRequest) -> web.Response:
        version = self._served.open().version()
        return answer_json(describe_views(version), version.id)

    async def _status(self, request: web.BaseRequest) -> web.Response:
        """Also of a store that is not open: then only the processes are known."""
        # The kernel may take its time to add up the memory of processes.
        server = await asyncio.to_thread(describe_server, self._settings.store)
        version = self._served.version()
        trouble = self._served.trouble()
        document: dict[str, Any] = {"version": None, "views": []}
        if version is not None:
            standing = read_standing(self._settings.store)
            document = describe_version(version, standing)
            if trouble is None:
                document["live"] = describe_live(self._settings.store)
            document["scrub"] = describe_scrub(self._settings.store)
        document["trouble"] = error_document(trouble)["error"] if trouble is not None else None
        return answer_json({"server": server} | document, version.id if version else None)

    async def _reload(self, request: web.BaseRequest) -> web.Response:
        asked = await self._bodies.parse(request, ReloadRequest)
        answer = await self._writer.reload(
            asked.view, snapshot=asked.snapshot, accept_schema_change=asked.accept_schema_change
        )
        error = first_failure(answer["views"])
        if error is None:
            return answer_json(answer)
        return answer_json(error_document(error) | answer, status=error.http_status)

    async def _describe(self, request: web.BaseRequest) -> web.Response:
        return answer_bytes(DOCUMENT, "application/json")

    # --- the worker --------------------------------------------------------------------------------------------

    async def _health(self, request: web.BaseRequest) -> web.Response:
        return answer_json({"status": "alive"})

    async def _ready(self, request: web.BaseRequest) -> web.Response:
        if self.admission.is_draining:
            return answer_error("Draining", "the server is stopping", 503)
        try:
            version = self._served.ready()
        except ShoalError as error:
            return answer_error(type(error).__name__, str(error), 503)
        return answer_json({"status": "ready", "version": version.id}, version.id)

    async def _expose_metrics(self, request: web.BaseRequest) -> web.Response:
        content, content_type = self._metrics.exposition(self._served.version(), request.headers.get("Accept", ""))
        return answer_bytes(content, content_type)
