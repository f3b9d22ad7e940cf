"""Push micro-batches to a server, in parts, each under an id by which the server knows it when it comes again."""

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

from engine.control import REQUEST_ID_HEADER
from engine.errors import DefinitionError, StreamFailed
from engine.failpoints import reached
from engine.keys import KEY_HASH, KEY_HASH_2
from engine.manifest import EVENT_TIMESTAMP, StreamBatch
from engine.server_access import ServerAccess
from spark_export.views import ViewDefinition

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
    """One view's way to a server: one connection, on which one push waits for the other."""

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
            tell: takes a sentence when a push has to wait, and when it no longer has.
            stopped: whether to give up what is being tried again.

        Raises:
            DefinitionError: the URL is none of HTTP.
        """
        address = urlsplit(url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise DefinitionError(f"{url!r} is no address of a server; give one as http://HOST:PORT")
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
        """Push the rows of a batch, as `spark_export.stream.batches.collect` gives them; they are durable and served
        when this returns. While the server does not answer, or has no room, it is asked again.

        Raises:
            StreamFailed: the server refuses the rows, or the stream is to stop.
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
        # Of what is pushed, not of its place in the batch: other rows, after a query was changed, are another push.
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
        """The answer to a push that is sent until it is neither lost nor put off."""
        pause, waits = timedelta(seconds=0.1), False
        while True:
            try:
                self._http.request("POST", self._path, body, self._headers | {REQUEST_ID_HEADER: request_id})
                response = self._http.getresponse()
                status, answer = response.status, response.read()
                asked = response.headers.get("Retry-After", "")
                reason = f"{status}, {_message(answer)}"
            except (OSError, http.client.HTTPException) as error:
                self._http.close()
                status, answer, asked, reason = 0, b"", "", str(error) or type(error).__name__
            if status and status not in _TRY_AGAIN:
                if waits:
                    self._tell(f"{self._view.name}: {self._url} takes pushes again")
                return status, answer
            if not waits:
                self._tell(f"{self._view.name}: {self._url} does not take pushes now ({reason}); trying again")
            waits = True
            self._wait(max(pause, timedelta(seconds=int(asked) if asked.isdigit() else 0)))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _wait(self, pause: timedelta) -> None:
        until = time.monotonic() + pause.total_seconds()
        while time.monotonic() < until:
            if self._stopped():
                raise StreamFailed(f"view {self._view.name!r}: stopped while {self._url} took no pushes")
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
