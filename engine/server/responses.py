"""Answers that are not lookups: documents and errors."""

from typing import Any

import orjson
from aiohttp import web

VERSION_HEADER = "X-Shoal-Version"


def answer_bytes(content: bytes, content_type: str, version: int | None = None, status: int = 200) -> web.Response:
    """An answer of any type; with the store version that it was read from, where that is known already."""
    headers = {"Content-Type": content_type}
    if version is not None:
        headers[VERSION_HEADER] = str(version)
    return web.Response(body=content, status=status, headers=headers)


def answer_json(document: Any, version: int | None = None, status: int = 200) -> web.Response:
    """A document as JSON."""
    return answer_bytes(orjson.dumps(document), "application/json", version, status)


def answer_error(code: str, message: str, status: int) -> web.Response:
    """An error."""
    return answer_json({"error": {"code": code, "message": message}}, status=status)
