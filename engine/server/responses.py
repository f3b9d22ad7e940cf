"""Build HTTP responses: for lookups, documents and errors."""

from typing import Any

import orjson
from aiohttp import web

from shoal.engine.lookup.result import LookupResult, MatrixResult

VERSION_HEADER = "X-Shoal-Version"
APPLIED_HEADER = "X-Shoal-Applied"
"""The header with the log positions of a lookup's views: see `shoal.engine.store.version.StoreVersion.applied`."""
COLUMNS_HEADER = "X-Shoal-Columns"
"""The header with the columns of a matrix, if the request names a feature service or `view:*`."""
_LONGEST_COLUMNS = 3000
"""In characters. A proxy such as nginx rejects a response whose headers do not fit into 4 KiB."""
_LARGE_BYTES = 1 << 20
_LONGEST_MESSAGE = 2000
"""In characters. A longer message is cut in the middle, because its end says what to do."""


class LargeResponse(web.Response):
    """A response that writes its headers and body separately. aiohttp would join them into a second copy of the body,
    which would stay in memory until it is sent."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Write the body; called by aiohttp."""
        if self._payload_writer is not None:
            self._payload_writer.send_headers()
        await super().write_eof(data)


def bytes_response(content: bytes, content_type: str, version: int | None = None, status: int = 200) -> web.Response:
    """Return a response of any content type; with the header of the store version, if `version` is given."""
    headers = {"Content-Type": content_type}
    if version is not None:
        headers[VERSION_HEADER] = str(version)
    return web.Response(body=content, status=status, headers=headers)


def answer_lookup(content: bytes, content_type: str, result: LookupResult | MatrixResult) -> web.Response:
    """Return the response to a lookup, with headers for the store version and the log positions of its views."""
    headers = {
        "Content-Type": content_type,
        VERSION_HEADER: str(result.version),
        APPLIED_HEADER: result.applied,
    }
    if isinstance(result, MatrixResult) and 0 < len(result.column_names) <= _LONGEST_COLUMNS:
        headers[COLUMNS_HEADER] = result.column_names
    response = LargeResponse if len(content) >= _LARGE_BYTES else web.Response
    return response(body=content, headers=headers)


def json_response(document: Any, version: int | None = None, status: int = 200) -> web.Response:
    """Return a response with a document as JSON."""
    return bytes_response(orjson.dumps(document), "application/json", version, status)


def error_response(code: str, message: str, status: int) -> web.Response:
    """Return the response for an error."""
    return json_response({"error": {"code": code, "message": sendable(message)}}, status=status)


def sendable(message: str) -> str:
    """Return a message in a form that can be sent. Bytes of a header that are not UTF-8 are escaped, and a very long
    message is cut in the middle."""
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[: _LONGEST_MESSAGE // 2]} ... {message[-_LONGEST_MESSAGE // 2 :]}"
    return message.encode(errors="backslashreplace").decode()
