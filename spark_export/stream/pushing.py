"""Push micro-batches to a server in parts. If a part is pushed again, the server recognizes the part's request id."""

import http.client
import io
import json
import time
from collections.abc import Callable
from datetime import timedelta
from http import HTTPStatus
from urllib.parse import quote, urlsplit

import pyarrow as pa
import xxhash

from shoal.engine.base.errors import DefinitionError, StreamFailed
from shoal.engine.base.failpoints import reached
from shoal.engine.base.server_access import ServerAccess
from shoal.engine.format.keys import KEY_HASH, KEY_HASH_2
from shoal.engine.process.control import REQUEST_ID_HEADER
from shoal.engine.root.manifest import EVENT_TIMESTAMP, StreamBatch
from shoal.spark_export.views.definition import ViewDefinition

ARROW_STREAM = "application/vnd.apache.arrow.stream"

_ROWS_OF_A_PART = 5_000
_ANSWER_SECONDS = 60.0
_LONGEST_PAUSE = timedelta(seconds=15)
_TRY_AGAIN = {
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.GATEWAY_TIMEOUT,
    HTTPStatus.INSUFFICIENT_STORAGE,
}
_PUSHED_EVENT_TIME = "event_timestamp"


class StreamPushes:
    """The pushes of one view to a server, one after the other on one connection."""

    def __init__(
        self,
        view: ViewDefinition,
        url: str,
        access: ServerAccess,
        tell: Callable[[str], None],
        stopped: Callable[[], bool],
    ) -> None:
        """
        Args:
            tell: called with a message when pushes must wait, and when the server accepts pushes again.
            stopped: returns whether to stop retrying.

        Raises:
            DefinitionError: the URL is not an HTTP URL.
        """
        address = urlsplit(url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise DefinitionError(f"{url!r} is not the address of a server; give it as http://HOST:PORT")
        self._view = view
        self._url = url
        self._path = f"{address.path.rstrip('/')}/v1/push?view={quote(view.name)}"
        self._headers = {"Content-Type": ARROW_STREAM}
        if access.token is not None:
            self._headers["Authorization"] = f"Bearer {access.token}"
        self._tell = tell
        self._stopped = stopped
        if address.scheme == "https":
            self._http: http.client.HTTPConnection = http.client.HTTPSConnection(
                address.hostname, address.port, timeout=_ANSWER_SECONDS, context=access.tls
            )
        else:
            self._http = http.client.HTTPConnection(address.hostname, address.port, timeout=_ANSWER_SECONDS)

    def write(self, table: pa.Table, batch: StreamBatch) -> None:
        """Push the rows of a batch. The rows are durable and visible to lookups when this returns. Retry while the
        server does not answer or has no capacity. `table` is as returned by
        `shoal.spark_export.stream.batches.collect`.

        Raises:
            StreamFailed: the server rejects the rows, or the stream was stopped during a retry.
        """
        names = [name for name in table.column_names if name not in (KEY_HASH, KEY_HASH_2)]
        rows = table.select(names)
        rows = rows.rename_columns([_PUSHED_EVENT_TIME if name == EVENT_TIMESTAMP else name for name in names])
        for start in range(0, rows.num_rows, _ROWS_OF_A_PART):
            self._push(rows.slice(start, _ROWS_OF_A_PART), batch)
            reached("stream.part-pushed")
        reached("stream.pushed")

    def _push(self, rows: pa.Table, batch: StreamBatch) -> None:
        body = _encoded(rows)
        # The id contains a hash of the rows, not their position in the batch. If the query was changed, the batch has
        # other rows, which must count as a new push.
        request_id = f"{batch.query}/{batch.batch}/{xxhash.xxh3_128_hexdigest(body)}"
        status, answer = self._answer(body, request_id)
        if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE and rows.num_rows > 1:
            half = rows.num_rows // 2
            self._push(rows.slice(0, half), batch)
            self._push(rows.slice(half), batch)
        elif status != HTTPStatus.OK:
            raise StreamFailed(
                f"view {self._view.name!r}: {self._url} refuses batch {batch.batch}: {status}, {_message(answer)}"
            )

    def _answer(self, body: bytes, request_id: str) -> tuple[int, bytes]:
        """Send a push until the server accepts or rejects it. Return the status and the body of that response."""
        pause = timedelta(seconds=0.1)
        waits = False
        while True:
            try:
                self._http.request("POST", self._path, body, self._headers | {REQUEST_ID_HEADER: request_id})
                response = self._http.getresponse()
                status = response.status
                answer = response.read()
                asked = response.headers.get("Retry-After", "")
                reason = f"{status}, {_message(answer)}"
            except (OSError, http.client.HTTPException) as error:
                self._http.close()
                status = 0
                answer = b""
                asked = ""
                reason = str(error) or type(error).__name__
            if status and status not in _TRY_AGAIN:
                if waits:
                    self._tell(f"{self._view.name}: {self._url} accepts pushes again")
                return status, answer
            if not waits:
                self._tell(f"{self._view.name}: {self._url} does not accept pushes now ({reason}); retrying")
            waits = True
            self._wait(max(pause, timedelta(seconds=int(asked) if asked.isdigit() else 0)))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _wait(self, pause: timedelta) -> None:
        until = time.monotonic() + pause.total_seconds()
        while time.monotonic() < until:
            if self._stopped():
                raise StreamFailed(f"view {self._view.name!r}: stopped while {self._url} accepted no pushes")
            time.sleep(0.05)


def _encoded(rows: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows.combine_chunks())
    return sink.getvalue()


def _message(answer: bytes) -> str:
    try:
        return str(json.loads(answer)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return answer[:200].decode(errors="replace")
