"""POST /v1/push: rows written directly, in JSON or Arrow, with some or all of their features, and deletions.

A worker checks the rows against their view and sends them to the writer. It answers once the rows are on the disk. A
repeated push with the same request id, in the header Idempotency-Key, is not applied again. A push with the same id and
other content is refused.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
from aiohttp import web

from shoal.engine.base.errors import PushInvalid, RequestTooLarge
from shoal.engine.encoders import arrow_stream
from shoal.engine.process.control import REQUEST_ID_HEADER, WriterClient
from shoal.engine.push.pushed_rows import EVENT_TIME_COLUMN, deleted_rows, from_base64, pushed_rows
from shoal.engine.server import feast_pushes
from shoal.engine.server.arrow_pushes import arrow_columns
from shoal.engine.server.metrics import Metrics
from shoal.engine.server.push_contents import (
    STAMPED_HEADER,
    content_of_arrow,
    content_of_json,
    stamped_members,
)
from shoal.engine.server.requests import BodyReader, PushRequest, parse_body
from shoal.engine.server.responses import bytes_response, json_response
from shoal.engine.server.served_store import ServedStore
from shoal.engine.server.settings import ServerSettings
from shoal.engine.store.version import ViewVersion

_LONGEST_REQUEST_ID = 256


class Pushes:
    """The push endpoints of one worker."""

    def __init__(
        self,
        settings: ServerSettings,
        bodies: BodyReader,
        served: ServedStore,
        metrics: Metrics,
        writer: WriterClient,
    ) -> None:
        self._settings = settings
        self._bodies = bodies
        self._served = served
        self._metrics = metrics
        self._writer = writer

    async def push(self, request: web.BaseRequest) -> web.Response:
        """Answer POST /v1/push."""
        body = await self._bodies.read(request)
        version = self._served.open().version()
        now = datetime.now(UTC)
        batches = []
        content = content_of_json
        if request.content_type == arrow_stream.MEDIA_TYPE:
            view = version.view(_asked_view(request))
            content = content_of_arrow
            most = self._settings
            columns = arrow_columns(body, max_rows=most.max_keys, max_bytes=most.max_body_bytes)
            batches.append(pushed_rows(view, _timed(view, columns), now=now))
        else:
            asked = parse_body(body, PushRequest)
            view = version.view(asked.view)
            if asked.rows is not None:
                batches.append(pushed_rows(view, _json_columns(view, _timed(view, asked.rows)), now=now))
            if asked.deletes is not None:
                batches.append(deleted_rows(view, _timed(view, asked.deletes), now=now))
        answer = await self._write(request, view, batches, body, content)
        return json_response(answer, answer["version"])

    async def push_for_feast(self, request: web.BaseRequest) -> web.Response:
        """Answer POST /push."""
        body = await self._bodies.read(request)
        parts = feast_pushes.rows_for_source(self._served.open().version(), body, request.content_type)
        for view, batch in parts:
            await self._write(request, view, [batch], body, content_of_json)
        return bytes_response(b"", feast_pushes.MEDIA_TYPE)

    async def write_for_feast(self, request: web.BaseRequest) -> web.Response:
        """Answer POST /write-to-online-store."""
        body = await self._bodies.read(request)
        view, batch = feast_pushes.rows_for_view(self._served.open().version(), body, request.content_type)
        answer = await self._write(request, view, [batch], body, content_of_json)
        return json_response(None, answer["version"])

    async def _write(
        self,
        request: web.BaseRequest,
        view: ViewVersion,
        batches: Sequence[pa.RecordBatch],
        body: bytes,
        content: Callable[[bytes, Collection[str], Collection[str | None]], bytes],
    ) -> dict[str, Any]:
        request_id = request.headers.get(REQUEST_ID_HEADER)
        if request_id is not None and not 0 < len(request_id) <= _LONGEST_REQUEST_ID:
            raise PushInvalid(
                f"{REQUEST_ID_HEADER} has {len(request_id)} characters; give 1 to {_LONGEST_REQUEST_ID}, such as a UUID"
            )
        rows = sum(batch.num_rows for batch in batches)
        if rows > self._settings.max_keys:
            raise RequestTooLarge(
                f"the push has {rows} rows, the server accepts at most {self._settings.max_keys}; push in parts, or "
                f"raise its max_keys"
            )
        # The files that lookups read must be at the store's path. The writer makes the same check for the files that it
        # writes.
        self._served.open().check_in_place()
        digest = b""
        if request_id is not None:
            stamped = stamped_members(request.headers.get(STAMPED_HEADER))
            digest = content(body, stamped, (EVENT_TIME_COLUMN, view.record.view_schema.timestamp_field))
        answer = await self._writer.push(view.name, batches, request_id, digest)
        self._metrics.count_push(view.name, answer["rows"], answer["superseded"])
        return answer


def _asked_view(request: web.BaseRequest) -> str:
    name = request.query.get("view")
    if name is None:
        raise PushInvalid("a push in Arrow does not name its view in the body; add ?view=NAME to the URL")
    return name


def _timed(view: ViewVersion, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the view's own timestamp column, if the client sent it, to the common name of the event time column."""
    own = view.record.view_schema.timestamp_field
    return {EVENT_TIME_COLUMN if name == own else name: values for name, values in columns.items()}


def _json_columns(view: ViewVersion, columns: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Decode the columns of bytes from base64, because JSON has no bytes."""
    as_bytes = {feature.name for feature in view.record.view_schema.features if feature.type == "bytes"}
    return {name: from_base64(name, values) if name in as_bytes else values for name, values in columns.items()}
