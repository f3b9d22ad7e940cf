"""Answers as responses: lookups, documents and errors."""

from typing import Any

import orjson
from aiohttp import web

from engine.result import LookupResult, MatrixResult

VERSION_HEADER = "X-Shoal-Version"
APPLIED_HEADER = "X-Shoal-Applied"
"""Where the views of a lookup stand in their logs: see `engine.version.StoreVersion.applied`."""
COLUMNS_HEADER = "X-Shoal-Columns"
"""The header with the columns of a matrix, if the request names a feature service or `view:*`."""
_LONGEST_COLUMNS = 3000
"""In characters. A proxy such as nginx rejects a response whose headers do not fit into 4 KiB."""
_LARGE_BYTES = 1 << 20
_LONGEST_MESSAGE = 2000
"""Characters. The end of a message says what to do."""


class LargeResponse(web.Response):
    """A response that writes its headers and body separately. aiohttp would join them into a second copy of the body,
    which would stay in memory until it is sent."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Write the body; called by aiohttp."""
        if self._payload_writer is not None:
            self._payload_writer.send_headers()
        await super().write_eof(data)


def answer_bytes(content: bytes, content_type: str, version: int | None = None, status: int = 200) -> web.Response:
    """An answer of any type; with the store version that it was read from, where that is known already."""
    headers = {"Content-Type": content_type}
    if version is not None:
        headers[VERSION_HEADER] = str(version)
    return web.Response(body=content, status=status, headers=headers)


def answer_lookup(content: bytes, content_type: str, result: LookupResult | MatrixResult) -> web.Response:
    """The answer to a lookup, with what it was read from."""
    headers = {
        "Content-Type": content_type,
        VERSION_HEADER: str(result.version),
        APPLIED_HEADER: result.applied,
    }
    if isinstance(result, MatrixResult) and 0 < len(result.column_names) <= _LONGEST_COLUMNS:
        headers[COLUMNS_HEADER] = result.column_names
    response = LargeResponse if len(content) >= _LARGE_BYTES else web.Response
    return response(body=content, headers=headers)


def answer_json(document: Any, version: int | None = None, status: int = 200) -> web.Response:
    """A document as JSON."""
    return answer_bytes(orjson.dumps(document), "application/json", version, status)


def answer_error(code: str, message: str, status: int) -> web.Response:
    """An error."""
    return answer_json({"error": {"code": code, "message": sendable(message)}}, status=status)


def sendable(message: str) -> str:
    """A message as it is sent: of what it repeats of a request, bytes of a header that are not UTF-8 come escaped, and
    what is very long is cut."""
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[: _LONGEST_MESSAGE // 2]} ... {message[-_LONGEST_MESSAGE // 2 :]}"
    return message.encode(errors="backslashreplace").decode()
