"""Answers that are not lookups: documents, and errors in the form that an endpoint's clients expect."""

from typing import Any

import orjson
from aiohttp import web

VERSION_HEADER = "X-Shoal-Version"

_FEAST_EXCEPTIONS = {
    "AmbiguousFeature": "FeatureNameCollisionError",
    "UnknownFeature": "FeastObjectNotFoundException",
}


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


def answer_feast_error(code: str, message: str, status: int) -> web.Response:
    """An error as Feast's server says it: a JSON text that holds the JSON of the exception to raise in the client."""
    kind = _FEAST_EXCEPTIONS.get(code, "FeastError")
    detail = orjson.dumps({"module": "feast.errors", "class": kind, "message": message}).decode()
    return answer_json(detail, status=status)
